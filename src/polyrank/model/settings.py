"""Settings of the model: source, device, and the matrices that are adapted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from polyrank.sample import MODEL, SAMPLE
from polyrank.settings import Expected, OneOf, check

if TYPE_CHECKING:
    from polyrank.model.load import LoadedModel
    from polyrank.model.span import Span

DTYPE_NAMES = ("float32", "bfloat16", "float64")
"""The number formats that a base may have, by torch's names."""

Names = Annotated[str | list[str], Expected("a string or a list of strings")]


@dataclass(frozen=True)
class ModelSettings:
    """Which model, where it runs, and which of its matrices are adapted."""

    source: str
    """A hub id or a folder (seen from the recipe's folder, then from here); `sample` is the
    embedded miniature."""
    revision: str | None = None
    """A hub model's branch, tag or commit."""
    device: str = "auto"
    """`auto` (cuda, else mps, else cpu) or a torch device such as `cuda:1`."""
    dtype: Annotated[str, OneOf(DTYPE_NAMES)] = "float32"
    """Number format of the base; adapters are float32, or float64 on a float64 base."""
    sites: Names = "all-linear"
    """The adapted matrices: `all-linear` (all of the blocks), or names such as `q_proj`."""
    exclude: list[str] = field(default_factory=list)
    """Names or globs of matrices to leave out."""
    groups: dict[str, list[str]] | None = None
    """Which names count as `attention` and as `feed-forward`, where module paths do not tell."""
    checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""

    def __post_init__(self) -> None:
        check(self, "model")

    def load(self, spans: Sequence[Span] | None = None) -> LoadedModel:
        """Load the model, or the blocks in `spans` alone."""
        from polyrank.model.load import load_model

        return load_model(spans=spans, device=self.device, **self.options())

    def load_bare(self) -> LoadedModel:
        """Load configuration and tokenizer alone: a model that can be planned for, not run."""
        from polyrank.model.anatomy import load_bare

        return load_bare(**self.options())

    def options(self) -> dict[str, Any]:
        """Return how the model is loaded wherever it is: all but the device."""
        options = asdict(self)
        del options["device"]
        return {**options, "source": str(MODEL) if self.source == SAMPLE else self.source}
