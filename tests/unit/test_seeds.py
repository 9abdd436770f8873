"""Seeds: every part matters, and so does where it stands."""

import itertools

import torch

from polyrank.seeds import derive, generator


def test_every_part_its_kind_and_its_place_matter():
    keys = [(), (1,), ("1",), (1, 2), (2, 1), ("12",), ("1", "2"), ("ab", "c"), ("a", "bc"), ("",)]
    seeds = [derive(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive(0, 3, 1, "client", "train") == derive(0, 3, 1, "client", "train")


def test_seeds_are_the_same_on_every_machine_and_day():
    # Written down once: another value would silently change every run.
    assert derive(0, 1, 0, "c0", "train") == 8150712101955937919


def test_close_parts_give_seeds_that_have_nothing_in_common():
    seeds = [derive(0, number, "deal") for number in range(200)]
    differing = [bin(a ^ b).count("1") for a, b in itertools.pairwise(seeds)]
    # 63 fair coins: 31.5 on average, with a standard error of 0.28 over 199 pairs.
    assert abs(sum(differing) / len(differing) - 31.5) < 1.5


def test_generators_of_the_same_parts_draw_the_same_and_leave_the_global_one_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, other, third = generator("a", 1), generator("a", 1), generator("a", 2)
    draws = [torch.rand(3, generator=g) for g in (one, other, third)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(before, torch.get_rng_state())
