"""Every command explains itself: what it does, each argument and option, and examples to copy."""

import re
import shlex

import click
import pytest
import typer

from polyrank.cli import app
from polyrank.config.reading import SHIPPED
from runs import polyrank, widest

GROUP = typer.main.get_command(app)
assert isinstance(GROUP, click.Group)
COMMANDS = GROUP.commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_and_option_has_a_text(name: str) -> None:
    assert COMMANDS[name].help
    for parameter in COMMANDS[name].params:
        text = getattr(parameter, "help", None)
        assert text, parameter.name
        assert text.endswith("."), text


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_fits_a_terminal_and_shows_what_it_says_of_arguments(name: str) -> None:
    done = polyrank(name, "--help")
    assert done.code == 0
    assert widest(done.out) <= 80
    told = " ".join(re.sub("[│╭╮╰╯─]", " ", done.out).split())
    for parameter in COMMANDS[name].params:
        assert " ".join(parameter.help.split())[:25] in told  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_parse(name: str) -> None:
    """Each is a command line of the program, on recipes that come with polyrank."""
    _, *lines = (COMMANDS[name].epilog or "").split("\n\n")
    assert lines
    for line in lines:
        program, command, *arguments = shlex.split(line)
        assert (program, command) == ("polyrank", name)
        context = COMMANDS[name].make_context(name, arguments)
        recipe = context.params.get("recipe")
        if name == "init" or recipe is None:  # The recipe of init is the file to write.
            continue
        assert str(recipe) in SHIPPED or (name == "plan" and str(recipe) == "my.toml"), recipe
        if str(recipe) in SHIPPED:
            assert "shared/kit" not in SHIPPED[str(recipe)].read_text("utf-8"), "runs anywhere"


def test_a_shell_can_complete_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_POLYRANK_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "polyrank ins")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert polyrank().out.split() == ["inspect"]
