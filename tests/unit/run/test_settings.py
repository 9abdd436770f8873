"""How many clients take part in a round, and the bounds on what they send."""

import math

import pytest

from polyrank.errors import RecipeError
from polyrank.rounds import Faults, Sampling, Weighting
from polyrank.run import RunSettings
from polyrank.settings import stored
from polyrank.training import LocalTraining


@pytest.mark.parametrize(
    ("sampling", "clients", "expected"),
    [
        (Sampling(fraction=0.05), 1613, 80),  # FlexLoRA's own: rounded down.
        (Sampling(fraction=0.3), 10, 3),  # 0.3 · 10 is 3, whatever binary fractions make of it.
        (Sampling(fraction=0.29), 100, 29),  # 28.999999999999996 in floating point.
        (Sampling(fraction=0.01), 10, 1),
        (Sampling(fraction=1.0), 10, 10),
        (Sampling(), 7, 7),
        (Sampling(number=4), 7, 4),
        (Sampling(number=9), 7, 7),
    ],
)
def test_a_fraction_is_rounded_down_and_nobody_is_asked_twice(sampling, clients, expected):
    assert sampling.count(clients) == expected


@pytest.mark.parametrize("name", ["deadline", "clip_increment", "max_increment"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_that_means_nothing_is_refused_by_its_name(name, value):
    with pytest.raises(
        RecipeError, match=rf"faults\.{name}: expected (more than 0|a finite number)"
    ):
        Faults(**{name: value})
    assert getattr(Faults(**{name: 0.5}), name) == 0.5


@pytest.mark.parametrize("most", [0.0, -0.5, 1.5, math.nan])
def test_a_largest_share_is_one(most):
    with pytest.raises(
        RecipeError,
        match=r"aggregation\.max_share: expected (more than 0, at most 1|a finite number)",
    ):
        Weighting(max_share=most)


def test_bounds_that_are_not_set_are_not_in_a_run_s_description():
    plain = stored(RunSettings())
    assert not {"deadline", "clip_increment"} & plain["faults"].keys()
    assert "most" not in plain["weights"]
    chosen = RunSettings(
        faults=Faults(deadline=9.0, clip_increment=2.0), weights=Weighting(max_share=0.3)
    )
    found = stored(chosen)
    assert (found["faults"]["deadline"], found["faults"]["clip_increment"]) == (9.0, 2.0)
    assert found["weights"]["most"] == 0.3


def test_a_round_lasts_no_longer_than_orders_can_say():
    assert Faults(deadline=31 * 24 * 3600.0).deadline
    with pytest.raises(RecipeError, match=r"faults\.deadline: expected .* at most 2678400, got"):
        Faults(deadline=31 * 24 * 3600.0 + 1)


def test_settings_are_stored_as_version_0_1_stored_them():
    """Folders of runs that were begun with it are compared with these."""
    assert stored(RunSettings()) == {
        "seed": 0,
        "sampling": {"fraction": None, "number": None},
        "weights": {"by": "examples", "cap": None},
        "scaling": {"policy": "proportional", "value": None},
        "evaluation": {
            "every": 1,
            "examples": 32,
            "own_rank": True,
            "generate": 4,
            "generate_every": 0,
            "max_new_tokens": 64,
            "batch": 16,
        },
        "stopping": None,
        "encoding": {
            "max_length": 0,
            "template": "auto",
            "loss_on": "completion",
            "too_long": "skip",
        },
        "faults": {"quorum": 0.5, "attempts": 3, "max_increment": None},
        "server_rank": None,
        "cohort": "auto",
        "target_loss": None,
    }
    local = LocalTraining(method="fedprox", clip=0)
    assert local.described() == {
        "optimizer": "adamw",
        "lr": 3e-4,
        "epochs": 1,
        "steps": None,
        "batch": 8,
        "accumulation": 1,
        "clip": None,
        "warmup": 0.0,
        "schedule": "constant",
        "weight_decay": 0.0,
        "dropout": 0.0,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "momentum": 0.0,
        "proximal": 0.01,
    }
    assert "proximal" not in LocalTraining().described()
