"""What is put into a store comes back as it was, wherever it lies by then."""

from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from polyrank.data import Encoded, Example, ExampleStore, Size, TokenStore, joined, sizes
from polyrank.data import spool as spools

texts = st.text(max_size=40)  # Halves of surrogate pairs are among them.
lone = st.text(st.characters(min_codepoint=0xD7F0, max_codepoint=0xE010, categories=["Cs", "Co"]))
columns = st.dictionaries(texts, texts | lone, max_size=4)


@st.composite
def examples(draw):
    prompt, input = draw(texts | lone), draw(texts)
    references = tuple(draw(st.lists(texts, min_size=1, max_size=3)))
    named = draw(columns) | draw(st.sampled_from([{}, {"a": prompt}, {"b": references[-1]}]))
    return Example(prompt, references, draw(st.integers(-(2**80), 2**80)), named, input)


ids = st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=9)


@st.composite
def encoded(draw):
    tokens = tuple(draw(ids))
    start = draw(st.integers(1, len(tokens) - 1))
    prompt = draw(st.integers(1, len(tokens)))
    return Encoded(tokens, prompt, start, draw(st.integers(0, 2**31 - 1)), draw(st.integers(0, 99)))


buffers = st.sampled_from([1, 50, 1 << 20])
"""Every record on disk, some of them, none."""


@settings(max_examples=100, deadline=None)
@given(st.lists(examples(), max_size=8), buffers)
def test_examples_come_back_equal(listed, kept):
    with patch.object(spools, "KEPT", kept):
        store = ExampleStore()
        for example in listed:
            store.append(example)
        assert list(store) == listed
        assert [store[i] for i in range(len(store))] == listed
        for example, back in zip(listed, store, strict=True):
            assert list(back.columns) == list(example.columns), "in the same order"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(encoded(), max_size=5), max_size=4), buffers)
def test_rows_come_back_equal_and_their_sizes_are_known_without_reading(parts, kept):
    with patch.object(spools, "KEPT", kept):
        store = TokenStore()
        stored = [store.extend(iter(part)) for part in parts]
        assert stored == parts
        whole = [row for part in parts for row in part]
        expected = [Size(len(r.input_ids), r.prompt_length, r.targets) for r in whole]
        with patch.object(spools.Spool, "read", side_effect=AssertionError("read")):
            assert list(sizes(joined(*stored))) == expected
            assert [size for rows in stored for size in sizes(rows[:])] == expected
            assert (
                list(sizes(stored[0][1:3] if stored else []))
                == expected[1:3][: max(0, len(parts[0]) - 1) if parts else 0]
            )
        assert list(sizes(whole)) == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.slices(18), st.slices(18), st.data())
def test_views_of_views_are_slices_of_lists(first, second, cut, again, data):
    listed = [Example(str(i), ("a",), i) for i in range(first + second)]
    left, right = ExampleStore(), ExampleStore()
    for example in listed[:first]:
        left.append(example)
    for example in listed[first:]:
        right.append(example)
    both = joined(left, right)
    assert list(both) == listed
    assert list(both[cut]) == listed[cut]
    assert list(both[cut][again]) == listed[cut][again]
    assert right[cut] == listed[first:][cut]
    if listed:
        at = data.draw(st.integers(-len(listed), len(listed) - 1))
        assert both[at] == listed[at]
