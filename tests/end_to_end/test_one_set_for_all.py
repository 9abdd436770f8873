"""Runs in which split clients share one adapter at the server: which rules can, and what it is."""

from dataclasses import replace
from pathlib import Path

import pytest

from federations import QUIET, opened
from polyrank.aggregation import RULES, Rule, SLoRA
from polyrank.algebra import Adapter
from polyrank.errors import RankError, RuleError
from polyrank.planning import CutPoint, LoRAType
from polyrank.rounds.messages import TrainTask
from polyrank.run import RunSettings
from rules import ROWS
from splits import (
    BLOCKS,
    CUTS,
    DATA,
    EQUAL,
    LOCAL,
    ROUNDS,
    SHARED,
    UNEQUAL,
    assert_same,
    carried_out,
    fleet,
    model,
    size,
)

REFUSED = {name for name, row in ROWS.items() if "shared" in row.excludes}
"""The rules that cannot have one adapter for all clients behind the cut."""


@pytest.mark.parametrize("cuts", ["split", "mixed"])
@pytest.mark.parametrize("rule", sorted(RULES.keys() - REFUSED))
def test_a_shared_adapter_works_under_every_rule_but_those_listed(rule: str, cuts: str) -> None:
    run = carried_out(RULES[rule], CUTS[cuts], ranks=EQUAL, split=SHARED, number=4)
    assert [record.rejected for record in run.records] == [{}] * ROUNDS
    assert all(delta.is_finite() for delta in run.adapter.values())
    assert size(run.adapter) > 0.1
    for number in range(1, ROUNDS + 1):
        given = {one.client: one.adapter for one in run.updates if one.round == number}
        tasks = {task.client: task for task in run.tasks if task.round == number}
        assert len(given) == 4
        for site in run.adapter:
            hosts = [c for c in given if site in at_server(tasks[c])]
            others = given.keys() - hosts
            assert len({Adapter({site: given[c][site]}).hash() for c in hosts}) <= 1, "one set"
            assert len({Adapter({site: given[c][site]}).hash() for c in others}) == len(others)


@pytest.mark.parametrize("rule", ["flexlora:delta", "flora", "full"])
def test_an_adapter_that_one_client_a_round_shares_with_nobody_is_its_own(rule: str) -> None:
    """But for the clip norm, which is then that of each side.

    A shared set sums over tokens and divides later, and Llama's norms and softmax round to float32
    whatever the weights are in, so that the two orders differ: by 4e-7 here, with SGD; AdamW makes
    more of it where gradients are next to nothing.
    """
    local = replace(LOCAL, clip=0, optimizer="sgd", momentum=0.9, lr=0.2)
    cuts = {**CUTS["split"], "c": CutPoint(1, 3)}
    alone = {"ranks": EQUAL, "local": local, "number": 1}
    shared = carried_out(RULES[rule], cuts, split=SHARED, **alone)
    assert_same(shared, carried_out(RULES[rule], {}, **alone), tolerance=2e-6)


def at_server(task: TrainTask) -> set[str]:
    """Return the sites that the server trains for the client of a task."""
    blocks = frozenset[int]() if task.cut is None else task.cut.at_server(BLOCKS)
    return {site.name for site in model().spec.sites if site.block in blocks}


@pytest.mark.parametrize("rule", ["flexlora:delta", "segment"])
def test_a_shared_adapter_works_through_sparse_rounds_too(rule: str) -> None:
    run = carried_out(SLoRA(RULES[rule], 2), CUTS["mixed"], ranks=EQUAL, split=SHARED)
    assert [record.rejected for record in run.records] == [{}] * ROUNDS
    assert size(run.adapter) > 0.1


def test_the_rules_that_cannot_share_are_refused_with_their_reason_before_anything_is_begun(
    tmp_path: Path,
) -> None:
    refused = {}
    for name, rule in RULES.items():
        for one in [rule] if "slora" in rule.excludes else [rule, SLoRA(rule, 1)]:
            reason = refusal(one, tmp_path / one.name)
            assert (tmp_path / one.name).exists() == (reason is None), "nothing is begun"
            refused.setdefault(name, reason)
            assert (reason is None) == (name not in REFUSED)
    for name in REFUSED:
        assert RULES[name].excludes["shared"] in (refused[name] or "")
        assert "set split.adapters = 'own'" in (refused[name] or "")


def refusal(rule: Rule, out: Path) -> str | None:
    """Return why a run with one shared adapter is not begun; None if it is."""
    run_settings = RunSettings(evaluation=QUIET, split=SHARED)
    given = fleet(EQUAL, CUTS["split"])
    try:
        made = opened(out, model=model(), data=DATA, fleet=given, rule=rule, settings=run_settings)
    except RuleError as error:
        return str(error)
    made.close()
    return None


def test_a_shared_adapter_needs_equal_ranks_behind_the_cuts_only(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"type a has rank 1,\s+type b rank 2"):
        carried_out(RULES["flora"], CUTS["split"], split=SHARED, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    first = {name: {"all": 2, "model.layers.0.*": rank} for name, rank in UNEQUAL.items()}
    types = {name: LoRAType(name, ranks) for name, ranks in first.items()}
    given = replace(fleet(EQUAL, CUTS["split"]), types=types)
    assert size(carried_out(RULES["flora"], given, split=SHARED).adapter) > 0.1
