"""JSON Schemas of a recipe and of client.toml, for editors: ``python -m polyrank.config.schema``.

A TOML file names its schema in its first line, ``#:schema PATH``, which Taplo and the editors that
use it (Even Better TOML) read: a path seen from the file, or a URL.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from polyrank.config.client import ClientSettings
from polyrank.config.keys import keys_of
from polyrank.config.recipe import Recipe

FOLDER = Path(__file__).parents[1] / "schemas"
SCHEMAS = {"recipe": Recipe, "client": ClientSettings}
"""The files of FOLDER, without their ending, and the settings that they describe."""

_LINK = re.compile(r"\[([^]]*)\]\([^)]*\)")

DRAFT = "http://json-schema.org/draft-07/schema#"
"""The newest draft that Taplo knows."""


def schema(name: str) -> str:
    """Return a schema of `SCHEMAS` as JSON text, made from the settings."""
    kind = SCHEMAS[name]
    made = _plain(TypeAdapter(kind).json_schema())
    _describe(made, kind, made["$defs"])
    return json.dumps({"$schema": DRAFT, **made}, indent=1, ensure_ascii=False) + "\n"


def directive(name: str) -> str:
    """Return the line by which a file anywhere on this machine names its schema."""
    return f"#:schema {(FOLDER / f'{name}.json').as_uri()}"


def _describe(made: dict[str, Any], kind: type, definitions: dict[str, Any]) -> None:
    """Set the texts of keys and sections, which stand below the fields of the classes."""
    for name, key in keys_of(kind).items():
        entry = made["properties"][name]
        if key.section is None:
            entry["description"] = _LINK.sub(r"\1", key.meaning)
            continue
        inner = definitions[key.section.__name__]
        text = " ".join((key.section.__doc__ or "").split("\n\n")[0].split())
        inner["description"] = _LINK.sub(r"\1", text)
        _describe(inner, key.section, definitions)


def _plain(made: Any) -> Any:
    """Leave out what does not apply to a TOML file: titles, and null, which TOML lacks."""
    if isinstance(made, list):
        return [_plain(item) for item in made]
    if not isinstance(made, dict):
        return made
    node = {
        key: _plain(item)
        for key, item in made.items()
        if not (key == "title" and isinstance(item, str))
        and not (key == "default" and item is None)
    }
    options = [item for item in node.get("anyOf", ()) if item != {"type": "null"}]
    if len(options) == 1:
        del node["anyOf"]
        return options[0] | node
    return node | {"anyOf": options} if options else node


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for known in SCHEMAS:
        (FOLDER / f"{known}.json").write_text(schema(known), encoding="utf-8")
