"""What is foreseen before training: memory, disk, measures that could never be taken."""

from collections import namedtuple

import pytest

from federations import LOCAL, MEASURED, clients, fleet, one_block
from polyrank.aggregation import FleetSpec, FlexLoRA, FLoRA, SLoRA, assign
from polyrank.algebra import LowRank, Sparse
from polyrank.errors import RecipeError, ResourceError
from polyrank.evaluation import Evaluation
from polyrank.rounds import Faults, Sampling
from polyrank.run import RunSettings, preflight, setup
from polyrank.run.checkpoint import KEEP
from polyrank.training import prepare, slot_bytes
from polyrank.training.encoding import Encoding

Usage = namedtuple("Usage", "free")


@pytest.fixture(scope="module")
def parts():
    """(model, what the rule is told, the clients' work)."""
    model, data = one_block(), clients()
    work, _ = prepare(data, model, Encoding())
    settings = setup.round_settings(FlexLoRA(), fleet(data), model.spec, work, RunSettings())
    return model, setup.fleet_spec(settings, fleet(data), model.spec, None), work


def resolve(parts, wanted):
    model, spec, work = parts
    return preflight.resolve_cohort(wanted, model, spec, LOCAL, work)


def test_a_cohort_is_as_large_as_memory_allows_and_no_larger_than_the_fleet(parts, monkeypatch):
    sizes = {}
    for free in (2**20, 2**21, 2**22, 2**34):
        monkeypatch.setattr(preflight, "free_memory", lambda _, free=free: free)
        sizes[free] = resolve(parts, "auto")
    assert list(sizes.values()) == sorted(sizes.values())
    assert sizes[2**34] == 4, "there are four clients"
    assert resolve(parts, 7) == 7


def test_memory_that_one_client_does_not_fit_is_told(parts, monkeypatch):
    monkeypatch.setattr(preflight, "free_memory", lambda _: 2**10)
    for wanted in ("auto", 1):
        with pytest.raises(ResourceError, match=r"memory: 0 MiB are free on cpu.*batches of 2 × "):
            resolve(parts, wanted)


def test_the_heaviest_assignments_are_one_for_each_set_of_ranks(parts):
    model, _, work = parts
    for rule, kind in ((FlexLoRA(), LowRank), (SLoRA(FlexLoRA(), 1), Sparse)):
        settings = setup.round_settings(rule, fleet(clients()), model.spec, work, RunSettings())
        spec = setup.fleet_spec(settings, fleet(clients()), model.spec, None)
        assigned = setup.heaviest_assignments(settings, spec, rule.init(spec))
        assert len({one.hash() for one in assigned}) == len(assigned) == 3
        assert all(isinstance(delta, kind) for one in assigned for delta in one.start.values())


def test_a_frozen_term_that_comes_later_is_reckoned_with(parts):
    """Under tail-in-base a client of rank 1 holds factors of the server's rank from round 2 on."""
    model, _, work = parts
    size, foreseen = {}, {}
    for mode in ("delta", "tail-in-base"):
        for rule in (FlexLoRA(mode), SLoRA(FlexLoRA(mode), 1)):
            settings = setup.round_settings(rule, fleet(clients()), model.spec, work, RunSettings())
            spec = setup.fleet_spec(settings, fleet(clients()), model.spec, None)
            assigned = setup.heaviest_assignments(settings, spec, rule.init(spec))
            foreseen[rule.name] = {
                one.frozen.ranks.get("model.layers.0.self_attn.q_proj") for one in assigned
            }
        size[mode] = slot_bytes(model, dict.fromkeys(model.spec.shapes, 1), LOCAL, 20, 5, assigned)
    assert foreseen["flexlora:tail-in-base"] == foreseen["flexlora:tail-in-base+slora"] == {5}
    assert foreseen["flexlora:delta"] == {None}
    assert size["tail-in-base"] > size["delta"]


def test_disk_is_reckoned_from_states_and_updates_of_a_round(tmp_path, monkeypatch):
    """As they are kept: a sparse update with its positions, an exact sum whole."""
    ranks = {"a": {"q": 4}, "b": {"q": 1}}
    spec = FleetSpec({"q": (1000, 500)}, ranks, {"q": 4}, 0)
    row = 4 * 1500  # Bytes of rank one.
    expected = {
        FlexLoRA(): (4 * row + 4 * 4, 4 * row),
        FLoRA(): (4 * 1000 * 500, 4 * row),
        FLoRA(reinitialise=False): (4 * 1000 * 500 + 5 * row, 4 * row),
        SLoRA(FlexLoRA(), 1): (4 * row + 4 * 4 + 12 * 4 * 1500, 12 * 4 * 1500 + 2 * 8),
    }
    place = tmp_path / "not" / "there" / "yet"
    for rule, (state, update) in expected.items():
        begun = rule.init(spec)
        assigned = [assign(rule, begun, own, {"q": 1.0}, 0) for own in ranks.values()]
        needed = (KEEP + 2) * 2 * state + 10 * update
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _, n=needed: Usage(n))
        preflight.check_disk(place, begun, assigned, 10, rule.growth(spec))
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _, n=needed: Usage(n - 1))
        with pytest.raises(ResourceError, match="a round needs up to"):
            preflight.check_disk(place, begun, assigned, 10, rule.growth(spec))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RunSettings(cohort=0), r"RunSettings\.cohort"),
        (lambda: RunSettings(server_rank=0), r"RunSettings\.server_rank"),
        (lambda: RunSettings(target_loss=float("nan")), "target_loss"),
        (lambda: Faults(quorum=0.0), "quorum"),
        (lambda: Faults(quorum=1.1), "quorum"),
        (lambda: Faults(attempts=0), "attempt"),
        (lambda: Faults(max_increment=0.0), "max_increment"),
        (lambda: Faults(max_increment=float("nan")), "max_increment"),
        (lambda: Sampling(0.5, 3), "not both"),
        (lambda: Sampling(fraction=0.0), "fraction"),
        (lambda: Sampling(fraction=1.5), "fraction"),
        (lambda: Sampling(number=0), "number"),
        (lambda: Evaluation(every=-1), "evaluation.every"),
        (lambda: Evaluation(batch=0), "evaluation.batch"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_by_name(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


@pytest.mark.parametrize(
    ("sampling", "clients", "expected"),
    [
        (Sampling(fraction=0.05), 1613, 80),  # FlexLoRA's own
        (Sampling(fraction=0.29), 100, 29),  # 0.29 × 100 is 28.999… in floating point
        (Sampling(fraction=0.01), 7, 1),
        (Sampling(number=9), 4, 4),
        (Sampling(number=3), 4, 3),
        (Sampling(), 4, 4),
    ],
)
def test_how_many_take_part(sampling, clients, expected):
    assert sampling.count(clients) == expected


def test_a_measure_that_is_possible_passes(parts):
    model, _, work = parts
    preflight.check_measures(RunSettings(evaluation=MEASURED, target_loss=1.0), model, work)
