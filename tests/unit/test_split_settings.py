"""What split training may ask for, and which blocks a cut leaves with whom."""

import pytest

from polyrank.errors import ModelError, RecipeError
from polyrank.planning import Split
from polyrank.training.split import SplitSettings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"wire": "float16"}, r"split\.wire: expected one of float32, bf16, int8.*got 'float16'"),
        ({"adapters": "each"}, r"split\.adapters: expected one of own, shared, got 'each'"),
        ({"in_flight": 0}, r"split\.in_flight: expected at least 1 microbatch, got 0"),
        ({"clip": 0.0}, r"split\.clip: .*above 0, or none, got 0\.0"),
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
    [(Split(1), {0}), (Split(3), {0, 1, 2}), (Split(1, 2), {0, 2, 3}), (Split(2, 3), {0, 1, 3})],
)
def test_a_cut_shares_out_the_blocks_and_leaves_the_server_some(cut, client):
    assert cut.at_client(4) == client
    assert cut.at_server(4) == {0, 1, 2, 3} - client


@pytest.mark.parametrize("cut", [Split(4), Split(1, 4), Split(7)])
def test_a_cut_outside_the_model_is_refused_with_what_is_allowed(cut):
    with pytest.raises(ModelError, match=rf"within 1…3, as the model has 4 blocks.*got {cut}"):
        cut.at_client(4)


@pytest.mark.parametrize("cuts", [(0,), (-1,), (2, 2), (3, 1)])
def test_a_client_keeps_a_block_and_a_u_shape_has_a_middle(cuts):
    with pytest.raises(ModelError, match="at least 1 block at the client"):
        Split(*cuts)
