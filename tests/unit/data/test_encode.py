"""Examples as token ids: where the loss is, how they end, and what is left out."""

import pytest

from byte_tokenizer import BOS, CHATML, EOS, STOP, byte_tokenizer
from kit import kit_path
from polyrank.data import Example, encode, load_tasks
from polyrank.errors import DataError, ModelError, RecipeError

ASK = Example("ab", ("cd", "other"), 7)


def one(example, tokenizer, **options):
    (row,), skipped = encode([example], tokenizer, **{"max_length": 200, **options})
    assert skipped.count == 0
    return row


def test_plain_is_bos_prompt_completion_eos_with_loss_on_the_last_two():
    tokenizer = byte_tokenizer()
    row = one(ASK, tokenizer, template="{prompt}:")
    assert tokenizer.decode(row.input_ids) == "<s>ab:cd</s>"
    assert (row.prompt_length, row.loss_from, row.targets) == (4, 4, 3)
    assert tokenizer.decode(row.input_ids[row.loss_from :]) == "cd</s>"


def test_bos_comes_only_where_the_tokenizer_adds_it():
    assert one(ASK, byte_tokenizer(bos=False)).input_ids[0] != BOS


def test_loss_on_all_is_on_every_token_but_the_first():
    row = one(ASK, byte_tokenizer(), template="{prompt}:", loss_on="all")
    assert (row.prompt_length, row.loss_from) == (4, 1)


def test_chat_is_the_whole_conversation_and_ends_with_one_eos():
    tokenizer = byte_tokenizer(CHATML)
    row = one(ASK, tokenizer)
    text = tokenizer.decode(row.input_ids)
    # The template has no </s> of its own: it is put after the turn's end.
    assert text == "<turn>user\nab<stop>\n<turn>assistant\ncd<stop></s>"
    assert tokenizer.decode(row.input_ids[row.loss_from :]) == "cd<stop></s>"


def test_the_end_of_a_turn_that_is_the_end_of_sequence_is_not_doubled():
    tokenizer = byte_tokenizer(CHATML, eos="<stop>")
    row = one(ASK, tokenizer)
    assert tokenizer.decode(row.input_ids[row.loss_from :]) == "cd<stop>"
    assert row.input_ids[-1] == STOP


def test_chat_ids_are_those_of_the_whole_conversation_up_to_its_end():
    tokenizer = byte_tokenizer(CHATML, eos="<stop>")
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    whole = tokenizer.apply_chat_template(turns)["input_ids"]
    start = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
    row = one(ASK, tokenizer)
    assert list(row.input_ids) == whole[:-1]  # all but the line break after the turn
    assert list(row.input_ids[: row.prompt_length]) == start


def test_white_space_between_generation_prompt_and_answer_belongs_to_the_answer():
    spaced = "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]{% else %} "
    spaced += "{{ m['content'] }} </s>{% endif %}{% endfor %}"
    tokenizer = byte_tokenizer(spaced)
    row = one(ASK, tokenizer)
    assert tokenizer.decode(row.input_ids[: row.prompt_length]) == "[ab]"
    assert tokenizer.decode(row.input_ids[row.prompt_length :]) == " cd </s>"


def test_a_token_across_the_border_leaves_the_prompt_as_generation_gets_it():
    # In one text the tokenizer of stories260K would join the line break and what follows.
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", bos=False)
    tokenizer.add_tokens(["\nc"])
    prompt = tokenizer(["ab\n"], add_special_tokens=False)["input_ids"][0]
    row = one(ASK, tokenizer)
    assert list(row.input_ids[: row.prompt_length]) == prompt
    assert tokenizer.decode(row.input_ids) == "ab\ncd</s>"


def test_too_long_is_skipped_and_named_with_its_label():
    tokenizer = byte_tokenizer()
    examples = [ASK, Example("a" * 50, ("b",), 8)]
    rows, skipped = encode(
        examples, tokenizer, max_length=8, template="{prompt}:", label="client-3"
    )
    assert [row.example for row in rows] == [0]
    assert skipped.rows == {"too long": ["client-3 row 8"]}


def test_exactly_max_length_fits():
    rows, _ = encode([ASK], byte_tokenizer(), max_length=7, template="{prompt}:")
    assert len(rows[0].input_ids) == 7
    rows, skipped = encode([ASK], byte_tokenizer(), max_length=6, template="{prompt}:")
    assert (rows, skipped.rows) == ([], {"too long": ["row 7"]})


def test_too_long_as_an_error_names_the_row_and_both_lengths():
    with pytest.raises(DataError, match="x row 7: 7 tokens, expected at most 5"):
        encode(
            [ASK],
            byte_tokenizer(),
            max_length=5,
            template="{prompt}:",
            label="x",
            too_long="error",
        )


def test_cutting_the_prompt_takes_its_middle_and_keeps_bos_ends_and_completion():
    tokenizer = byte_tokenizer()
    example = Example("0123456789", ("yz",), 0)
    row = one(example, tokenizer, max_length=10, template="{prompt}:", too_long="cut-prompt")
    assert tokenizer.decode(row.input_ids) == "<s>01289:yz</s>"
    assert (row.cut, row.prompt_length) == (5, 7)


def test_a_completion_that_alone_is_too_long_is_skipped_even_when_prompts_are_cut():
    example = Example("ab", ("x" * 20,), 4)
    rows, skipped = encode([example], byte_tokenizer(), max_length=20, too_long="cut-prompt")
    assert (rows, skipped.rows) == ([], {"too long": ["row 4"]})


@pytest.mark.parametrize("chat", [None, CHATML])
def test_an_end_of_sequence_inside_the_completion_is_named(chat):
    examples = [Example("ab", ("c</s>d",), 0), Example("x</s>y", ("d",), 1)]
    rows, skipped = encode(examples, byte_tokenizer(chat), max_length=200)
    assert [row.example for row in rows] == [1]
    assert skipped.rows == {"end of sequence inside the completion": ["row 0"]}
    assert rows[0].input_ids[rows[0].prompt_length :].count(EOS) == 1


def test_a_tokenizer_without_eos_and_wrong_settings_are_refused():
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        encode([ASK], byte_tokenizer(eos=None), max_length=9)
    for wrong in ({"loss_on": "prompt"}, {"too_long": "cut"}, {"max_length": 1}):
        with pytest.raises(RecipeError):
            encode([ASK], byte_tokenizer(), **{"max_length": 9, **wrong})


def test_no_examples_give_no_rows():
    rows, skipped = encode([], byte_tokenizer(), max_length=9)
    assert (rows, skipped.count) == ([], 0)


@pytest.mark.kit
@pytest.mark.parametrize("model", ["base3m-hf", "stories260K-hf"])
def test_real_tokenizers_on_real_tasks(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(kit_path("models", model))
    tasks = load_tasks(kit_path("natural_instructions", "tasks.jsonl.gz"), limit=300)
    rows, skipped = encode(tasks.examples, tokenizer, max_length=512)
    assert len(rows) + skipped.count == 300
    for row in rows:
        example = tasks.examples[row.example]
        answer = list(row.input_ids[row.prompt_length :])
        prompt = list(row.input_ids[: row.prompt_length])
        assert answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(answer[:-1]) == example.references[0]
        assert prompt[0] == tokenizer.bos_token_id
        assert prompt.count(tokenizer.bos_token_id) == 1
        assert example.input in tokenizer.decode(prompt)
