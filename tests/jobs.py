"""Random jobs for tests of local training."""

from collections.abc import Mapping

import torch

from models import VOCABULARY, random_adapter
from polyrank.aggregation.types import Assignment
from polyrank.data.types import Encoded
from polyrank.model import LoadedModel
from polyrank.training import Job, LocalTraining


def examples(count: int, *, seed: int = 0, shortest: int = 4, longest: int = 12) -> list[Encoded]:
    """Return rows of random tokens and lengths; the first two or three tokens are the prompt."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int = 1) -> tuple[int, ...]:
        return tuple(torch.randint(low, high, (size,), generator=generator).tolist())

    rows = []
    for i in range(count):
        length, prompt = *draw(shortest, longest + 1), *draw(2, 4)
        rows.append(Encoded(draw(4, VOCABULARY, length), prompt, prompt, i))
    return rows


def job(
    model: LoadedModel,
    client: str = "c",
    *,
    ranks: int | Mapping[str, int] = 2,
    scale: float = 2.0,
    count: int = 9,
    seed: int = 0,
    frozen: int = 0,
    local: LocalTraining | None = None,
) -> Job:
    """Return a job with a random start, `count` random examples and a frozen term of a rank."""
    start = random_adapter(model, ranks, seed=seed)
    assignment = Assignment(start, dict.fromkeys(start, scale))
    if frozen:
        fixed = random_adapter(model, frozen, seed=seed + 1000)
        assignment = Assignment(start, assignment.scale, fixed)
    return Job(client, assignment, examples(count, seed=seed), local or LocalTraining(), seed)


def by_group(model: LoadedModel, attention: int, feed_forward: int) -> dict[str, int]:
    """Return ranks per site, of attention and of feed-forward sites."""
    ranks = {"attention": attention, "feed-forward": feed_forward}
    return {site.name: ranks[site.group] for site in model.spec.sites}
