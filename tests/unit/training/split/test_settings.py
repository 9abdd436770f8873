"""What split training may ask for, and which blocks a cut leaves with whom."""

from dataclasses import replace

import pytest

from models import tiny_loaded
from polyrank.aggregation import FlexLoRA
from polyrank.errors import ModelError, RecipeError
from polyrank.planning import CutPoint, Fleet, LoRAType
from polyrank.run import RunSettings, setup
from polyrank.training import ClientWork, LocalTraining
from polyrank.training.split import SplitSettings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"wire": "fp4"}, r"split\.wire: expected one of 'float32', .*, got 'fp4'"),
        ({"adapters": "each"}, r"split\.adapters: expected one of 'own', 'shared', got 'each'"),
        ({"in_flight": 0}, r"split\.in_flight: expected at least 1, got 0"),
        ({"clip": 0.0}, r"split\.clip: expected more than 0, got 0\.0"),
        ({"clip": float("inf")}, r"split\.clip: .*finite"),
        ({"clip": float("nan")}, r"split\.clip: .*finite"),
        ({"noise": -0.1}, r"split\.noise: .*at least 0, got -0\.1"),
        ({"noise": float("nan")}, r"split\.noise: .*got nan"),
    ],
)
def test_settings_that_cannot_be_are_refused(values, message):
    with pytest.raises(RecipeError, match=message):
        SplitSettings(**values)


def test_nothing_is_bounded_or_disturbed_unless_it_is_asked_for():
    assert SplitSettings() == SplitSettings("bf16", "own", 2, None, 0.0)
    assert SplitSettings(clip=1.5, noise=0.1, in_flight=1).clip == 1.5


@pytest.mark.parametrize(
    ("cut", "client"),
    [
        (CutPoint(1), {0}),
        (CutPoint(3), {0, 1, 2}),
        (CutPoint(1, 2), {0, 2, 3}),
        (CutPoint(2, 3), {0, 1, 3}),
    ],
)
def test_a_cut_shares_out_the_blocks_and_leaves_the_server_some(cut, client):
    assert cut.at_client(4) == client
    assert cut.at_server(4) == {0, 1, 2, 3} - client


@pytest.mark.parametrize("cut", [CutPoint(4), CutPoint(1, 4), CutPoint(7)])
def test_a_cut_outside_the_model_is_refused_with_what_is_allowed(cut):
    with pytest.raises(ModelError, match=rf"within 1…3, as the model has 4 blocks.*got {cut}"):
        cut.at_client(4)


@pytest.mark.parametrize("cuts", [(0,), (-1,), (2, 2), (3, 1)])
def test_a_client_keeps_a_block_and_a_u_shape_has_a_middle(cuts):
    with pytest.raises(ModelError, match="at least 1 block at the client"):
        CutPoint(*cuts)


def test_a_cut_is_written_as_it_is_read():
    for written, cut in ((2, CutPoint(2)), ([2, 6], CutPoint(2, 6))):
        assert CutPoint.of(written) == cut
        assert cut.written == written
    assert CutPoint.of([2]) == CutPoint(2)


LOCAL = LocalTraining(lr=0.1)


def test_a_run_without_cuts_is_described_as_before_and_one_with_names_them():
    whole = Fleet.table({"a": "T1"})
    before = setup.described(FlexLoRA(), whole, LOCAL, RunSettings(), 1)
    assert "cuts" not in before
    assert "split" not in before["conduct"]
    cut = Fleet.table({"a": "T1"}, cuts={"T1": CutPoint(1), "T2": CutPoint(1, 3)})
    now = setup.described(FlexLoRA(), cut, LOCAL, RunSettings(split=SplitSettings(noise=0.5)), 1)
    assert now["fleet"] == before["fleet"]
    assert now["cuts"] == {"T1": 1, "T2": [1, 3]}
    assert now["conduct"]["split"]["noise"] == 0.5


def test_a_round_knows_the_sites_of_its_split_clients_of_those_that_anyone_trains():
    model = tiny_loaded("llama", num_hidden_layers=3)
    types = {"q": LoRAType("q", {"q_proj": 1}), "v": LoRAType("v", {"v_proj": 1})}
    fleet = Fleet.table(
        {"a": "q", "b": "v"}, types=types, cuts={"q": CutPoint(1, 2), "v": CutPoint(2)}
    )
    rows = {"train": [1, 2], "validation": [], "test": []}
    work = {id: ClientWork(id, "", True, rows, rows) for id in "ab"}
    made = setup.round_settings(FlexLoRA(), fleet, model.spec, work, RunSettings())

    def held(*blocks):
        of = (s for s in model.spec.sites if s.block in blocks)
        return {s.name for s in of if s.name.endswith(("q_proj", "v_proj"))}

    assert made.sites_at("a", 1) == held(0, 2)
    assert made.sites_at("b", 3) == held(0, 1)
    assert made.cut("b", 1) == CutPoint(2)
    beyond = replace(fleet, cuts={"v": CutPoint(3)})
    with pytest.raises(ModelError, match=r"fleet\.cuts\.v: .*within 1…2, as the model has 3"):
        setup.round_settings(FlexLoRA(), beyond, model.spec, work, RunSettings())
