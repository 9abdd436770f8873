import ast
import subprocess
import sys
from pathlib import Path

import pytest

import polyrank
import polyrank.cli


def test_every_public_name_can_be_had_and_tells_what_it_is() -> None:
    for name in polyrank.__all__:
        assert getattr(polyrank, name).__doc__, name


def test_the_listed_names_are_those_that_can_be_had() -> None:
    lazy = [name for names in polyrank._HOMES.values() for name in names]
    assert sorted(lazy) == sorted(polyrank.__all__)
    assert len(set(lazy)) == len(lazy)
    public = {name for name in dir(polyrank) if not name.startswith("_")}
    modules = {path.stem for path in Path(polyrank.__path__[0]).iterdir()}
    machinery = {"Any", "TYPE_CHECKING", "import_module"}
    assert public - modules - machinery == set(polyrank.__all__)


def test_type_checkers_see_the_same_names_from_the_same_places() -> None:
    tree = ast.parse(Path(polyrank.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        str(line.module).removeprefix("polyrank."): tuple(alias.name for alias in line.names)
        for line in block.body
        if isinstance(line, ast.ImportFrom)
    }
    assert typed == polyrank._HOMES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Flexlora'"):
        _ = polyrank.Flexlora


@pytest.mark.parametrize("package", ["aggregation", "algebra", "config", "data", "federation"])
def test_every_name_that_a_package_lists_is_there(package: str) -> None:
    module = getattr(__import__(f"polyrank.{package}"), package)
    assert sorted(module.__all__) == sorted(set(module.__all__))
    for name in module.__all__:
        assert getattr(module, name) is not None


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
