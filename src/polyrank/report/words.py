"""Numbers and places as words."""

from __future__ import annotations

from pathlib import Path


def number(value: float | None, digits: int, sign: str = "") -> str:
    """Return a score as text, or a dash where it was not measured."""
    return "–" if value is None else f"{value:{sign}.{digits}f}"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, e.g. ``1 round`` or ``2 rounds``."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or f'{noun}s'}"


def operations(count: float) -> str:
    """Return a number of floating-point operations, e.g. ``791 GFLOP``."""
    prefix = next((p for p in ("M", "G", "T", "P") if count < 1000 * _SCALES[p]), "E")
    return f"{count / _SCALES[prefix]:.3g} {prefix}FLOP"


_SCALES = {"M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}


def duration(seconds: float) -> str:
    """Return a length of time, e.g. ``42 s`` or ``1 h 03 min``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def loading(adapter: Path) -> str:
    """Return where the adapter lies and the lines that load it."""
    return (
        f"adapter: {adapter}\n"
        "  from peft import AutoPeftModelForCausalLM\n"
        f'  model = AutoPeftModelForCausalLM.from_pretrained("{adapter}")'
    )
