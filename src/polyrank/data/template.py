"""Templates: the text in which a prompt and its input reach a model, and the answer's end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from polyrank.data.formats import fill, parse
from polyrank.data.types import Example
from polyrank.errors import ModelError, RecipeError

PLAIN = "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n"


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer; this package does not import transformers."""

    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: Any

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Any:
        """Return a mapping whose ``input_ids`` is one list of ids per text."""
        ...

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        """Return the rendered text of each conversation."""
        ...


class Template(Protocol):
    """Text around an example: what comes before its completion and what after.

    `whole` says that the template writes the whole sequence: the tokenizer's own first tokens (bos)
    are not added, and prompt and answer are one text, tokenised together. `before` and `after` are
    what stands between prompt and completion, and between completion and end of sequence.
    """

    @property
    def whole(self) -> bool: ...  # noqa: D102

    @property
    def before(self) -> str: ...  # noqa: D102

    @property
    def after(self) -> str: ...  # noqa: D102

    def prompts(self, examples: Sequence[Example]) -> list[str]:
        """Return the text that each example's completion is to follow."""
        ...


@dataclass(frozen=True)
class PlainTemplate:
    """A text with ``{prompt}`` and, usually, ``{input}``; write ``{{`` for a brace.

    For an example without input, paragraphs (text between blank lines) that ask for it are left
    out, except those with ``{prompt}`` and the last one. Without ``{input}`` in the text, the input
    follows the prompt after a blank line.
    """

    text: str = PLAIN
    whole: bool = False
    before: str = ""
    after: str = ""

    def __post_init__(self) -> None:
        names = {name for _, name in parse(self.text) if name is not None}
        if "prompt" not in names or not names <= {"prompt", "input"}:
            raise RecipeError(
                f"template {self.text!r}: expected {{prompt}} and, if wanted, {{input}} in it, got "
                f"{', '.join(sorted(names)) or 'no name'}; other columns belong into the prompt of "
                "the data"
            )

    def prompts(self, examples: Sequence[Example]) -> list[str]:
        """Return the text filled in for each example."""
        whole = parse(self.text)
        if not any(name == "input" for _, name in whole):
            return [fill(whole, {"prompt": question(example)}) for example in examples]
        # The blank lines go with the paragraph that they follow.
        paragraphs = re.findall(r".+?(?:\n\n+|\Z)", self.text, flags=re.DOTALL)
        asked = [{name for _, name in parse(paragraph)} for paragraph in paragraphs]
        short = parse(
            "".join(
                paragraph
                for paragraph, names in zip(paragraphs[:-1], asked, strict=False)
                if "input" not in names or "prompt" in names
            )
            + paragraphs[-1]
        )
        return [
            fill(
                whole if example.input.strip() else short,
                {"prompt": example.prompt, "input": example.input},
            )
            for example in examples
        ]


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """The tokenizer's own chat template: prompt and input as the user's turn.

    The text is that of the whole conversation, and generation is to start where the completions of
    training start. So what the template writes between its generation prompt and the assistant's
    words (the empty thinking block of some models: `opening`) counts as prompt; white space there
    (`before`) counts as answer, since it may be one token with the first word.
    """

    tokenizer: Tokenizer
    opening: str
    before: str
    after: str
    whole: bool = True

    @staticmethod
    def of(tokenizer: Tokenizer) -> ChatTemplate:
        """Return the tokenizer's template; ModelError if it cannot put the words as they are."""
        mark = "polyrank completion"
        turns = [{"role": "user", "content": "polyrank prompt"}]
        answer = {"role": "assistant", "content": mark}
        (start,) = _render(tokenizer, [turns], True)
        (whole,) = _render(tokenizer, [[*turns, answer]], False)
        if whole.count(mark) != 1:
            raise ModelError(
                "chat template: expected the assistant's words once and unchanged in the rendered "
                "conversation; set the template to plain or to a text with {prompt}"
            )
        before, _, after = whole.partition(mark)
        between = before[len(start) :] if before.startswith(start) else ""
        if between.strip():
            return ChatTemplate(tokenizer, opening=between, before="", after=after)
        return ChatTemplate(tokenizer, opening="", before=between, after=after)

    def prompts(self, examples: Sequence[Example]) -> list[str]:
        """Return the conversation up to the assistant's first word."""
        turns = [[{"role": "user", "content": question(example)}] for example in examples]
        return [text + self.opening for text in _render(self.tokenizer, turns, True)]


def choose(template: str, tokenizer: Tokenizer) -> Template:
    """Return the template that a recipe names: ``auto``, ``chat``, ``plain`` or a text.

    ``auto`` is the tokenizer's chat template if it has one, otherwise the plain one.
    """
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "plain"
    if template == "chat":
        if not tokenizer.chat_template:
            raise ModelError("template: the tokenizer has no chat template; use auto or plain")
        return ChatTemplate.of(tokenizer)
    if template == "plain":
        return PlainTemplate()
    if "{" not in template:
        raise RecipeError(
            f"template: expected auto, chat, plain or a text with {{prompt}}, got {template!r}"
        )
    return PlainTemplate(template)


def question(example: Example) -> str:
    """Return prompt and input as one text, apart by a blank line."""
    return "\n\n".join(part for part in (example.prompt, example.input) if part.strip())


def _render(tokenizer: Tokenizer, conversations: list[Any], start: bool) -> list[str]:
    try:
        return list(
            tokenizer.apply_chat_template(
                conversations, tokenize=False, add_generation_prompt=start
            )
        )
    except Exception as error:  # whatever a template written in Jinja may raise
        raise ModelError(
            f"chat template: it cannot be applied to a user's turn ({error}); set the template to "
            "plain or to a text with {prompt}"
        ) from error
