"""Bytes between a split client and its server, as the frames of split training take them."""

from __future__ import annotations

from dataclasses import dataclass

from polyrank.codecs import codec
from polyrank.planning.cut import CutPoint
from polyrank.planning.workload import Workload

FRAME = 60
"""Bytes of a frame beside its contents and the client's name: the head and the checksum."""


@dataclass(frozen=True)
class WireBytes:
    """Bytes from a client to the server, `up`, and back, `down`."""

    up: int = 0
    down: int = 0


@dataclass(frozen=True)
class Microbatch:
    """What the frames of one microbatch take, P tokens of width d in some rows.

    `activations` go up with labels and lengths, `gradients` come back for them. In a U-shape
    activations come back, `middle`, and gradients go up, as large as those that come down.
    """

    activations: int
    gradients: int
    middle: int


def microbatch(workload: Workload, hidden: int, *, labels: bool) -> Microbatch:
    """Return the bytes of a microbatch's frames without the client's name.

    The codec's bytes for P×d numbers, 4P for labels, 4 per row, and 60.
    """
    tokens = workload.batch * workload.length
    wire = codec(workload.wire)
    states = wire.activations.nbytes(tokens, hidden)
    back = wire.gradients.nbytes(tokens, hidden)
    return Microbatch(
        activations=FRAME + states + 4 * workload.batch + (4 * tokens if labels else 0),
        gradients=FRAME + back,
        middle=FRAME + states,
    )


def step_traffic(workload: Workload, hidden: int, cut: CutPoint | None) -> WireBytes:
    """Return the bytes of one optimizer step without the client's name in each frame.

    All microbatches, and `Step` with its answer. None for a whole client.
    """
    if cut is None:
        return WireBytes(0, 0)
    frames = microbatch(workload, hidden, labels=cut.upper is None)
    up, down = frames.activations, frames.gradients
    if cut.upper is not None:
        up, down = up + frames.gradients, down + frames.middle
    count = workload.accumulation
    return WireBytes(count * up + FRAME, count * down + FRAME)


def messages(workload: Workload, cut: CutPoint | None) -> int:
    """Return the messages of a step's microbatches in each direction."""
    if cut is None:
        return 0
    return workload.accumulation * (1 if cut.upper is None else 2)
