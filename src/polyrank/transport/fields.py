"""The variable fields of a frame: checked before they are written and after they are read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyrank.codecs import octets
from polyrank.data.collate import IGNORED
from polyrank.errors import FrameError


def check_count(value: int, place: str) -> None:
    """Refuse what no unsigned 32-bit field can hold."""
    if not 0 <= value < 2**32:
        raise FrameError(f"{place}: expected a count of 0 to 2^32 - 1; {value} came")


def write_text(text: str, longest: int, place: str) -> bytes:
    """Return a text of 1 to `longest` bytes in UTF-8."""
    try:
        written = text.encode()
    except UnicodeEncodeError as error:
        raise FrameError(f"{place}: expected text that UTF-8 can hold; {text!r} came") from error
    if not 0 < len(written) <= longest:
        raise FrameError(f"{place}: expected 1 to {longest} bytes; {len(written)} came")
    return written


def read_text(view: memoryview, what: str) -> str:
    """Return the text that UTF-8 bytes hold."""
    try:
        return str(view, "utf-8")
    except UnicodeDecodeError as error:
        raise FrameError(f"frame, {what}: expected UTF-8; other bytes came") from error


def check_numbers(first: float, second: float, place: str) -> None:
    """Refuse numbers that are not finite, and a negative squared norm."""
    if not (math.isfinite(first) and math.isfinite(second)):
        raise FrameError(f"{place}: expected finite numbers; {first} and {second} came")
    if second < 0:
        raise FrameError(f"{place}: expected a squared norm of 0 or more; {second} came")


def shape(states: Tensor, place: str) -> tuple[int, int]:
    """Return (P, d) of states; refuse what is no matrix of real numbers."""
    if states.dim() != 2 or not states.is_floating_point() or 0 in states.shape:
        raise FrameError(
            f"{place}: expected states of tokens×width real numbers; {tuple(states.shape)} of "
            f"{states.dtype} came"
        )
    return states.shape[0], states.shape[1]


def check_lengths(lengths: tuple[int, ...], rows: int, place: str) -> None:
    """Refuse lengths that do not add up to the tokens of the frame, or empty rows."""
    if not all(length > 0 for length in lengths) or sum(lengths) != rows:
        raise FrameError(
            f"{place}: expected lengths of 1 or more that add up to {rows} tokens; "
            f"{len(lengths)} came that add up to {sum(lengths)}"
        )


def write_labels(labels: Tensor, rows: int, place: str) -> memoryview:
    """Return P labels as int32."""
    if labels.shape != (rows,) or labels.is_floating_point() or labels.is_complex():
        raise FrameError(
            f"{place}: expected {rows} labels, whole numbers; {tuple(labels.shape)} of "
            f"{labels.dtype} came"
        )
    labels = labels.detach().to("cpu", torch.int64)
    if int(labels.max()) >= 2**31:
        raise FrameError(f"{place}: expected labels below 2^31; {int(labels.max())} came")
    _tokens(labels, place)
    return octets(labels.to(torch.int32))


def read_labels(view: memoryview, rows: int, place: str) -> Tensor:
    """Return P labels as int64."""
    written = torch.empty(rows, dtype=torch.int32)
    octets(written)[:] = view
    _tokens(written, place)
    return written.long()


def _tokens(labels: Tensor, place: str) -> None:
    wrong = (labels < 0) & (labels != IGNORED)
    if bool(wrong.any()):
        raise FrameError(
            f"{place}: expected labels of 0 or more, or {IGNORED} without loss; "
            f"{int(labels[wrong][0])} came"
        )
