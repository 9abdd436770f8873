import math

import pytest

from polyrank.errors import RankError, RecipeError
from polyrank.planning.scaling import Scaling


def test_proportional_scale_is_the_same_at_every_rank():
    scaling = Scaling()
    assert [scaling.scale(r) for r in (1, 4, 64)] == [2.0, 2.0, 2.0]
    assert [scaling.lora_alpha(r) for r in (1, 4, 64)] == [2.0, 8.0, 128.0]
    assert Scaling("proportional", 0.5).lora_alpha(6) == 3.0


def test_fixed_alpha_spreads_the_scale_by_the_ratio_of_ranks():
    scaling = Scaling("fixed", 16)
    assert scaling.scale(4) / scaling.scale(64) == 16.0
    assert scaling.lora_alpha(4) == scaling.lora_alpha(64) == 16


def test_rslora_divides_by_the_root_of_the_rank():
    scaling = Scaling("rslora", 8)
    assert scaling.scale(4) == 4.0
    assert scaling.scale(2) == 8 / math.sqrt(2)
    assert scaling.lora_alpha(2) == 8
    assert scaling.rank_stabilised
    assert not Scaling("fixed", 8).rank_stabilised


@pytest.mark.parametrize("policy", ["proportional", "fixed", "rslora"])
def test_alpha_and_scale_agree_in_the_way_peft_divides(policy):
    scaling = Scaling(policy, 3.0)
    for rank in (1, 2, 7, 30):
        divisor = math.sqrt(rank) if scaling.rank_stabilised else rank
        assert scaling.scale(rank) == pytest.approx(scaling.lora_alpha(rank) / divisor, rel=1e-15)


def test_impossible_values_are_refused_with_the_place_named():
    with pytest.raises(RecipeError, match=r"lora\.scaling: .*proportional.*'lora'"):
        Scaling("lora")
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(RecipeError, match=r"lora\.alpha"):
            Scaling("fixed", value)
    with pytest.raises(RankError, match="at least 1, got 0"):
        Scaling().scale(0)
