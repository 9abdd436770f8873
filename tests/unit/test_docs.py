"""The documentation: nothing is missing from the site, and no mention of a page is out of date."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from markdown import Markdown

import polyrank

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BESIDE = sorted(ROOT.glob("*.md"))  # README.md and others outside the site
LINK = re.compile(r"\]\(([^)\s]+)\)")
SOURCES = ("src", "tests", "examples", "benchmarks")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    reader = Markdown(extensions=["toc", "fenced_code"])
    reader.convert(text_of(page))
    return set(re.findall(r"'id': '([^']+)'", str(reader.toc_tokens)))  # type: ignore[attr-defined]


def pages_of(nav: list | dict | str) -> set[str]:
    if isinstance(nav, str):
        return {nav}
    inner = nav.values() if isinstance(nav, dict) else nav
    return set().union(*(pages_of(entry) for entry in inner))


def test_every_page_is_in_the_sites_navigation() -> None:
    site = tomllib.loads(text_of(ROOT / "zensical.toml"))
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    records = {page for page in pages if re.search(r"decisions/\d{4}-", page)}
    assert pages_of(site["project"]["nav"]) == pages - records


def test_every_decision_is_in_their_list() -> None:
    folder = DOCS / "explanation" / "decisions"
    listed = LINK.findall(text_of(folder / "index.md"))
    assert listed == sorted(path.name for path in folder.glob("[0-9]*.md"))


def test_the_page_of_the_python_interface_has_every_public_name() -> None:
    listed = re.findall(
        r"^::: polyrank\.(?:\w+\.)*(\w+)$", text_of(DOCS / "reference/python.md"), re.M
    )
    assert sorted(listed) == sorted({*polyrank.__all__} - {"__version__"})


def test_the_page_of_the_command_line_is_up_to_date() -> None:
    """Made by ``make reference``."""
    command = [sys.executable, "-m", "typer", "polyrank.cli", "utils", "docs"]
    options = ["--name", "polyrank", "--title", "The command line"]
    made = subprocess.run([*command, *options], check=True, capture_output=True, text=True).stdout
    assert text_of(DOCS / "reference" / "command-line.md").rstrip() == made.rstrip()


@pytest.mark.parametrize("page", BESIDE, ids=lambda page: page.name)
def test_links_beside_the_site_lead_somewhere(page: Path) -> None:
    """Links within the site are checked by `make docs`."""
    for link in LINK.findall(text_of(page)):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_external_links_are_whole_and_encrypted() -> None:
    for page in [*BESIDE, *DOCS.rglob("*.md")]:
        for link in LINK.findall(text_of(page)):
            if ":" in link:
                assert re.fullmatch(r"https://[\w.-]+\.[a-z]+(/[^\s<>]*)?", link), (
                    f"{page.name}: {link}"
                )


def test_pages_that_code_and_recipes_mention_exist() -> None:
    files = [path for folder in SOURCES for path in (ROOT / folder).rglob("*")]
    files += [ROOT / "Makefile", ROOT / "pyproject.toml", *BESIDE, *DOCS.rglob("*.md")]
    files.remove(ROOT / "CHANGELOG.md")  # what was, under the names of its day
    read = [path for path in files if path.suffix in {".py", ".toml", ".md", ""} and path.is_file()]
    mentioned = {page for path in read for page in re.findall(r"\bdocs/[\w/-]+\.md", text_of(path))}
    assert mentioned
    assert sorted(page for page in mentioned if not (ROOT / page).is_file()) == []


def test_the_rooms_and_their_order_are_those_of_the_import_contract() -> None:
    contracts = tomllib.loads(text_of(ROOT / "pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = next(contract for contract in contracts if contract["type"] == "layers")["layers"]
    page = text_of(DOCS / "explanation" / "architecture.md")
    (order,) = re.findall(r"^```\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert order.splitlines() == layers
    rooms = [room for layer in layers for room in layer.split(" | ")]
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == rooms


def test_files_that_pages_mention_exist() -> None:
    pages = [page for page in BESIDE if page.name != "CHANGELOG.md"] + list(DOCS.rglob("*.md"))
    path = re.compile(
        r"\b((?:src/polyrank|tests|examples|benchmarks)/[\w/-]+\.(?:py|toml|proto))\b"
    )
    mentioned = {f"{page.name}: {file}" for page in pages for file in path.findall(text_of(page))}
    assert mentioned
    assert (
        sorted(line for line in mentioned if not (ROOT / line.partition(": ")[2]).is_file()) == []
    )
