"""What the contract suites expect of every rule: one row a name of the registry.

@pytest.mark.parametrize("name", RULES)         # every rule
ROWS[name].asks, ROWS[name].idle_is_still, …    # what is expected of it
"""

from dataclasses import dataclass

from polyrank.aggregation import RULES, Rule, SLoRA


@dataclass(frozen=True)
class Row:
    """What a rule's assignments ask of training, and what holds of its rounds.

    `asks` has ``factors``, ``dense``, ``sparse``, ``frozen``, ``merged``, ``B alone`` and
    ``penalty``, as far as they occur in three rounds. `idle_is_still` says whether rounds in which
    nobody trains leave the adapter as it is. `excludes` are the keys of the rule's own `excludes`.
    """

    asks: frozenset[str] = frozenset({"factors"})
    idle_is_still: bool = True
    excludes: frozenset[str] = frozenset()


def _row(
    *more: str, idle_is_still: bool = True, excludes: str = "", trains: str = "factors"
) -> Row:
    return Row(frozenset({trains, *more}), idle_is_still, frozenset(excludes.split()))


ROWS = {
    "flexlora": _row(idle_is_still=False),
    "flexlora:delta": _row(),
    "flexlora:tail-in-base": _row("frozen"),
    "raflora": _row(),
    "fedit": _row(),
    "hetlora": _row("penalty", idle_is_still=False, excludes="shared"),
    "segment": _row(),
    "ffa": _row("B alone", excludes="slora"),
    "ffa:replace": _row("B alone", idle_is_still=False, excludes="slora"),
    "flora": _row("merged", excludes="slora"),
    "flora:keep": _row("merged", "frozen", excludes="slora shared"),
    "full": _row(trains="dense", excludes="slora"),
}

SPARSE_FIRST = [SLoRA(rule, 9) for name, rule in RULES.items() if "slora" not in rule.excludes]
"""Every rule that SLoRA goes with, in its sparse stage for nine rounds."""


def named(rule: Rule) -> str:
    """Return a rule's name, for the ids of tests."""
    return rule.name
