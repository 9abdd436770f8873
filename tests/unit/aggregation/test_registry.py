"""Rules by name."""

import pytest

import polyrank.aggregation
from polyrank.aggregation import FFA, OPTIONS, RULES, FedIT, FlexLoRA, FLoRA, HetLoRA, rule
from polyrank.errors import RuleError


def test_every_name_gives_the_rule_of_that_name():
    for name in RULES:
        assert rule(name).name == name
    assert rule("flexlora") == FlexLoRA(mode="replace")
    assert rule("flexlora:delta", {"split": "balanced"}) == FlexLoRA("delta", "balanced")
    assert rule("flexlora", {"factorisation": "qr", "gamma": None}) == FlexLoRA(factorisation="qr")
    assert rule("fedit", dict.fromkeys(OPTIONS)) == FedIT()
    assert rule("hetlora", {"gamma": 0.5, "penalty": 0.0}) == HetLoRA(0.5, 0.0)
    assert rule("ffa:replace") == FFA(correction=False)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("flexlore", "flexlora"),
        ("flexlora:detla", "flexlora:delta"),
        ("fedIT", "fedit"),
        ("hetlorra", "hetlora"),
        ("ffa:replacement", "ffa:replace"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name, nearest):
    with pytest.raises(RuleError, match=f"did you mean '{nearest}'"):
        rule(name)


def test_unknown_values_and_options_that_a_rule_lacks_are_refused():
    with pytest.raises(RuleError, match=r"split 'balance'.*did you mean 'balanced'"):
        rule("flexlora", {"split": "balance"})
    with pytest.raises(RuleError, match="factorisation"):
        rule("flexlora", {"factorisation": "svd"})
    with pytest.raises(RuleError, match="mode"):
        FlexLoRA(mode="mean")
    with pytest.raises(RuleError, match=r"'fedit' has no option 'split' \(it has none\)"):
        rule("fedit", {"split": "left"})
    with pytest.raises(RuleError, match=r"no option 'split' \(it has \['gamma', 'penalty'\]\)"):
        rule("hetlora", {"split": "left"})
    # What a name tells is no option: this would be another rule under the name of the first.
    with pytest.raises(RuleError, match="no option 'mode'"):
        rule("flexlora", {"mode": "delta"})
    with pytest.raises(RuleError, match="no option 'correction'"):
        rule("ffa", {"correction": False})


def test_all_names_exist():
    for name in polyrank.aggregation.__all__:
        assert getattr(polyrank.aggregation, name) is not None


def test_other_names_give_the_same_rule_and_are_listed_and_suggested():
    assert rule("noise-free") == FLoRA()
    assert rule("noise-free").name == "flora"
    assert "noise-free" not in RULES
    with pytest.raises(RuleError, match=r"'noise-free'.*did you mean 'noise-free'"):
        rule("noisefree")


def test_the_option_and_the_name_say_the_same_and_may_not_contradict():
    kept = rule("flora:keep")
    assert kept == FLoRA(reinitialise=False)
    assert rule("flora", {"reinitialise": False}) == rule("noise-free", {"reinitialise": False})
    assert rule("flora", {"reinitialise": False}) == rule("flora:keep", {"reinitialise": False})
    assert rule("flora", {"reinitialise": False}).name == "flora:keep"
    assert rule("flora", {"reinitialise": True}) == rule("flora") != kept
    with pytest.raises(RuleError, match=r"'flora:keep': with .* it would be 'flora'; drop one"):
        rule("flora:keep", {"reinitialise": True})
    with pytest.raises(RuleError, match="'fedit' has no option 'reinitialise'"):
        rule("fedit", {"reinitialise": False})
