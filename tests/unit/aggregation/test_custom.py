"""Rules of the user's own, named as module:Class: imported only where it is allowed."""

import sys
from pathlib import Path

import pytest

from aggregation_rounds import fleet, fresh_state, noisy_training, play, product
from polyrank.aggregation import FlexLoRA, SLoRA, code_allowed, rule
from polyrank.errors import RuleError

OWN = """
from dataclasses import dataclass

from polyrank.aggregation import FlexLoRA, Rule


@dataclass(frozen=True)
class Renamed(FlexLoRA):
    mode: str = "delta"

    @property
    def name(self):
        return "renamed"


class Unfinished(Rule):
    @property
    def name(self):
        return "unfinished"


@dataclass(frozen=True)
class Asking(FlexLoRA):
    weight: float = None

    def __post_init__(self):
        if self.weight is None:
            raise TypeError("no weight")


CONSTANT = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    before = set(sys.modules)
    (tmp_path / "own_rules.py").write_text(OWN)
    (tmp_path / "broken_rules.py").write_text("raise ValueError('not today')\n")
    (tmp_path / "needy_rules.py").write_text("import no_such_package\n")
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.endswith("_rules"):
            del sys.modules[name]


def test_nothing_is_imported_unless_it_is_allowed(folder):
    with pytest.raises(RuleError, match=r"'own_rules:Renamed' is code .*trust.* --allow-code") as e:
        rule("own_rules:Renamed")
    with code_allowed(str(folder)):
        rule("own_rules:Renamed")
        assert str(folder) in sys.path
    assert str(folder) not in sys.path
    assert "app.allow-code" in str(e.value)
    with pytest.raises(RuleError, match="nothing of it was run"):
        rule("own_rules:Renamed")


def test_it_is_a_rule_like_any_other_with_options_and_behind_slora(folder):
    with code_allowed(str(folder)):
        own = rule("own_rules:Renamed", {"split": "balanced", "gamma": None})
    assert (own.name, own.split) == ("renamed", "balanced")
    assert SLoRA(own, 2).name == "renamed+slora"
    clients = fleet([1, 2, 4])
    state, _ = play(own, fresh_state(own, (9, 7), clients), clients, noisy_training(1))
    same = FlexLoRA("delta", split="balanced")
    expected, _ = play(same, fresh_state(same, (9, 7), clients), clients, noisy_training(1))
    assert product(own, state).equal(product(same, expected))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nowhere_rules:Renamed", {}, r"module 'nowhere_rules' that is installed or in one of \["),
        ("own_rules:Missing", {}, "expected a class Missing derived from .*Rule in .*own_rules.py"),
        ("own_rules:CONSTANT", {}, "derived from polyrank.aggregation.Rule in .*, got 3"),
        ("own_rules:Unfinished", {}, "Unfinished lacks adapter, assign_site, init, merge_site"),
        ("own_rules:Renamed", {"gamma": 1.0}, r"no option 'gamma' \(it has \['factorisation'"),
        ("own_rules:Asking", {}, "no weight; give every field a default"),
        ("broken_rules:Any", {}, "importing 'broken_rules' failed: ValueError: not today"),
        ("needy_rules:Any", {}, "module 'needy_rules' needs 'no_such_package'"),
    ],
)
def test_what_is_no_rule_is_refused_by_name(folder, name, options, message):
    with code_allowed(str(folder)), pytest.raises(RuleError, match=message):
        rule(name, options)


def test_two_modules_of_one_name_are_not_mixed_up(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "own_rules.py").write_text(OWN)
    with code_allowed(str(folder)):
        rule("own_rules:Renamed")
    with code_allowed(str(other)):  # a copy, as a run's folder keeps it
        rule("own_rules:Renamed")
    (other / "own_rules.py").write_text(OWN + "CONSTANT = 4\n")
    with code_allowed(str(other)), pytest.raises(RuleError, match=r"another one at .*other"):
        rule("own_rules:Renamed")


def test_a_folder_never_takes_the_place_of_an_installed_module(tmp_path):
    (tmp_path / "colorsys.py").write_text(OWN)
    with code_allowed(str(tmp_path)), pytest.raises(RuleError, match=r"is imported from .*already"):
        rule("colorsys:Renamed")


@pytest.mark.parametrize("name", ["flexlora:detla", "ffa:", "own_rules:lower", "own rules:Any"])
def test_other_names_with_a_colon_are_misspelt_names_of_rules(name):
    with code_allowed(), pytest.raises(RuleError, match="unknown rule"):
        rule(name)
