import pytest

from polyrank.compare.tuning import Trial, best, default_grid, edge, next_rate


def trials(*pairs: tuple[float, float | None]) -> list[Trial]:
    return [Trial(rate, loss) for rate, loss in pairs]


def test_the_grid_is_a_third_the_rate_and_three_times_it() -> None:
    assert default_grid(2e-3) == (0.00067, 2e-3, 0.006)
    assert default_grid(0.00123) == (0.00041, 0.00123, 0.0037)  # Its own rate is kept as it is.


def test_the_lowest_loss_is_best_and_the_smaller_rate_among_equals() -> None:
    assert best(trials((1.0, 3.0), (2.0, 1.0), (4.0, 2.0))) == Trial(2.0, 1.0)
    assert best(trials((4.0, 1.0), (2.0, 1.0))) == Trial(2.0, 1.0)


def test_a_rate_that_diverged_is_worse_than_any_loss() -> None:
    assert best(trials((1.0, 1e9), (2.0, None))) == Trial(1.0, 1e9)
    assert best(trials((1.0, None))) is None


@pytest.mark.parametrize(
    ("losses", "side", "further"),
    [
        ((1.0, 2.0, 3.0), "low", 0.05),  # From 0.1: the step there is 2.
        ((3.0, 2.0, 1.0), "high", 3.2),  # From 0.8: the step there is 4.
        ((2.0, 1.0, 3.0), None, None),
        ((2.0, 1.0, None), None, None),
        ((1.0, None, None), "low", 0.05),
        ((None, None, 1.0), "high", 3.2),
        ((None, None, None), "low", 0.05),
    ],
)
def test_the_grid_grows_at_the_edge_that_is_best(
    losses: tuple[float | None, ...], side: str | None, further: float | None
) -> None:
    tried = trials(*zip((0.1, 0.2, 0.8), losses, strict=True))
    assert edge(tried) == side
    assert next_rate(tried) == further
    assert next_rate(tried[::-1]) == further


def test_a_single_rate_is_no_grid_unless_it_diverged() -> None:
    assert (edge(trials((0.3, 1.0))), next_rate(trials((0.3, 1.0)))) == (None, None)
    assert next_rate(trials((0.3, None))) == 0.1
