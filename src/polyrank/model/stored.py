"""Tensors in safetensors files, read into their own memory when they are asked for.

`safe_open` reads through a buffer as large as the tensor or maps the file, and either counts as
memory of the process while a model is loaded; here nothing is held but the tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, from byte `start` up to `stop`; ``stored[...]`` reads it."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def __getitem__(self, _: object) -> Tensor:
        """Return the whole tensor, whatever the index; OSError if the file ends within it."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        if tensor.nbytes != self.stop - self.start:
            raise OSError(f"{self.path.name} says two sizes for a tensor of shape {self.shape}")
        if not tensor.nbytes:
            return tensor
        space = tensor.reshape(-1).view(torch.uint8).numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            while space:
                count = file.readinto(space)
                if not count:
                    raise OSError(f"{self.path.name} ends within a tensor")
                space = space[count:]
        return tensor


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Return the tensors of a safetensors file by name, none of them read yet.

    The file begins with the length of its header in 8 bytes; the header is JSON. Raises OSError if
    the file is not of this format, ValueError if a tensor is of a kind that torch does not compute
    with here.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise OSError(f"{path.name} is not a whole safetensors file")
        header = json.loads(file.read(size))
    tensors: dict[str, Stored] = {}
    for name, about in header.items():
        if name != "__metadata__":
            if about["dtype"] not in _DTYPES:
                raise ValueError(f"{name} is stored as {about['dtype']}, not one of {[*_DTYPES]}")
            start, stop = (8 + size + offset for offset in about["data_offsets"])
            dtype, shape = _DTYPES[about["dtype"]], tuple(about["shape"])
            tensors[name] = Stored(path, dtype, shape, start, stop)
    return tensors
