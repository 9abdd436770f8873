"""Packets: tensors and JSON in one block of bytes, which is a safetensors file.

A packet is, as safetensors has it: the header's length (u64, little-endian), the header (JSON, with
type, shape and place of every tensor), the tensors' bytes without gaps. The header's
``__metadata__`` holds

    polyrank   the version that wrote it
    schema     the version of this layout
    packet     what it is: order, answer, profile, exam, marks
    fields     all that is no tensor, as JSON

Both directions are written here and not left to safetensors: its `save` refuses tensors that share
memory and its `load` first makes a copy of everything that a packet claims to hold. Here each byte
is copied once, into memory aligned as torch allocates it (kernels may round differently on other
memory), and only after names, types, shapes and places have been compared with the length and with
what is expected. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Mapping
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyrank.codecs import octets
from polyrank.errors import PacketError
from polyrank.protocol import json_fields as reading
from polyrank.protocol.json_fields import Fields, refusal, shown
from polyrank.protocol.size_limits import SizeLimits

SCHEMA = "1"
"""Version of the layout; another one is refused."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = 8
_DIMENSION = 2**31


_WORDS = {
    "order": "train request",
    "answer": "train result",
    "profile": "registration",
    "exam": "evaluate request",
    "marks": "client metrics",
}
"""What errors call a kind of packet, which keeps its first name on the wire."""


def _called(kind: str) -> str:
    return f"{_WORDS.get(kind, kind)} packet"


class _Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def pack(kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """Return a packet; PacketError for numbers that are not finite, and for odd texts and dtypes.

    Tensors lie in the order of safetensors: those of wide numbers first, then by name.
    """
    place = _called(kind)
    _check_machine(place)
    header: dict[str, Any] = {
        "__metadata__": {
            "polyrank": metadata.version("polyrank"),
            "schema": SCHEMA,
            "packet": kind,
            "fields": _dumped(fields, place),
        }
    }
    parts, end = [], 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name].detach().cpu().contiguous()
        if tensor.dtype not in _NAMES:
            raise refusal(f"{place}, tensor {name!r}", f"one of {[*DTYPES]}", tensor.dtype)
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
        if tensor.numel():  # flattened by hand: axes of length one keep odd strides through views
            parts.append(octets(tensor.as_strided((tensor.numel(),), (1,))))
    text = _dumped(header, place).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(_LENGTH, "little"), text, *parts])


def _dumped(value: object, place: str) -> str:
    """Return compact JSON that UTF-8 can hold."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise refusal(place, "finite numbers and text that UTF-8 can hold", error) from error
    return text


class Packet:
    """A packet that came: its fields, and its tensors, none of which is copied before it is asked.

    Raises PacketError for everything that no `pack` of this kind wrote under these limits.
    """

    def __init__(self, data: bytes | bytearray | memoryview, kind: str, limits: SizeLimits):
        self.place = _called(kind)
        _check_machine(self.place)
        try:
            view = memoryview(data).cast("B").toreadonly()
        except (TypeError, BufferError) as error:
            raise refusal(self.place, "bytes", type(data).__name__) from error
        size = len(view)
        if not _LENGTH <= size <= limits.nbytes:
            raise refusal(f"{self.place}, length", f"{_LENGTH} to {limits.nbytes} bytes", f"{size}")
        length = int.from_bytes(view[:_LENGTH], "little")
        most = min(limits.header, size - _LENGTH)
        if length > most:
            raise refusal(f"{self.place}, length of the header", f"at most {most} bytes", length)
        self._data = view[_LENGTH + length :]
        header = self._header(view[_LENGTH : _LENGTH + length])
        self.fields = self._metadata(header.pop("__metadata__", None), kind)
        if len(header) > limits.tensors:
            raise refusal(f"{self.place}, tensors", f"at most {limits.tensors}", len(header))
        self._entries = {name: self._entry(name, about) for name, about in header.items()}
        self._check_offsets()
        self._left = set(self._entries)

    def _header(self, view: memoryview) -> dict[str, Any]:
        place = f"{self.place}, header"
        try:
            text = str(view, "utf-8")
        except UnicodeDecodeError as error:
            raise refusal(place, "UTF-8", "other bytes") from error
        header = reading.parse(text, place)
        if not isinstance(header, dict):
            raise refusal(place, "a table", shown(header))
        return header

    def _metadata(self, value: object, kind: str) -> Fields:
        about = Fields(value, f"{self.place}, metadata")
        version = about.text("polyrank", 64)
        schema = about.text("schema", 16)
        if schema != SCHEMA:
            raise refusal(
                about.at("schema"),
                f"{SCHEMA}, that of polyrank {metadata.version('polyrank')}",
                f"{schema!r} of polyrank {version!r}; install the same version on both sides: it",
            )
        about.choice("packet", [kind])
        inner = reading.text(about.take("fields"), about.at("fields"), sys.maxsize)
        about.close()
        return Fields(reading.parse(inner, about.at("fields")), self.place)

    def _entry(self, name: str, value: object) -> _Entry:
        place = f"{self.place}, tensor {shown(name)}"
        reading.text(name, place)
        about = Fields(value, place)
        dtype = DTYPES[about.choice("dtype", DTYPES)]
        axes, at = about.items("shape"), about.at("shape")
        if len(axes) > 2:
            raise refusal(at, "at most 2 axes", len(axes))
        shape = tuple(reading.whole(size, at, 0, _DIMENSION) for size in axes)
        offsets, at = about.items("data_offsets"), about.at("data_offsets")
        if len(offsets) != 2:
            raise refusal(at, "a beginning and an end", f"{len(offsets)} numbers")
        begin, end = (reading.whole(offset, at, 0, len(self._data)) for offset in offsets)
        if end - begin != math.prod(shape) * dtype.itemsize:
            expected = f"{math.prod(shape) * dtype.itemsize} bytes, by its shape"
            raise refusal(at, expected, end - begin)
        about.close()
        return _Entry(dtype, shape, begin, end)

    def _check_offsets(self) -> None:
        """Refuse tensors that overlap, gaps, and bytes after the last one."""
        end = 0
        for entry in sorted(self._entries.values(), key=lambda entry: (entry.begin, entry.end)):
            if entry.begin != end:
                raise refusal(
                    f"{self.place}, tensors", f"one that begins at byte {end}", f"{entry.begin}"
                )
            end = entry.end
        if end != len(self._data):
            raise refusal(f"{self.place}, tensors", f"{end} bytes in all", len(self._data))

    def names(self) -> list[str]:
        """Return the names of all tensors that nobody took yet, in order."""
        return sorted(self._left)

    def tensor(
        self, name: str, shape: tuple[int | None, ...], dtypes: Collection[torch.dtype]
    ) -> Tensor:
        """Return a tensor in memory of its own; None in `shape` is any length.

        Raises PacketError if it is missing, or of another shape or dtype.
        """
        place = f"{self.place}, tensor {name!r}"
        if name not in self._left:
            raise refusal(place, "a tensor", "none")
        entry = self._entries[name]
        fits = len(entry.shape) == len(shape) and all(
            asked in (None, came) for asked, came in zip(shape, entry.shape, strict=True)
        )
        if not fits:
            asked = "×".join("any" if size is None else str(size) for size in shape)
            raise refusal(place, f"a shape of {asked}", "×".join(map(str, entry.shape)) or "none")
        if entry.dtype not in dtypes:
            raise refusal(place, f"one of {[*map(_NAMES.get, dtypes)]}", _NAMES[entry.dtype])
        self._left.remove(name)
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        if tensor.numel():
            octets(tensor)[:] = self._data[entry.begin : entry.end]
        return tensor

    def close(self) -> None:
        """Refuse fields and tensors that nobody asked for."""
        self.fields.close()
        if self._left:
            raise refusal(f"{self.place}, tensors", "no other", shown(sorted(self._left)))


def _check_machine(place: str) -> None:
    if sys.byteorder != "little":
        raise PacketError(f"{place}: packets are little-endian; this machine is not")
