"""The pages of all keys: ``python -m polyrank.config.reference [client | app]``."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator

from polyrank.config.app import OWN, AppSettings
from polyrank.config.client import ClientSettings
from polyrank.config.keys import Key, all_keys, keys_of
from polyrank.config.recipe import Recipe
from polyrank.settings import bounds

HEAD = """\
# Recipes: every key

A recipe is a TOML file that says everything about a run. `[model]`, `[data]` and, but for planned
runs with the clients' own devices, `[fleet]` must be there; everything else has a default. Types
are strict: a whole number does for a number, a number in quotes does not. Unknown keys are errors
that name the nearest known one.

`polyrank run RECIPE key=value …` changes keys for one run: `local.lr=1e-3`,
`fleet.distribution=heavy-tail-light`, `'fleet.types={T1 = 4, T2 = 16}'`; `control=` (nothing behind
the sign) takes a key back to its default. Of `local.epochs` and `local.steps`, `sampling.fraction`
and `sampling.number`, `fleet.distribution` and `fleet.clients`, a recipe gives one; an override of
one takes the other back. The recipe as it was carried out, defaults written out, lies in the run's
folder as `recipe.toml`.

Recipes that come with polyrank are worked examples, and are called by name: `polyrank run
quickstart`. They lie in `src/polyrank/recipes/`. This page is made from the code by
`python -m polyrank.config.reference`.
"""

CLIENT_HEAD = """\
# client.toml: every key

In a deployment the owner of a client's machine says in this file where the data
lies, what the machine offers, and what it consents to. It stays on the machine, whose SuperNode is
started with its path:

```
flower-supernode … --node-config 'client="/data/client.toml"'
```

```toml
name = "hospital-a"

[data]
source = "notes.jsonl"          # beside this file

[device]                        # where the recipe plans ranks and cuts
profile = "jetson-orin-nano-8gb"
up = "20 Mbit/s"
down = "100 Mbit/s"

[limits]
largest_rank = 16
lowest_cut = 2
labels_may_leave = false
smallest_count = 20
```

The server is told the name, the category, how many examples there are and how long the longest is,
the device, the limits, and the versions of the libraries; never a text. The recipe of such a run
has `data.source = "client"`; what it says of fractions, template, length and limit holds for all
clients. A client's split into training, validation and test part depends on the recipe's seed, the
name and the examples alone, and is the one that it would have in a run with all data in one place.

Where the recipe has `[plan]` and gives no devices, ranks and cut are planned for the `[device]`
that is written here; devices that it gives in `fleet.distribution` or `fleet.clients` count
instead. Plans keep within `[limits]`, and whose device and limits leave no plan takes no part: the
server's log says why, and what would let it in. Ranks that a recipe gives without a plan are not
changed: what is beyond the limits is refused here.

Recipe and code come from the server's side: whoever may start runs on the SuperLink decides which
Flower app runs here. The limits bind polyrank's own app.

This page is made from the code by `python -m polyrank.config.reference client`.
"""

APP_HEAD = """\
# Flower apps: the keys of `app`

A Flower app that `polyrank app` writes has, beside the [recipe](recipes.md), these keys for the
server's side of a run. Give them when the app is written, `polyrank app quickstart quickstart-app
app.wait=60`, or for one run, `flwr run quickstart-app -c 'app.wait=60'`. What always holds can
be written into the app's `pyproject.toml`. `""` takes a key back to its default.
[Across machines](../how-to/deployment.md) shows them at work.

This page is made from the code by `python -m polyrank.config.reference app`.
"""

_QUOTED = re.compile(r"'([^' ]*)'")


def page() -> str:
    """Return the page of a recipe's keys as Markdown."""
    return _page(HEAD, Recipe)


def client_page() -> str:
    """Return the page of client.toml's keys as Markdown."""
    return _page(CLIENT_HEAD, ClientSettings)


def app_page() -> str:
    """Return the page of a Flower app's own keys as Markdown."""
    keys = ((name.replace("_", "-"), key) for name, key in all_keys(AppSettings, OWN))
    return "\n".join([APP_HEAD, *_rows(keys)]) + "\n"


def _page(head: str, root: type) -> str:
    parts = [head, "## At the top\n", *_table(root)]
    for name, key in keys_of(root).items():
        if key.section is not None:
            text = inspect.cleandoc(key.section.__doc__ or "").replace("``", "`")
            parts += [f"\n## [{name}]\n", f"{text}\n", *_table(key.section)]
    return "\n".join(parts) + "\n"


def _table(section: type) -> Iterator[str]:
    keys = keys_of(section).items()
    return _rows((name, key) for name, key in keys if key.section is None)


def _rows(keys: Iterable[tuple[str, Key]]) -> Iterator[str]:
    yield "| key | takes | default | |"
    yield "|---|---|---|---|"
    for name, key in keys:
        takes = _QUOTED.sub(r"`\1`", key.words).replace("|", "\\|")
        limits = f", {limits}" if (limits := bounds(key.annotation)) else ""
        yield f"| `{name}` | {takes}{limits} | {_default(key)} | {key.meaning} |"


def _default(key: Key) -> str:
    if key.required:
        return "**must be given**"
    value = key.default
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{[*value]}`" if isinstance(value, tuple) else f"`{value}`"


if __name__ == "__main__":
    pages = {"recipe": page, "client": client_page, "app": app_page}
    print(pages[sys.argv[1] if sys.argv[1:] else "recipe"](), end="")
