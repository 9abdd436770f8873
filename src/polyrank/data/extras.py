"""Optional packages, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from polyrank.errors import DataError


def need(module: str) -> Any:
    """Return the module of the extra ``polyrank[data]``; DataError saying how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"this source needs {module.partition('.')[0].replace('_', '-')}, which "
            f"cannot be imported ({error}); install it with: pip install 'polyrank[data]'"
        ) from error
