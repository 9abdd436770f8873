"""Predicted bytes against what links carry, and the seconds that follow from them."""

from dataclasses import replace

import pytest

from jobs import examples, job
from models import tiny_loaded
from polyrank.codecs import CODECS
from polyrank.model.anatomy import anatomy_of
from polyrank.planning import CutPoint
from polyrank.planning.cost import CostModel
from polyrank.planning.devices import DeviceProfile
from polyrank.planning.timing import overlapped
from polyrank.planning.workload import Workload
from polyrank.training import LocalTraining
from polyrank.training.split import SplitJob, SplitSettings, train_split
from polyrank.transport import InProcessLinks

STEPS, ROWS, LENGTH, MICRO = 3, 2, 9, 2


def costs(model, **options) -> CostModel:
    load = Workload(ROWS, LENGTH, 4, accumulation=MICRO, **options)
    return CostModel(anatomy_of(model), model.spec, load)


@pytest.mark.parametrize("wire", CODECS)
@pytest.mark.parametrize("cut", [CutPoint(1), CutPoint(1, 2)], ids=str)
def test_bytes_on_the_wire_are_those_that_links_carry(wire, cut):
    """Exactly, but for the client's name in each frame."""
    model = tiny_loaded("llama", num_hidden_layers=3)
    local = LocalTraining(steps=STEPS, epochs=None, batch=ROWS, accumulation=MICRO)
    rows = examples(ROWS * MICRO, shortest=LENGTH, longest=LENGTH)
    one = replace(job(model, "alice", local=local), examples=rows)
    trained = train_split(
        model,
        [SplitJob(one, cut, 1)],
        SplitSettings(wire=wire),
        lambda tail: InProcessLinks(tail, wire, model.spec.hidden, 4096).link,
        cohort=1,
    )[0]
    assert trained.failure is None
    predicted = costs(model, wire=wire).wire(cut)
    frames = 1 + MICRO * (1 if cut.upper is None else 2)
    named = STEPS * frames * len("alice")
    assert STEPS * predicted.up + named == trained.metrics["wire_up"]
    assert STEPS * predicted.down + named == trained.metrics["wire_down"]


def test_a_whole_client_sends_factors_only():
    model = tiny_loaded("llama", num_hidden_layers=3)
    predicted, ranks = (
        costs(model),
        dict.fromkeys(tiny_loaded("llama", num_hidden_layers=3).spec.shapes, 2),
    )
    assert (predicted.wire(None).up, predicted.wire(None).down) == (0, 0)
    factors = sum(
        delta.a.nbytes + delta.b.nbytes for delta in job(model, ranks=2).assignment.start.values()
    )
    assert predicted.adapter_bytes(ranks, None).up == factors
    part = predicted.adapter_bytes(ranks, CutPoint(1))
    assert (part.up, part.down) == (factors // 3, factors // 3), "one of three equal blocks"


def test_a_pipeline_is_as_slow_as_its_slowest_stage():
    assert overlapped([3.0, 1.0, 2.0], 1) == 6.0
    assert overlapped([3.0, 1.0, 2.0], 3) == 4.0
    assert overlapped([3.0, 1.0, 2.0], 10**9) == pytest.approx(3.0)


def test_a_whole_clients_round_is_arithmetic_between_two_transfers():
    model = tiny_loaded("llama", num_hidden_layers=3)
    ranks, predicted = dict.fromkeys(model.spec.shapes, 2), costs(model)
    device = DeviceProfile("phone", 10**9, flops=1e9, up=1e4, down=4e4, latency=0.5)
    server = DeviceProfile("server", 10**12, up=2e4, latency=0.25)
    found = predicted.seconds(ranks, None, device, server, steps=5)
    step = predicted.operations(ranks, None).client / 1e9
    factors = predicted.adapter_bytes(ranks, None).up
    assert found.step == pytest.approx(step)
    assert found.round == pytest.approx(factors / 2e4 + 0.75 + 5 * step + factors / 1e4 + 0.75)
    assert found.ignored == ()


def test_a_split_clients_step_overlaps_its_microbatches():
    model, cut = tiny_loaded("llama", num_hidden_layers=3), CutPoint(1)
    ranks, predicted = dict.fromkeys(model.spec.shapes, 2), costs(model, in_flight=2)
    device = DeviceProfile("phone", 10**9, flops=1e7, up=1e4, down=4e4, latency=0.01)
    server = DeviceProfile("server", 10**12, flops=1e8)
    spent, wire = predicted.operations(ranks, cut), predicted.wire(cut)
    stages = [
        spent.client / 1e7,
        wire.up / 1e4 + MICRO * 0.01,
        spent.server / 1e8,
        wire.down / 4e4 + MICRO * 0.01,
    ]
    expected = max(stages) + (sum(stages) - max(stages)) / 2 + 2 * 0.01
    found = predicted.seconds(ranks, cut, device, server, steps=1)
    assert found.step == pytest.approx(expected)
    alone = costs(model, in_flight=1).seconds(ranks, cut, device, server, steps=1)
    assert alone.step == pytest.approx(sum(stages) + 2 * 0.01)


def test_rates_that_are_not_given_are_said_to_be_ignored():
    model = tiny_loaded("llama", num_hidden_layers=3)
    ranks, bare = dict.fromkeys(model.spec.shapes, 2), DeviceProfile("bare", 10**9)
    found = costs(model).seconds(ranks, CutPoint(1), bare, bare, steps=4)
    assert (found.step, found.round) == (0.0, 0.0)
    assert set(found.ignored) == {"device.flops", "device.up", "device.down", "server.flops"}
    whole = costs(model).seconds(ranks, None, bare, bare, steps=4)
    assert "server.flops" not in whole.ignored
