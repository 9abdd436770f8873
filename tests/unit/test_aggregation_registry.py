"""Rules by name."""

import pytest

import polyrank.aggregation
from polyrank.aggregation import RULES, FedIT, FlexLoRA, rule
from polyrank.errors import RuleError


def test_every_name_gives_the_rule_of_that_name():
    assert [*RULES] == ["flexlora", "flexlora:delta", "flexlora:tail-in-base", "fedit"]
    for name in RULES:
        assert rule(name).name == name
    assert rule("flexlora") == FlexLoRA(mode="replace")
    assert rule("flexlora:delta", split="balanced") == FlexLoRA("delta", "balanced")
    assert rule("flexlora", factorisation="qr") == FlexLoRA(factorisation="qr")
    assert rule("fedit") == FedIT()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("flexlore", "flexlora"), ("flexlora:detla", "flexlora:delta"), ("fedIT", "fedit")],
)
def test_an_unknown_name_suggests_the_nearest(name, nearest):
    with pytest.raises(RuleError, match=f"did you mean '{nearest}'"):
        rule(name)


def test_unknown_values_and_options_that_a_rule_lacks_are_refused():
    with pytest.raises(RuleError, match=r"split 'balance'.*did you mean 'balanced'"):
        rule("flexlora", split="balance")
    with pytest.raises(RuleError, match="factorisation"):
        rule("flexlora", factorisation="svd")
    with pytest.raises(RuleError, match="mode"):
        FlexLoRA(mode="mean")
    with pytest.raises(RuleError, match="no option 'split'"):
        rule("fedit", split="left")


def test_all_names_exist():
    for name in polyrank.aggregation.__all__:
        assert getattr(polyrank.aggregation, name) is not None
