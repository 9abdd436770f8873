"""Rules by name."""

import pytest

import polyrank.aggregation
from polyrank.aggregation import FFA, OPTIONS, RULES, FedIT, FlexLoRA, HetLoRA, rule
from polyrank.errors import RuleError


def test_every_name_gives_the_rule_of_that_name():
    flexlora = ["flexlora", "flexlora:delta", "flexlora:tail-in-base"]
    others = ["fedit", "hetlora", "segment", "ffa", "ffa:replace", "flora", "flora:keep", "full"]
    assert [*RULES] == [*flexlora, *others]
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
