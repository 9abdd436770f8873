"""Sentences on a split model: who runs which blocks, and who sees which data."""

from __future__ import annotations

from collections.abc import Iterable

from polyrank.planning import CutPoint
from polyrank.training.split import SplitSettings


def hosted(cut: CutPoint | None, blocks: int) -> str:
    """Return which blocks of a model a client runs itself, e.g. ``blocks 0–1 of 4``."""
    if cut is None:
        return "whole"
    below = "block 0" if cut.lower == 1 else f"blocks 0–{cut.lower - 1}"
    if cut.upper is None:
        return f"{below} of {blocks}"
    last = f"{cut.upper}" if cut.upper == blocks - 1 else f"{cut.upper}–{blocks - 1}"
    return f"blocks {below.split()[1]} and {last} of {blocks} (U)"


def leaks(cuts: Iterable[CutPoint], settings: SplitSettings) -> str | None:
    """Return what the server learns of split clients, in a sentence; None if nobody is cut."""
    shapes = {cut.upper is not None for cut in cuts}
    if not shapes:
        return None
    labels = {
        (False,): "and the labels",
        (True,): "while the labels stay with the clients",
        (False, True): "and the labels of all but the clients in a U-shape",
    }[tuple(sorted(shapes))]
    what = "the tails" if shapes == {False} else "the other blocks"
    noise = f" (with Gaussian noise σ={settings.noise:g}, which is no guarantee)"
    return (
        f"split: the server that trains {what} sees activations{noise if settings.noise else ''}, "
        f"from which most tokens can be recovered, {labels}; see docs/explanation/privacy.md"
    )
