import importlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import polyrank

EAGER = ("aggregation", "algebra", "data")
"""Packages that import their names at once: a submodule may have the name of what is in it."""

PACKAGES = (
    "",
    *EAGER,
    "compare",
    "evaluation",
    "model",
    "planning",
    "report",
    "rounds",
    "run",
    "training",
    "training.split",
)


def test_every_public_name_can_be_had_and_tells_what_it_is() -> None:
    for name in polyrank.__all__:
        assert getattr(polyrank, name).__doc__, name


def test_the_version_is_that_of_the_installed_package() -> None:
    assert polyrank.__version__ == metadata.version("polyrank")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_that_a_package_lists_is_there_and_no_submodule_hides_it(package: str) -> None:
    module = importlib.import_module(f"polyrank.{package}" if package else "polyrank")
    names = module.__all__
    assert sorted(names) == sorted(set(names))
    for name in names:
        if name != "__version__":
            assert not isinstance(getattr(module, name), ModuleType), name
    modules = {path.stem for path in Path(module.__path__[0]).iterdir()}
    assert not modules & {*names} or package in EAGER


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Flexlora"):
        _ = polyrank.Flexlora


def test_help_and_import_do_without_torch() -> None:
    code = (
        "import sys, polyrank, polyrank.cli\n"
        "try: polyrank.cli.main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "KEY=VALUE" in done.stdout
