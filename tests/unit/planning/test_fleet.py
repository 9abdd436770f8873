"""Fleets: who trains at which ranks."""

from dataclasses import replace

import pytest

from models import tiny_loaded
from polyrank.errors import ModelError, RankError
from polyrank.planning import (
    DISTRIBUTIONS,
    TYPES,
    CutPoint,
    Fleet,
    LoRAType,
    ModelSpec,
    Site,
    Trace,
)

SPEC = ModelSpec(
    architecture="Toy",
    sites=tuple(
        Site(f"layers.{block}.{group}.{name}", m, n, block, group)
        for block in (0, 1)
        for group, name, m, n in (
            ("attention", "q_proj", 8, 8),
            ("attention", "v_proj", 4, 8),
            ("feed-forward", "down_proj", 8, 12),
        )
    ),
    blocks=2,
    hidden=8,
    vocabulary=50,
    context=32,
    parameters=1000,
)
Q0, V0, D0, Q1, V1, D1 = (site.name for site in SPEC.sites)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ({"all": 3}, (3, 3, 3, 3, 3, 3)),
        ({"all": 3, "attention": 2}, (2, 2, 3, 2, 2, 3)),
        ({"attention": 2}, (2, 2, None, 2, 2, None)),
        ({"attention": 2, "q_proj": 4, "all": 1}, (4, 2, 1, 4, 2, 1)),
        ({"all": 1, "layers.0.*": 4}, (4, 4, 4, 1, 1, 1)),
        ({"q_proj": 4, "feed-forward": 2, Q1: 8}, (4, None, 2, 8, None, 2)),
        ({"*.?_proj": 2, "all": 1}, (2, 2, 1, 2, 2, 1)),
        ({"layers.0.*": 3, "q_proj": 3}, (3, 3, 3, 3, None, None)),
        ({"layers.0.*": 3, "q_proj": 2, Q0: 1}, (1, 3, 3, 2, None, None)),
    ],
)
def test_the_most_specific_key_wins_and_what_no_key_names_is_left_alone(ranks, expected):
    wanted = dict(zip((Q0, V0, D0, Q1, V1, D1), expected, strict=True))
    resolved = LoRAType("T", ranks).resolve(SPEC)
    assert resolved == {site: rank for site, rank in wanted.items() if rank is not None}
    backwards = LoRAType("T", dict(reversed(ranks.items())))
    assert backwards.resolve(SPEC) == resolved


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"all": 0}, r"rank 0 \(all\) is below 1"),
        ({"q_proj": -1}, r"rank -1 \(q_proj\)"),
        ({"all": 5}, r"rank 5 \(all\) at layers\.0\.attention\.v_proj, a 4×8 matrix.*1…4"),
        ({"all": 1, "k_proj": 2}, r"\['k_proj'\] match no site of Toy"),
        ({"feedforward": 2}, r"a group of \['attention', 'feed-forward'\]"),
        ({"layers.7.*": 1}, "match no site"),
        ({"layers.0.*": 3, "q_proj": 2}, r"\['layers\.0\.\*', 'q_proj'\] give .* different ranks"),
        ({}, "match no site"),
    ],
)
def test_ranks_that_do_not_fit_the_model_are_named(ranks, message):
    with pytest.raises(RankError, match=message) as caught:
        LoRAType("T9", ranks).resolve(SPEC)
    assert "LoRA type T9" in str(caught.value)


def test_the_scaled_types_fit_a_narrow_model_and_the_papers_are_told_to_be_too_wide():
    spec = tiny_loaded("llama", hidden_size=32, intermediate_size=64, num_attention_heads=1,
                       num_key_value_heads=1).spec  # fmt: skip
    for kind in TYPES["scaled"].values():
        assert set(kind.resolve(spec)) == set(spec.shapes)
    with pytest.raises(RankError, match="'scaled' types"):
        TYPES["paper"]["T4"].resolve(spec)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uniform", (5, 5, 5, 5)),
        ("heavy-tail-light", (17, 1, 1, 1)),
        ("heavy-tail-strong", (1, 1, 1, 17)),
        ("normal", (1, 9, 9, 1)),
    ],
)
def test_the_papers_distributions_are_met(name, expected):
    fleet = Fleet.sample([f"c{i}" for i in range(20)], name)
    assert fleet.counts() == dict(zip(("T1", "T2", "T3", "T4"), expected, strict=True))
    assert sum(DISTRIBUTIONS[name](4)) == pytest.approx(1)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("clients", [1, 2, 3, 6, 19])
def test_a_name_does_for_any_number_of_clients(name, clients):
    fleet = Fleet.sample([f"c{i}" for i in range(clients)], name)
    assert sum(fleet.counts().values()) == clients


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uniform", {"weak": 6, "middle": 7, "strong": 7}),
        ("heavy-tail-light", {"weak": 17, "middle": 2, "strong": 1}),
        ("heavy-tail-strong", {"weak": 1, "middle": 2, "strong": 17}),
        ("normal", {"weak": 1, "middle": 18, "strong": 1}),
    ],
)
def test_a_name_does_for_types_of_ones_own_in_the_order_of_their_ranks(name, expected):
    ranks = {"strong": {"all": 9}, "weak": {"all": 4}, "middle": {"attention": 4, "q_proj": 8}}
    types = {kind: LoRAType(kind, own) for kind, own in ranks.items()}
    fleet = Fleet.sample([f"c{i}" for i in range(20)], name, types=types)
    assert fleet.counts() == dict(sorted(expected.items()))
    only = {"strong": types["strong"]}
    assert Fleet.sample("abc", name, types=only).counts() == {"strong": 3}
    two = Fleet.sample("abcd", name, types={**only, "weak": types["weak"]}).counts()
    assert sum(two.values()) == 4


def test_fleets_of_names_are_those_of_version_0_1():
    """Runs that are resumed have them; of every type there are clients, as was asked then."""
    ids = [f"c{i}" for i in range(12)]
    found = "".join(Fleet.sample(ids, "uniform", seed=3).assigned[id][1] for id in ids)
    assert found == "133422134241"
    own = {f"T{i}": LoRAType(f"T{i}", {"all": 5 - i}) for i in range(1, 5)}
    assert Fleet.sample(ids, "uniform", types=own, seed=3).assigned == dict(
        zip(ids, map("T{}".format, found), strict=True)
    )
    heavy = Fleet.sample([f"c{i}" for i in range(20)], "heavy-tail-light", types=own)
    assert heavy.counts()["T1"] == 17, "T1 to T4 are the weakest to the strongest by name"


def test_shares_that_leave_a_type_without_a_client_are_refused():
    with pytest.raises(RankError, match="leave no client for type T2"):
        Fleet.sample("abc", {"T1": 0.9, "T2": 0.1})


def test_who_gets_which_type_depends_on_the_seed_alone():
    ids = [f"c{i}" for i in range(40)]
    one = Fleet.sample(ids, "uniform", seed=1)
    assert one.assigned == Fleet.sample(iter(ids[::-1]), "uniform", seed=1).assigned
    assert one.assigned != Fleet.sample(ids, "uniform", seed=2).assigned


@pytest.mark.parametrize(
    "shares",
    [{"T1": 0.5}, {"T1": 1.5, "T2": -0.5}, {"T1": float("nan"), "T2": 1.0}, {}, {"T1": 1.1}],
)
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(RankError, match="sum to 1"):
        Fleet.sample(["a"], shares)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fleet.sample(["a"], "unifrom"), "'unifrom' is not a resource distribution"),
        (lambda: Fleet.sample(["a"], "uniform", types="papre"), "not a family of LoRA types"),
        (lambda: Fleet.sample(["a"], {"T9": 1.0}), r"no LoRA type \['T9'\]"),
        (lambda: Fleet.sample(["a"], {"T1": 1.0, "T9": 0.0}), r"no LoRA type \['T9'\]"),
        (lambda: Fleet.sample([], "uniform"), "at least one client"),
        (lambda: Fleet.table({"a": "T5"}), r"no LoRA type \['T5'\]; there are \['T1'"),
        (lambda: Fleet.table({"a": "all"}, types={"all": LoRAType("all", {"all": 1})}), "'all'"),
        (lambda: Fleet.table({"a": "T1"}).forced("T7", SPEC), "no LoRA type"),
    ],
)
def test_names_that_do_not_exist_are_refused(make, message):
    with pytest.raises(RankError, match=message):
        make()


@pytest.mark.parametrize("name", ["uniform", "heavy-tail-light", "normal"])
def test_a_fleet_without_types_is_refused(name):
    with pytest.raises(RankError, match="at least one LoRA type, got none"):
        Fleet.sample("abc", name, types={})


def test_a_table_says_who_has_what_and_clients_of_one_type_share_their_ranks():
    types = {"A": LoRAType("A", {"all": 1}), "B": LoRAType("B", {"q_proj": 4})}
    fleet = Fleet.table({"x": "A", "y": "B", "z": "A"}, types=types)
    ranks = fleet.ranks(SPEC)
    assert ranks["x"] is ranks["z"]
    assert ranks["y"] == {Q0: 4, Q1: 4}
    assert fleet.counts() == {"A": 2, "B": 1}


def test_the_weakest_is_the_one_that_trains_least_of_those_present():
    types = {
        "narrow": LoRAType("narrow", {"q_proj": 2}),  # 2 sites × 2 × 16 = 64 parameters
        "wide": LoRAType("wide", {"all": 1}),  # 2 × (16 + 12 + 20) = 96
        "absent": LoRAType("absent", {"v_proj": 1}),  # 24, but nobody has it
    }
    fleet = Fleet.table({"x": "wide", "y": "narrow", "z": "wide"}, types=types)
    assert fleet.forced("weakest", SPEC).assigned == dict.fromkeys("xyz", "narrow")
    assert fleet.forced("absent", SPEC).assigned == dict.fromkeys("xyz", "absent")
    assert fleet.assigned["x"] == "wide", "the fleet itself stays"


CUTS = {"T1": CutPoint(1), "T3": CutPoint(2, 3)}


def test_a_type_that_is_cut_stays_cut_whoever_has_it_and_when():
    moved = Trace({2: {"a": "T2", "b": "T1"}})
    fleet = Fleet.table({"a": "T1", "b": "T2"}, cuts=CUTS).with_schedule(moved)
    assert [fleet.cut_of(client, 1) for client in "ab"] == [CutPoint(1), None]
    assert [fleet.cut_of(client, 2) for client in "ab"] == [None, CutPoint(1)]
    sampled = Fleet.sample("ab", {"T1": 0.5, "T2": 0.5}, cuts=CUTS)
    assert [sampled.cut_of(c, 1) is None for c in "ab"] == [sampled.at(1)[c] == "T2" for c in "ab"]
    assert Fleet.table({"a": "T1"}).cut_of("a", 1) is None


def test_a_forced_fleet_keeps_the_cut_of_its_type():
    fleet = Fleet.table(
        {"a": "T1", "b": "T2"}, types={t: LoRAType(t, {"all": 1}) for t in ("T1", "T2")}
    )
    cut = replace(fleet, cuts={"T2": CutPoint(1)})
    assert cut.forced("T2", SPEC).cut_of("a", 1) == CutPoint(1)
    assert cut.forced("T1", SPEC).cut_of("b", 1) is None


def test_a_cut_of_an_unknown_type_is_refused():
    with pytest.raises(RankError, match=r"cuts: no LoRA type \['T9'\]; there are \['T1', 'T2'"):
        Fleet.table({"a": "T1"}, cuts={"T9": CutPoint(1)})


@pytest.mark.parametrize(
    ("cut", "blocks", "message"),
    [
        (CutPoint(2), 2, r"fleet\.cuts\.T2: .*within 1…1, as the model has 2 blocks.*got 2"),
        (CutPoint(1, 2), 2, r"fleet\.cuts\.T2: .*within 1…1.*got 1–2"),
        (CutPoint(1), 1, r"fleet\.cuts\.T1: .*a model of 1 block cannot be cut"),
    ],
)
def test_a_cut_outside_the_model_is_refused_by_the_name_of_its_key(cut, blocks, message):
    fleet = Fleet.table({"a": "T1"}, cuts={"T1": CutPoint(1), "T2": cut})
    with pytest.raises(ModelError, match=message):
        fleet.check_cuts(replace(SPEC, blocks=blocks))
    Fleet.table({"a": "T1"}, cuts={"T1": CutPoint(1)}).check_cuts(SPEC)
