"""Where the shared kit of real data and small models is, for tests that need it."""

from pathlib import Path

import pytest

KIT = Path(__file__).resolve().parents[2] / "shared" / "kit"


def kit_path(*parts: str) -> Path:
    """Return a path inside the kit, or skip the test that asks where there is no kit."""
    path = KIT.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"the kit has no {'/'.join(parts)} beside this checkout")
    return path
