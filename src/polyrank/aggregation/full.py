"""Full fine-tuning: the adapted matrices themselves are trained and averaged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from polyrank.aggregation.incoming import checked_finite, checked_fleet, weighed
from polyrank.aggregation.rule import Rule
from polyrank.aggregation.types import Contribution, FleetSpec, SiteAssignment, SiteReport, State
from polyrank.algebra import Adapter, Delta, Dense
from polyrank.errors import SiteError, UpdateError
from polyrank.lazy_torch import torch


@dataclass(frozen=True)
class Full(Rule):
    """Train every entry of the adapted matrices, and average: D⁺ = Σ w_i D_i (FedAvg).

    W + D is trained by training D alone, from the last round's: the gradients are those of W. With
    one client this is ordinary fine-tuning. Ranks only say which sites a client trains. Nothing is
    cut: the adapter is D, and factors of it are made at export, which reports the loss.

    *What is not trained.* Embeddings, norms, biases and the output embedding stay as they are, and
    so does a matrix that is not among the model's sites [I]: papers' full fine-tuning trains all
    parameters. The result is thus an update of the same matrices that every other rule changes.
    *Weight decay* pulls D to zero, which is the loaded base, where ordinary fine-tuning pulls the
    weights themselves to zero [I].

    A client holds D, its gradient and its optimizer's moments, m·n numbers of each at every site;
    D travels whole in both directions.

    State: ``site/dense`` m×n, float32 or wider; zero at the start.

    Source: McMahan et al., arXiv 1602.05629, on the weights of a language model.
    """

    @property
    def name(self) -> str:
        """``full``."""
        return "full"

    @property
    def excludes(self) -> Mapping[str, str]:
        """SLoRA."""
        return {"slora": "every entry is trained in all rounds, so there are no factors to start"}

    def init(self, spec: FleetSpec) -> State:
        """Return D = 0 at every site; SiteError or RankError for ranks that do not fit."""
        checked_fleet(self.name, spec)
        return State({_key(site): torch.zeros(shape) for site, shape in spec.shapes.items()})

    def assign_site(
        self, state: State, site: str, rank: int, scale: float, seed: int
    ) -> SiteAssignment:
        """Return D, whatever the rank."""
        return SiteAssignment(_server_sum(self.name, state, site))

    def merge_site(
        self, state: State, site: str, contributions: Iterator[Contribution]
    ) -> tuple[State, SiteReport]:
        """Return the state with D averaged at this site, summed in float64."""
        server = _server_sum(self.name, state, site)
        total, dtype = torch.zeros(server.shape, dtype=torch.float64), server.matrix.dtype
        for place, contribution in weighed(self.name, site, contributions):
            result = _checked(place, server, contribution.result)
            total.add_(result.matrix.double(), alpha=contribution.weight)
            dtype = torch.promote_types(dtype, result.matrix.dtype)
        new = Dense(total.to(dtype))
        report = SiteReport(energy=new.norm() ** 2, discarded=0.0)
        return state.update({_key(site): new.matrix}), report

    def adapter(self, state: State) -> Adapter[Delta]:
        """Return D at every site, dense."""
        sites = [name.removesuffix(_SUFFIX) for name in state.tensors if name.endswith(_SUFFIX)]
        return Adapter({site: _server_sum(self.name, state, site) for site in sites})


_SUFFIX = "/dense"


def _key(site: str) -> str:
    return f"{site}{_SUFFIX}"


def _server_sum(rule: str, state: State, site: str) -> Dense:
    try:
        return Dense(state.tensors[_key(site)])
    except KeyError:
        raise SiteError(f"{rule}: no site {site!r} in the state") from None


def _checked(place: str, server: Dense, result: Delta) -> Dense:
    """Return what came back, or raise UpdateError."""
    if not isinstance(result, Dense) or result.shape != server.shape:
        raise UpdateError(
            f"{place}: expected a dense update of {server.shape}, got {type(result).__name__} of "
            f"{result.shape}"
        )
    checked_finite(place, result)
    return result
