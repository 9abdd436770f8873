"""Bounds and choices of settings, as annotations of their fields."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Interval

from polyrank.errors import RecipeError
from polyrank.settings import OneOf, bounds, check, choices, part, stored, types_of


@dataclass(frozen=True)
class Inner:
    depth: Annotated[int, Ge(1)] = 1
    later: float | None = field(default=None, metadata={"later": True})


@dataclass(frozen=True)
class Outer(Inner):
    share: Annotated[float, Interval(gt=0, le=1)] | None = None
    kind: Literal["a", "b"] = "a"
    name: Annotated[str, OneOf({"x": 1, "y": 2})] | None = field(
        default=None, metadata={"stored": "title"}
    )
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        check(self, "outer")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"depth": 0}, "outer.depth: expected at least 1, got 0"),
        ({"share": 0.0}, "outer.share: expected more than 0, at most 1, got 0.0"),
        ({"share": 1.5}, "outer.share: expected more than 0, at most 1, got 1.5"),
        ({"share": float("nan")}, "outer.share: expected a finite number, got nan"),
        ({"kind": "c"}, "outer.kind: expected one of 'a', 'b', got 'c'"),
        ({"name": "z"}, "outer.name: expected one of 'x', 'y', got 'z'"),
    ],
)
def test_a_value_that_the_annotation_excludes_is_named(given, said):
    with pytest.raises(RecipeError) as caught:
        Outer(**given)
    assert str(caught.value) == said


def test_words_of_bounds_and_choices():
    types = types_of(Outer)
    assert [bounds(types[name]) for name in ("depth", "share", "kind")] == [
        "at least 1",
        "more than 0, at most 1",
        "",
    ]
    assert choices(types["kind"]) == ("a", "b")
    assert choices(types["name"]) == ("x", "y")
    assert choices(types["share"]) == ()


def test_what_is_stored_has_the_names_and_fields_of_before():
    assert stored(Outer(name="x")) == {
        "depth": 1,
        "share": None,
        "kind": "a",
        "title": "x",
        "inner": {"depth": 1},
    }
    assert stored(Outer(later=2.0, inner=Inner(later=0.5)))["inner"]["later"] == 0.5


def test_a_part_is_cut_out_of_a_section_with_more_keys():
    assert part(Inner, Outer(depth=3, share=0.5)) == Inner(depth=3)
