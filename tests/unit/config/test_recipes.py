import re
import tomllib
from pathlib import Path

import pytest

from polyrank import config
from polyrank.config.reading import SHIPPED
from polyrank.config.reference import page

ROOT = Path(__file__).parents[3]
RECIPES = list(SHIPPED.values())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_ours_is_valid_and_named_after_its_file(path: Path) -> None:
    assert config.read(path).name == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_ours_begins_with_what_it_is(path: Path) -> None:
    assert path.read_text(encoding="utf-8").splitlines()[1].startswith("# ")
    assert "fleet" in tomllib.loads(path.read_text(encoding="utf-8"))


def test_every_recipe_is_named_in_the_docs() -> None:
    page = ROOT / "docs" / "reference" / "shipped-recipes.md"
    rows = re.findall(r"^\| (`.*?`) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(re.findall(r"`([\w-]+)`", " ".join(rows))) == sorted(SHIPPED)


def test_the_page_marks_values_as_code_and_leaves_apostrophes() -> None:
    assert "| one of `adamw`, `sgd` |" in page()
    assert "a family's name or a table" in page()


def test_the_page_of_all_keys_is_up_to_date() -> None:
    """Made by ``python -m polyrank.config.reference > docs/reference/recipes.md``."""
    assert (ROOT / "docs" / "reference" / "recipes.md").read_text(encoding="utf-8") == page()
