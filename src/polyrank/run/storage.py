"""Files that are whole or absent: atomic writes, factors and states as safetensors."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from polyrank.aggregation import State, Update
from polyrank.algebra import Adapter, Delta, from_tensors
from polyrank.errors import AdapterError, FactorError, ResourceError, RunError
from polyrank.lazy_torch import torch

_decode = json.JSONDecoder().raw_decode
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn 'disk full' inside the block into a ResourceError that names the path."""
    try:
        yield
    except (OSError, SafetensorError, AdapterError) as error:
        if is_full(error):
            raise _full(path, error) from error
        raise


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or the one that caused it, says that the disk is full."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    if isinstance(error, SafetensorError):  # It hides the errno in its text.
        return any(os.strerror(code) in str(error) for code in _FULL)
    return error is not None and is_full(error.__cause__)


def _full(path: Path, error: Exception) -> ResourceError:
    free = shutil.disk_usage(existing(path)).free
    return ResourceError(
        f"{path}: could not be written ({error}); {free / 2**20:.0f} MiB are free. Nothing that "
        "was saved before is lost: make room, then `polyrank resume`"
    )


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next((p for p in (path, *path.absolute().parents) if p.exists()), Path.cwd())


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old one or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
        sync(path.parent)


def write_json(path: Path, value: object) -> None:
    """Write indented JSON atomically."""
    write_text(path, to_json(value))


def to_json(value: object) -> str:
    """Return indented JSON; ValueError for NaN and infinity, since JSON has none."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file atomically."""
    from safetensors.torch import save_file  # It imports torch.

    partial = path.with_name(f".{path.name}.partial")
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with disk_errors(path):
        save_file(ready, partial, dict(metadata))
        sync(partial)
        partial.replace(path)


def remove(path: Path) -> None:
    """Delete a file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_update(path: Path, update: Update) -> None:
    """Persist an update: its tensors as ``site|name``, all else as JSON metadata."""
    tensors = {
        f"{site}|{name}": tensor
        for site, delta in update.adapter.items()
        for name, tensor in delta.tensors().items()
    }
    head = {
        "client": update.client,
        "round": update.round,
        "attempt": update.attempt,
        "assignment": update.assignment,
        "examples": update.examples,
        "metrics": dict(update.metrics),
        **({"importance": dict(update.importance)} if update.importance else {}),
    }
    metadata = {"update": json.dumps(head), "factors": update.adapter.hash()}
    write_tensors(path, tensors, metadata)


def read_update(path: Path) -> Update:
    """Read what `write_update` wrote; RunError if the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            head = json.loads(file.metadata()["update"])
            names = _names_by_site(file)
            adapter = Adapter({site: _delta(file, site, names[site]) for site in names})
            if adapter.hash() != file.metadata()["factors"]:
                raise ValueError("its factors do not match their hash")
        return Update(adapter=adapter, **head)
    except (OSError, SafetensorError, FactorError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path}: not a readable update ({error}); delete it and resume") from error


def read_site(path: Path, site: str) -> Delta:
    """Read one site of a persisted update, and nothing else of the file.

    A run does this once per client, site and round, and `safe_open.get_tensor` (safetensors 0.8.0)
    never frees some bytes of each call: 14 MiB in 50 rounds of 80 clients. So the tensors are read
    from the format itself: the header's length in 8 bytes, the header as JSON, the data.
    """
    tensors = {}
    with path.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        for name, entry in _entries(file.read(begin - 8).decode(), site):
            start, stop = entry["data_offsets"]
            file.seek(begin + start)
            tensors[name] = _from_bytes(bytearray(file.read(stop - start)), **entry)
    if not tensors:
        raise KeyError(site)
    return from_tensors(tensors)


def _entries(header: str, site: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and entry of a site's tensors, leaving those of all other sites unparsed.

    Parsing the whole header for each site would take time that grows with the square of the sites.
    """
    opening = json.dumps(f"{site}|", ensure_ascii=False)[:-1]
    at = header.find(opening)
    while at >= 0:
        key, end = _decode(header, at)
        owner, _, name = key.rpartition("|")
        if owner == site and header[end] == ":":  # Otherwise it is a longer key, or within a text.
            yield name, _decode(header, end + 1)[0]
        at = header.find(opening, at + 1)


def _from_bytes(
    data: bytearray, dtype: str, shape: list[int], data_offsets: list[int]
) -> torch.Tensor:
    """Return a tensor of the safetensors format in memory of its own; see `_tensor`."""
    if len(data) < data_offsets[1] - data_offsets[0]:
        raise ValueError("the file ends within a tensor")
    kind = getattr(torch, _DTYPES[dtype])
    if not data:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(data, dtype=kind).reshape(shape).clone()


_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I32": "int32",
    "I64": "int64",
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}
"""Names of torch's dtypes by those of safetensors."""


def _names_by_site(file: safe_open) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for key in file.keys():  # noqa: SIM118
        site, name = key.rsplit("|", 1)
        names.setdefault(site, []).append(name)
    return names


def _delta(file: safe_open, site: str, names: Iterable[str]) -> Delta:
    return from_tensors({name: _tensor(file, f"{site}|{name}") for name in names})


def _tensor(file: safe_open, name: str) -> torch.Tensor:
    """Read a tensor into memory of its own, aligned as torch allocates it.

    Kernels may round differently on memory aligned as in a file, and a resumed run must not.
    """
    return file.get_tensor(name).clone()


def write_state(folder: Path, name: str, state: State) -> None:
    """Write a rule's state as ``name.safetensors`` (tensors) and ``name.json`` (scalars)."""
    write_tensors(folder / f"{name}.safetensors", state.tensors, {})
    write_json(folder / f"{name}.json", dict(state.scalars))


def read_state(folder: Path, name: str) -> State:
    """Read what `write_state` wrote."""
    with safe_open(folder / f"{name}.safetensors", "pt") as file:
        tensors = {key: _tensor(file, key) for key in file.keys()}  # noqa: SIM118
    return State(tensors, json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


def read_json(path: Path) -> Any:
    """Read a JSON file; RunError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: expected readable JSON: {error}") from error
