"""Split clients score what they would have scored whole; a shared set, its union batch."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from jobs import examples, job
from polyrank.errors import RankError
from polyrank.model import LoadedModel
from polyrank.planning import CutPoint
from polyrank.training import (
    Job,
    Scoring,
    train_cohort,
)
from polyrank.training.split import Activations, Reply, Request, ServerParts
from scoring import (
    EVERY,
    LOCAL,
    METRICS,
    SHARED,
    deep,
    fleet,
    lowest_untouched,
    same,
    scores,
    split,
)


@pytest.mark.parametrize(
    "cut", [CutPoint(1), CutPoint(2), CutPoint(3), CutPoint(1, 2), CutPoint(1, 3)], ids=str
)
@pytest.mark.parametrize("metric", METRICS)
def test_a_split_client_scores_what_it_scores_whole(cut: CutPoint, metric: str) -> None:
    model = deep()
    jobs = fleet(model, Scoring(2, metric), dropout=0.2)
    for one, other in zip(train_cohort(model, jobs), split(model, jobs, cut), strict=True):
        assert other.failure is None
        same(one.importance, other.importance)


@pytest.mark.parametrize("cut", [CutPoint(2), CutPoint(1, 3)], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_microbatches_in_flight_and_checkpointing_change_no_score(
    cut: CutPoint, checkpointing: bool
) -> None:
    whole = train_cohort(deep(), fleet(deep(), accumulation=4, batch=1))
    model = deep(checkpointing=checkpointing)
    jobs = fleet(model, accumulation=4, batch=1)
    for one, other in zip(whole, split(model, jobs, cut, in_flight=3), strict=True):
        same(one.importance, other.importance)


@pytest.mark.parametrize("cut", [CutPoint(2), CutPoint(1, 3)], ids=str)
@pytest.mark.parametrize("below", [2, 4])
def test_a_client_part_without_adapters_is_scored(cut: CutPoint, below: int) -> None:
    model = deep()
    one = job(model, ranks=lowest_untouched(model, below), local=LOCAL, seed=12)
    one = replace(one, scoring=EVERY)
    (found,) = split(model, [one], cut)
    same(found.importance, scores(model, one))


def test_scoring_changes_no_bit_of_split_training() -> None:
    model = deep()
    jobs = fleet(model)
    unscored = [replace(one, scoring=Scoring(0)) for one in jobs]
    for cut in (CutPoint(2), CutPoint(1, 3)):
        pairs = zip(split(model, jobs, cut), split(model, unscored, cut), strict=True)
        for one, other in pairs:
            assert one.adapter.hash() == other.adapter.hash()
            assert one.metrics == other.metrics
            assert one.importance
            assert not other.importance


def equal_starts(model: LoadedModel, scoring: Scoring = EVERY) -> list[Job]:
    """Three clients of one start and unequal data, as those of a shared adapter are."""
    first = job(model, "a", ranks=2, count=4, local=LOCAL)
    others = [(client, examples(4, seed=seed)) for client, seed in (("b", 2), ("c", 3))]
    jobs = [first, *(replace(first, client=c, examples=rows, seed=7) for c, rows in others)]
    return [replace(one, scoring=scoring) for one in jobs]


def union(jobs: Sequence[Job]) -> Job:
    """One client that has the rows of all, in one step of one microbatch."""
    rows = [row for one in jobs for row in one.examples]
    return replace(jobs[0], examples=rows, local=replace(LOCAL, batch=len(rows), accumulation=1))


@pytest.mark.parametrize("metric", METRICS)
def test_the_union_batch_scores_a_shared_server_part_for_all_its_clients(metric: str) -> None:
    model = deep()
    jobs = equal_starts(model, Scoring(1, metric))
    found = split(model, jobs, CutPoint(2), adapters="shared")
    whole = scores(model, union(jobs), metric)
    for one, mine in zip(jobs, found, strict=True):
        alone = scores(model, one, metric)
        server_part = {site.name for site in model.spec.sites if site.block >= 2}
        expected = {s: (whole if s in server_part else alone)[s] for s in alone}
        same(mine.importance, expected, SHARED)


def test_with_mixed_cuts_a_shared_site_is_scored_by_those_that_do_not_run_it_themselves() -> None:
    model = deep()
    jobs = equal_starts(model)
    cuts = [CutPoint(1), CutPoint(3), CutPoint(1)]
    found = split(model, jobs, cuts, adapters="shared")
    middle, last = scores(model, union([jobs[0], jobs[2]])), scores(model, union(jobs))
    for one, cut, mine in zip(jobs, cuts, found, strict=True):
        expected = dict(scores(model, one))
        for site in model.spec.sites:
            if site.block >= cut.lower:
                expected[site.name] = (middle if site.block < 3 else last)[site.name]
        same(mine.importance, expected, SHARED)


def test_a_client_whose_pass_overflows_leaves_nothing_in_the_scores_of_a_shared_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = deep()
    jobs = equal_starts(model)
    answer = ServerParts.answer

    def spoilt(self: ServerParts, requests: Sequence[Request]) -> list[Reply]:
        """Client b's activations come large enough that norms, in float32, overflow."""
        return answer(
            self,
            [
                replace(one, states=one.states * 1e300)
                if isinstance(one, Activations) and one.id.client == "b"
                else one
                for one in requests
            ],
        )

    monkeypatch.setattr(ServerParts, "answer", spoilt)
    found = split(model, jobs, CutPoint(2), adapters="shared")
    monkeypatch.undo()
    assert "nothing of it was applied" in str(found[1].failure)
    assert found[1].importance == {}
    expected = scores(model, union([jobs[0], jobs[2]]))
    server_part = [site.name for site in model.spec.sites if site.block >= 2]
    for mine in (found[0], found[2]):
        same(
            {s: mine.importance[s] for s in server_part},
            {s: expected[s] for s in server_part},
            SHARED,
        )


def test_clients_of_a_shared_set_are_scored_alike() -> None:
    model = deep()
    jobs = equal_starts(model)
    jobs[2] = replace(jobs[2], scoring=Scoring(2))
    with pytest.raises(RankError, match="'c': its importance is to be measured in another way"):
        split(model, jobs, CutPoint(2), adapters="shared")
