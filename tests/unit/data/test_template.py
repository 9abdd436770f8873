"""Templates: the text around an example, plain, own, and the tokenizer's chat."""

import pytest

from byte_tokenizer import CHATML, byte_tokenizer
from polyrank.data import PLAIN, Example
from polyrank.data.template import PlainTemplate, choose
from polyrank.errors import ModelError, RecipeError

BARE = Example("Add {x}.", ("3",), 0)
WITH = Example("Add {x}.", ("3",), 1, input="1 {2}")


def test_the_plain_template_leaves_the_input_block_out_where_there_is_none():
    bare, full = PlainTemplate(PLAIN).prompts([BARE, WITH])
    assert bare == "### Instruction:\nAdd {x}.\n\n### Response:\n"
    assert full == "### Instruction:\nAdd {x}.\n\n### Input:\n1 {2}\n\n### Response:\n"


def test_an_own_text_without_a_place_for_the_input_puts_it_after_the_prompt():
    assert PlainTemplate("Q: {prompt} {{A}}:").prompts([BARE, WITH]) == [
        "Q: Add {x}. {A}:",
        "Q: Add {x}.\n\n1 {2} {A}:",
    ]


def test_paragraphs_with_the_prompt_and_the_last_one_always_stay():
    text = "Q: {prompt} {input}\n\nC: {input}\n\n{input}A:"
    assert PlainTemplate(text).prompts([BARE]) == ["Q: Add {x}. \n\nA:"]


@pytest.mark.parametrize("text", ["{input}", "{prompt} {task}", "{prompt", "{prompt:>3}"])
def test_an_own_text_must_have_the_prompt_and_nothing_unknown(text):
    with pytest.raises(RecipeError):
        choose(text, byte_tokenizer())


def test_auto_is_chat_where_the_tokenizer_has_a_template():
    assert choose("auto", byte_tokenizer()) == PlainTemplate()
    assert choose("auto", byte_tokenizer(CHATML)).prompts([WITH]) == [
        "<turn>user\nAdd {x}.\n\n1 {2}<stop>\n<turn>assistant\n"
    ]
    assert choose("plain", byte_tokenizer(CHATML)) == PlainTemplate()


def test_chat_without_a_chat_template_and_unknown_names_are_refused():
    with pytest.raises(ModelError, match="no chat template"):
        choose("chat", byte_tokenizer())
    with pytest.raises(RecipeError, match="expected auto, chat, plain or a text"):
        choose("alpaca", byte_tokenizer())


def test_a_thinking_block_before_the_answer_belongs_to_the_prompt():
    thinking = CHATML.replace(
        "<turn>{{ m['role'] }}\n",
        "<turn>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think></think>\n{% endif %}",
    )
    (prompt,) = choose("chat", byte_tokenizer(thinking)).prompts([BARE])
    assert prompt.endswith("<turn>assistant\n<think></think>\n")


@pytest.mark.parametrize(
    "chat", ["{{ raise_exception('no') }}", "{{ messages[0]['content'] }}", "{{ messages[9].x.y }}"]
)
def test_a_chat_template_that_cannot_serve_is_a_model_error(chat):
    with pytest.raises(ModelError, match="chat template"):
        choose("chat", byte_tokenizer(chat))
