import math

import pytest

from polyrank.errors import RankError, RecipeError
from polyrank.planning.allocate import allocate
from polyrank.planning.local_search import SiteChoices, repair
from polyrank.planning.rank_choices import checked_rank_choices, derived_rank_choices
from polyrank.planning.spectrum import spectrum

AB = {"a": 1, "b": 1}


def test_the_densest_site_is_filled_first_and_the_rest_goes_on():
    ranks = allocate({"a": 1.0, "b": 3.0, "c": 2.0}, AB | {"c": 1}, 13, [1, 2, 4, 8], _up(8))
    assert ranks == {"a": 1, "b": 8, "c": 4}


def test_cost_counts_once():
    """b gains more than a per rank but less per byte; gains are not divided by cost twice."""
    gain, unit = {"a": 2.0, "b": 3.0}, {"a": 1, "b": 2}
    assert allocate(gain, unit, 8, [1, 2, 4, 8], _up(8)) == {"a": 8, "b": 0}
    # Divided twice, a would win here too: 2 > 5/4; once, b does: 2 < 5/2.
    gain = {"a": 2.0, "b": 5.0}
    assert allocate(gain, unit, 16, [8], _up(8)) == {"a": 0, "b": 8}


def test_a_swap_repairs_what_filling_by_gain_per_byte_spoiled():
    """By gain per byte a comes first (2 > 1.9) and leaves no room for b, which is worth more."""
    assert allocate({"a": 2.0, "b": 19.0}, {"a": 1, "b": 10}, 10, [1], _up(1)) == {"a": 0, "b": 1}


def test_a_swap_lowers_one_site_for_another_where_that_gains():
    """Of 9 bytes a takes 8 and b 1, worth 4.6; a at 2 leaves 5 for b, worth 2 + 3."""
    sites = [SiteChoices("a", 1.0, 2, (0, 2, 4)), SiteChoices("b", 0.6, 1, (0, 1, 5))]
    ranks = [4, 1]
    repair(sites, ranks, 9)
    assert ranks == [2, 5]


def test_a_swap_never_lowers_what_it_raises():
    sites = [SiteChoices("a", 1.0, 1, (0, 1, 4))]
    ranks = [1]
    repair(sites, ranks, 4)
    assert ranks == [4]


def test_filling_is_followed_by_swaps():
    """Filling gives b 8 ranks and leaves 6 of 22 bytes; b at 5 lets a have 4, 9 in all."""
    gain, unit = {"a": 2.0, "b": 2.0}, {"a": 3, "b": 2}
    assert allocate(gain, unit, 22, [4, 5, 8], _up(8)) == {"a": 4, "b": 5}


def test_of_equal_sites_the_earlier_get_the_larger_ranks():
    """A swap ends with a at 4 and c, its equal, at 5."""
    gain, unit = {"a": 3.0, "b": 2.0, "c": 3.0, "d": 2.0}, {"a": 1, "b": 3, "c": 1, "d": 1}
    assert allocate(gain, unit, 9, [4, 5, 8], _up(8)) == {"a": 5, "b": 0, "c": 4, "d": 0}


def test_a_large_site_is_not_shut_out_by_several_small_ones():
    """Three small sites, one swap each, could never make room for the large one."""
    gain = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 26.0}
    unit = {"a": 1, "b": 1, "c": 1, "d": 30}
    assert allocate(gain, unit, 30, [1], _up(1)) == {"a": 0, "b": 0, "c": 0, "d": 1}


def test_levels_that_do_not_divide_each_other_are_still_shared_out_exactly():
    """Nine ranks of 3 or 4: filling takes 4 + 4 = 8, three times 3 take all nine."""
    gain = {"a": 1.0, "b": 1.0, "c": 1.0}
    assert allocate(gain, dict.fromkeys(gain, 5), 45, [3, 4], _up(4)) == {"a": 3, "b": 3, "c": 3}


def test_sites_without_importance_or_room_for_the_smallest_level_get_nothing():
    ranks = allocate(
        {"a": 0.0, "b": 1.0, "c": 1.0}, AB | {"c": 1}, 99, [2, 4], {"a": 8, "b": 1, "c": 4}
    )
    assert ranks == {"a": 0, "b": 0, "c": 4}
    assert allocate({"a": 1.0}, {"a": 5}, 4, [1], {"a": 8}) == {"a": 0}
    assert allocate({}, {}, 4, [1], {}) == {}


def test_a_rich_budget_fills_every_site_to_its_largest_level():
    assert allocate({"a": 1.0, "b": 9.0}, AB, 10**9, [1, 2, 4], {"a": 3, "b": 64}) == {
        "a": 2,
        "b": 4,
    }


def test_arguments_that_cannot_be_are_refused_by_name():
    with pytest.raises(RankError, match="at least 0 bytes, got -1"):
        allocate({"a": 1.0}, {"a": 1}, -1, [1], {"a": 1})
    for gain in (math.nan, math.inf, -1.0):
        with pytest.raises(RankError, match="gain at a"):
            allocate({"a": gain}, {"a": 1}, 1, [1], {"a": 1})
    with pytest.raises(RankError, match="1 byte a rank at a, got 0"):
        allocate({"a": 1.0}, {"a": 0}, 1, [1], {"a": 1})
    with pytest.raises(RecipeError, match=r"plan\.levels.*got none"):
        allocate({"a": 1.0}, {"a": 1}, 1, [], {"a": 1})


@pytest.mark.parametrize(
    ("levels", "told"),
    [
        ([], "got none"),
        ([4, 2], "got 4 before 2"),
        ([1, 2, 2], "got 2 twice"),
        ([0, 1], "got 0 in"),
        ([-4], "got -4 in"),
        ([1.5], "got 1.5 in"),
        ([True, 2], "got True in"),
        ("124", "got '124'"),
    ],
)
def test_levels_are_whole_rising_and_each_once(levels, told):
    with pytest.raises(RecipeError, match=f"my.levels: .*{told}"):
        checked_rank_choices(levels, "my.levels")


def test_good_levels_come_back_as_they_are():
    assert checked_rank_choices([1, 3, 200]) == (1, 3, 200)


def test_derived_levels_are_powers_of_two_up_to_what_the_richest_can_spend():
    unit, limit = {"a": 1, "b": 1}, {"a": 64, "b": 64}
    assert derived_rank_choices([2, 22], unit, limit) == (1, 2, 4, 8, 16)  # 11 each, so up to 16
    assert derived_rank_choices([16], unit, limit) == (1, 2, 4, 8)  # 8 each exactly
    assert derived_rank_choices([10**6], unit, limit) == (1, 2, 4, 8, 16, 32, 64)
    assert derived_rank_choices([10**6], unit, {"a": 48, "b": 20}) == (1, 2, 4, 8, 16, 32)
    assert derived_rank_choices([1, 0], unit, limit) == (1,)


def test_with_derived_levels_the_richest_client_can_spend_its_budget():
    """Less is left over than one step between levels costs."""
    unit, limit = {f"s{i}": 7 for i in range(10)}, {f"s{i}": 512 for i in range(10)}
    gain = {site: 1.0 + i for i, site in enumerate(unit)}
    for budget in range(70, 2000, 61):
        levels = derived_rank_choices([budget], unit, limit)
        ranks = allocate(gain, unit, budget, levels, limit)
        assert budget - sum(7 * rank for rank in ranks.values()) < 7 * max(1, levels[-1] // 2)


def test_levels_cannot_be_derived_from_nothing():
    with pytest.raises(RecipeError, match=r"plan\.levels.*without a client and a site"):
        derived_rank_choices([], {"a": 1}, {"a": 1})


def test_ranks_go_where_they_keep_most_energy_per_byte():
    sigma = {"a": [3.0, 1.0], "b": [2.0, 2.0, 0.0]}
    unit = {"a": 4, "b": 2}  # energy per byte: a 2.25, 0.25; b 2, 2, 0
    assert spectrum(sigma, unit, 4) == {"a": 1, "b": 0}
    assert spectrum(sigma, unit, 8) == {"a": 1, "b": 2}
    assert spectrum(sigma, unit, 11) == {"a": 1, "b": 2}  # what keeps nothing is not taken
    assert spectrum(sigma, unit, 12) == {"a": 2, "b": 2}
    assert spectrum(sigma, unit, 3) == {"a": 0, "b": 1}  # the first does not fit, the next does


def test_the_floor_comes_first_and_lets_unseen_directions_grow():
    sigma: dict[str, list[float]] = {"a": [3.0, 2.9], "b": [], "c": [0.0, 0.0]}
    unit = {"a": 1, "b": 1, "c": 1}
    assert spectrum(sigma, unit, 4, floor=1) == {"a": 2, "b": 1, "c": 1}
    assert spectrum(sigma, unit, 2, floor=1) == {"a": 1, "b": 1, "c": 0}
    assert spectrum(sigma, unit, 9, floor=2, limit={"a": 8, "b": 1, "c": 8}) == {
        "a": 2,
        "b": 1,
        "c": 2,
    }


def test_spectra_that_cannot_be_are_refused_by_site():
    for values in ([1.0, 2.0], [math.nan], [-1.0], [math.inf]):
        with pytest.raises(RankError, match="singular values at a"):
            spectrum({"a": values}, {"a": 1}, 1)
    with pytest.raises(RankError, match="at least 0, got -1 and 0"):
        spectrum({"a": [1.0]}, {"a": 1}, -1)
    with pytest.raises(RankError, match="1 byte a rank at a"):
        spectrum({"a": [1.0]}, {"a": 0}, 1)


def _up(limit: int) -> dict[str, int]:
    return dict.fromkeys("abcd", limit)
