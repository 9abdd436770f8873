"""More of anything never costs less."""

from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from measured import sized
from polyrank.model.anatomy import anatomy_of
from polyrank.planning import CutPoint
from polyrank.planning.cost import CostModel
from polyrank.planning.workload import Workload

BLOCKS = 4
CUTS = [
    None,
    *(CutPoint(i) for i in range(1, BLOCKS)),
    CutPoint(1, 2),
    CutPoint(1, 3),
    CutPoint(2, 3),
]


@cache
def known(architecture: str):
    model = sized(architecture)
    return anatomy_of(model), model.spec


@st.composite
def cases(draw):
    anatomy, spec = known(draw(st.sampled_from(["llama", "gemma2", "gpt2"])))
    sites = sorted(spec.shapes)
    ranks = draw(st.dictionaries(st.sampled_from(sites), st.integers(1, 9), max_size=12))
    load = Workload(
        batch=draw(st.integers(1, 4)),
        length=draw(st.integers(4, 40)),
        targets=draw(st.integers(1, 4)),
        accumulation=draw(st.integers(1, 3)),
        in_flight=draw(st.integers(1, 3)),
        checkpointing=draw(st.booleans()),
        dropout=draw(st.booleans()),
    )
    return anatomy, spec, sites, ranks, load


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_memory_and_operations_never_fall_as_the_work_grows(case, data):
    anatomy, spec, sites, ranks, load = case
    cut = data.draw(st.sampled_from(CUTS))

    def total(ranks, load):
        found = CostModel(anatomy, spec, load)
        memory, server = found.memory(ranks, cut), found.server_memory(ranks, cut)
        spent = found.operations(ranks, cut)
        return memory.total, server.total, spent.client, spent.server

    before = total(ranks, load)
    site = data.draw(st.sampled_from(sites))
    raised = {**ranks, site: ranks.get(site, 0) + data.draw(st.integers(1, 8))}
    changed = {
        "rank": total(raised, load),
        "rows": total(ranks, _with(load, batch=load.batch + 1)),
        "length": total(ranks, _with(load, length=load.length + 1)),
        "targets": total(ranks, _with(load, targets=load.targets + 1, length=load.length + 1)),
        "in flight": total(ranks, _with(load, in_flight=load.in_flight + 1)),
    }
    for what, after in changed.items():
        assert all(b <= a for b, a in zip(before, after, strict=True)), what


@settings(max_examples=60, deadline=None)
@given(cases())
def test_a_client_with_more_blocks_never_needs_less(case):
    anatomy, spec, _, ranks, load = case
    found = CostModel(anatomy, spec, load)
    for order in (
        [CutPoint(1), CutPoint(2), CutPoint(3)],
        [CutPoint(1, 3), CutPoint(1, 2)],
        [CutPoint(1, 3), CutPoint(2, 3)],
    ):
        memory = [found.memory(ranks, cut) for cut in order]
        spent = [found.operations(ranks, cut) for cut in order]
        assert [m.total for m in memory] == sorted(m.total for m in memory)
        assert [s.client for s in spent] == sorted(s.client for s in spent)


def _with(load: Workload, **changes: int) -> Workload:
    from dataclasses import replace

    return replace(load, **changes)
