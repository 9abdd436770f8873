"""Whole runs with split clients: the same as without a cut, whatever the rule and the cut."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from federations import QUIET, SITES, clients, federation
from models import tiny_loaded
from polyrank.aggregation import RULES, Rule, SLoRA, Update
from polyrank.algebra import Adapter, Delta, LowRank, distance
from polyrank.errors import RankError, RuleError
from polyrank.federation import Conduct, RoundRecord, Sampling
from polyrank.federation.engine import InProcess
from polyrank.federation.round import Task
from polyrank.model import LoadedModel
from polyrank.planning import Fleet, LoRAType, Split
from polyrank.planning.schedule import Trace
from polyrank.training import LocalTraining
from polyrank.training.split import SplitSettings
from runs import lines_with, polyrank

BLOCKS, ROUNDS = 4, 3
DATA = clients(seen=5, unseen=0)
LOCAL = LocalTraining(lr=0.02, batch=2, accumulation=2, epochs=1, dropout=0.1, clip=0.5)
UNEQUAL = {"a": 1, "b": 2, "c": 4, "d": 3}
EQUAL = dict.fromkeys("abcd", 2)
CUTS: Mapping[str, Mapping[str, Split]] = {
    "whole": {},
    "split": dict.fromkeys("abcd", Split(2)),
    "mixed": {"a": Split(1), "b": Split(3), "c": Split(1, 3)},
}
"""Types by where they are cut; of the mixed ones d runs the whole model."""


EXACT = SplitSettings(wire="float64")
SHARED = SplitSettings(wire="float64", adapters="shared")


@cache
def model(dtype: torch.dtype = torch.float64, **changes: object) -> LoadedModel:
    return tiny_loaded("llama", num_hidden_layers=BLOCKS, dtype=dtype, sites=SITES, **changes)


def fleet(ranks: Mapping[str, int], cuts: Mapping[str, Split]) -> Fleet:
    """Return the types a, b, c, d, a for the clients c0…c4."""
    types = {name: LoRAType(name, {"all": rank}) for name, rank in ranks.items()}
    who = {id: "abcd"[i % 4] for i, id in enumerate(sorted(DATA))}
    return Fleet.table(who, types=types, cuts=cuts)


@dataclass(frozen=True)
class Run:
    """What came of a run."""

    adapter: Adapter[Delta]
    records: list[RoundRecord]
    tasks: list[Task]
    updates: list[Update]


def carried_out(
    rule: Rule,
    cuts: Mapping[str, Split] | Fleet,
    *,
    ranks: Mapping[str, int] | None = None,
    local: LocalTraining = LOCAL,
    dtype: torch.dtype = torch.float64,
    split: SplitSettings = EXACT,
    cohort: int = 2,
    seed: int = 0,
    number: int = 3,
    out: Path | None = None,
) -> Run:
    """Return a run of three rounds, with `number` of the five clients in each."""
    ranks = ranks or (UNEQUAL if rule.mixed_ranks else EQUAL)
    conduct = Conduct(
        seed=seed, sampling=Sampling(number=number), evaluation=QUIET, cohort=cohort, split=split
    )
    made = federation(
        out,
        model=model(dtype),
        data=DATA,
        fleet=cuts if isinstance(cuts, Fleet) else fleet(ranks, cuts),
        rule=rule,
        local=local,
        conduct=conduct,
    )
    with made as run:
        tasks, updates = watched(run.engine)
        records = list(run.rounds(ROUNDS))
        return Run(run.adapter.factors, records, tasks, updates)


def watched(engine: InProcess) -> tuple[list[Task], list[Update]]:
    """Return lists that fill with what the engine is asked and answers."""
    real, asked, given = engine.execute, [], []

    def execute(tasks, on_step=None):
        asked.extend(tasks)
        for answer in real(tasks, on_step):
            given.append(answer)
            yield answer

    engine.execute = execute  # type: ignore[method-assign]
    return asked, given


@cache
def whole(rule: Rule, local: LocalTraining = LOCAL, dtype: torch.dtype = torch.float64) -> Run:
    """Return the run in which every client has the whole model; its cohort is another one."""
    return carried_out(rule, {}, local=local, dtype=dtype, cohort=3)


def assert_same(one: Run, other: Run, tolerance: float = 1e-8) -> None:
    """Fail unless adapters and losses agree and everyone's update was accepted.

    In float64 the two ways differ by the order of sums alone: up to 2e-13 here, most where a rule
    subtracts nearly equal aggregates. A wire of float32 in their place would show: 2e-7.
    """
    assert [record.rejected for record in (*one.records, *other.records)] == [{}] * (
        len(one.records) + len(other.records)
    )
    assert [r.clients for r in one.records] == [r.clients for r in other.records]
    assert one.adapter.keys() == other.adapter.keys()
    for site, delta in one.adapter.items():
        assert distance(delta, other.adapter[site]) <= tolerance * max(1.0, delta.norm()), site
    for mine, its in zip(one.records, other.records, strict=True):
        assert mine.loss == pytest.approx(its.loss, rel=tolerance)
        assert (mine.tokens, mine.ranks) == (its.tokens, its.ranks)


def size(adapter: Adapter[Delta]) -> float:
    return sum(delta.norm() ** 2 for delta in adapter.values()) ** 0.5


# --- every rule ---


@pytest.mark.parametrize("cuts", ["split", "mixed"])
@pytest.mark.parametrize("rule", RULES)
def test_split_clients_end_with_the_adapter_of_whole_ones_under_every_rule(
    rule: str, cuts: str
) -> None:
    split, other = carried_out(RULES[rule], CUTS[cuts]), whole(RULES[rule])
    assert_same(split, other)
    if cuts == "mixed" or rule == "hetlora":  # which prunes some matrices more than others
        return
    # Cut in the middle of four equal blocks, they download and upload half of the factors.
    for mine, its in zip(split.records, other.records, strict=True):
        assert (its.wire_up, its.wire_down, its.cuts) == (0, 0, {"whole": 3})
        assert mine.cuts == {"2": 3}
        assert 2 * (mine.bytes_up - mine.wire_up) == its.bytes_up
        assert 2 * (mine.bytes_down - mine.wire_down) == its.bytes_down


@pytest.mark.parametrize("rule", [name for name in RULES if "slora" not in RULES[name].excludes])
def test_sparse_rounds_of_slora_go_across_the_cut(rule: str) -> None:
    made = SLoRA(RULES[rule], 2)
    assert_same(carried_out(made, CUTS["mixed"]), whole(made))


@pytest.mark.parametrize("rule", ["flexlora:delta", "hetlora", "flora", "full"])
def test_fedprox_and_sgd_go_across_the_cut(rule: str) -> None:
    for local in (
        replace(LOCAL, proximal=0.5),
        replace(LOCAL, optimizer="sgd", momentum=0.9, lr=0.2),
    ):
        split = carried_out(RULES[rule], CUTS["mixed"], local=local)
        assert_same(split, whole(RULES[rule], local))


def test_the_comparison_sees_another_seed() -> None:
    """The runs above move far more than they differ."""
    rule = RULES["flexlora:delta"]
    one, other = whole(rule), carried_out(rule, CUTS["mixed"], seed=1)
    assert size(one.adapter) > 0.1
    far = sum(distance(one.adapter[s], other.adapter[s]) ** 2 for s in one.adapter) ** 0.5
    assert far > 0.01


# --- every cut ---

EVERY = (Split(1), Split(2), Split(3), Split(1, 2), Split(1, 3), Split(2, 3))


@pytest.mark.parametrize("cut", EVERY, ids=str)
def test_every_cut_gives_the_run_without_one(cut: Split) -> None:
    rule = RULES["flora"]
    split = carried_out(rule, dict.fromkeys("abcd", cut))
    assert_same(split, whole(rule))
    assert all(record.cuts == {str(cut): 3} for record in split.records)


@pytest.mark.parametrize(
    ("wire", "losses", "adapters"),
    [
        # Measured over all cuts: losses 4e-8, adapters 8e-7. Float32 rounds at 6e-8.
        ("float32", 1e-6, (0.0, 1e-5)),
        # Measured: losses 3e-4, adapters 16 %. The wire rounds at 4e-3, and AdamW's first steps,
        # which take the gradient's sign, turn what was almost nothing; so the loss hardly moves.
        ("bf16", 3e-3, (1e-3, 0.5)),
        # Measured: losses 5e-4, adapters 19 %: activations off by up to 1/254 of a token's largest.
        ("int8", 3e-3, (1e-3, 0.5)),
    ],
)
def test_in_float32_every_cut_gives_the_losses_of_the_run_without_one(
    wire: str, losses: float, adapters: tuple[float, float]
) -> None:
    rule = RULES["flora"]
    other = whole(rule, dtype=torch.float32)
    for cut in EVERY:
        settings = replace(EXACT, wire=wire)
        split = carried_out(rule, dict.fromkeys("abcd", cut), dtype=torch.float32, split=settings)
        for mine, its in zip(split.records, other.records, strict=True):
            assert mine.loss == pytest.approx(its.loss, rel=losses), cut
        far = max(
            distance(split.adapter[site], delta) / delta.norm()
            for site, delta in other.adapter.items()
        )
        assert adapters[0] <= far <= adapters[1], f"{cut}: a lossy wire differs, within bounds"


# --- one adapter for all at the server ---

REFUSED = {"hetlora", "flora:keep"}
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
    local = replace(LOCAL, clip=None, optimizer="sgd", momentum=0.9, lr=0.2)
    cuts = {**CUTS["split"], "c": Split(1, 3)}
    alone = {"ranks": EQUAL, "local": local, "number": 1}
    shared = carried_out(RULES[rule], cuts, split=SHARED, **alone)
    assert_same(shared, carried_out(RULES[rule], {}, **alone), tolerance=2e-6)


def at_server(task: Task) -> set[str]:
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
    conduct = Conduct(evaluation=QUIET, split=SHARED)
    given = fleet(EQUAL, CUTS["split"])
    try:
        made = federation(out, model=model(), data=DATA, fleet=given, rule=rule, conduct=conduct)
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


# --- rounds ---


@pytest.mark.parametrize("rule", ["flora", "flexlora:tail-in-base"])
def test_a_client_may_be_split_in_one_round_and_whole_in_the_next(rule: str) -> None:
    changes = Trace({2: {"c0": "d", "c3": "c"}, 3: {"c1": "d", "c0": "b"}})
    cuts = {"a": Split(2), "b": Split(1), "c": Split(1, 3)}
    mixed, uncut = (fleet(UNEQUAL, one).with_schedule(changes) for one in (cuts, {}))
    split = carried_out(RULES[rule], mixed, number=5)
    assert [record.cuts for record in split.records] == [
        {"1": 1, "1–3": 1, "2": 2, "whole": 1},
        {"1": 1, "1–3": 2, "2": 1, "whole": 1},
        {"1": 1, "1–3": 2, "2": 1, "whole": 1},
    ]
    assert_same(split, carried_out(RULES[rule], uncut, number=5))


def test_every_round_begins_anew_at_both_ends() -> None:
    """FLoRA deals A drawn anew and B = 0, at the client's sites as at the server's."""
    run = carried_out(RULES["flora"], CUTS["mixed"])
    assert {task.cut for task in run.tasks} == {Split(1), Split(3), Split(1, 3), None}
    for task in run.tasks:
        assert task.assignment.start.keys() == model().spec.shapes.keys()
        assert all(not delta.b.any() for delta in factors(task.assignment.start).values())
        assert all(delta.a.any() for delta in factors(task.assignment.start).values())
    first, second = [task for task in run.tasks if task.client == "c1"][:2]
    assert first.round < second.round
    assert first.assignment.start.hash() != second.assignment.start.hash()
    for update in run.updates:
        assert all(delta.b.any() for delta in factors(update.adapter).values()), "both ends trained"


def factors(adapter: Adapter[Delta]) -> dict[str, LowRank]:
    return {site: delta for site, delta in adapter.items() if isinstance(delta, LowRank)}


# --- what travels ---

FRAME = 60
"""Bytes of a frame's head and checksum; the client's name comes on top."""


@pytest.mark.parametrize("cut", [Split(1), Split(1, 3)], ids=str)
def test_the_bytes_of_a_split_run_are_those_of_its_tokens_and_its_own_factors(cut: Split) -> None:
    data = clients(seen=2, unseen=0, examples=16)
    wide = tiny_loaded(
        "llama", num_hidden_layers=BLOCKS, hidden_size=256, sites=SITES, dtype=torch.float32
    )
    kinds = {"a": LoRAType("a", {"all": 3})}
    who = Fleet.table(dict.fromkeys(data, "a"), types=kinds, cuts={"a": cut})
    made = federation(
        model=wide,
        data=data,
        fleet=who,
        rule=RULES["flexlora"],
        local=LocalTraining(batch=8, epochs=1),
        conduct=Conduct(evaluation=QUIET, split=SplitSettings()),
    )
    with made as run:
        _, updates = watched(run.engine)
        (record,) = run.rounds(1)
        rows = {id: run.work[id].rows["train"] for id in data}
    up = down = 0
    for one in updates:
        tokens = sum(len(row.input_ids) for row in rows[one.client])
        assert one.metrics["tokens"] == tokens
        steps = -(-len(rows[one.client]) // 8)
        payload = 2 * tokens * wide.spec.hidden
        head = FRAME + len(one.client)
        ways = 1 if cut.upper is None else 2
        labels = 4 * tokens if cut.upper is None else 0
        sent = ways * payload + labels + 4 * len(rows[one.client]) + steps * head * (ways + 1)
        back = ways * payload + steps * head * (ways + 1)
        assert (one.metrics["wire_up"], one.metrics["wire_down"]) == (sent, back)
        assert sent < 1.03 * ways * payload
        assert back < 1.03 * ways * payload
        up, down = up + sent, down + back
    assert (record.wire_up, record.wire_down) == (up, down)
    held = cut.at_client(BLOCKS)
    own = sum(3 * (s.m + s.n) * 4 for s in wide.spec.sites if s.block in held)
    assert record.bytes_up - up == 2 * own
    assert record.bytes_down - down == 2 * own


# --- from the command line ---

RECIPE = Path(__file__).parents[2] / "recipes" / "split.toml"
FAST = ("rounds=2", "local.steps=2", "evaluation.every=0", "evaluation.generate=0")


def test_the_recipe_of_a_split_run_runs_to_its_end(tmp_path: Path) -> None:
    done = polyrank("run", RECIPE, *FAST, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    told = " ".join(done.err.split())
    assert told.count("split: the server") == 1
    assert "sees activations, from which most tokens can be recovered" in told
    for type, where in {
        "T1": "block 0 of 4",
        "T2": "blocks 0–1 of 4",
        "T3": "blocks 0 and 3 of 4 (U)",
        "T4": "whole",
    }.items():
        assert lines_with(done.err, f" {type} ", where)
    assert "activations and gradients" in " ".join(done.out.split())
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    records = [RoundRecord.from_json(json.loads(line)) for line in lines]
    assert len(records) == 2
    for record in records:
        assert sum(record.cuts.values()) == len(record.clients) == 9
        assert set(record.cuts) <= {"1", "2", "1–3", "whole"}
        assert 0 < record.wire_up < record.bytes_up
        assert 0 < record.wire_down < record.bytes_down
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["wire_up"] == sum(record.wire_up for record in records)
    assert summary["final"]["seen"]["loss"] < summary["base"]["seen"]["loss"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    again = polyrank("resume", tmp_path / "run")
    assert (again.code, again.out) == (0, done.out)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("fleet.cuts.T1=[2,4]", r"fleet\.cuts\.T1.* within 1…3, as the model has 4 blocks"),
        ("fleet.cuts.T1=0", r"T1"),
        ("fleet.cuts.T9=1", r"fleet\.cuts: no LoRA type \['T9'\]"),
        ("split.wire=fp8", r"split\.wire"),
        ("split.adapters=shared", r"split\.adapters = 'shared'.*one adapter has one rank"),
    ],
)
def test_a_cut_that_cannot_be_is_an_error_and_nothing_is_begun(
    tmp_path: Path, setting: str, message: str
) -> None:
    done = polyrank("run", RECIPE, *FAST, setting, "--out", tmp_path / "run")
    assert done.code == 1
    assert re.search(message, " ".join(done.err.split())), done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()
