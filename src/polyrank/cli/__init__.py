"""The command line. Commands import what they need, so that help comes at once."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from polyrank.compare.console import show_compared
from polyrank.errors import FolderExistsError, InterruptedRunError, PolyrankError
from polyrank.report.console import show, show_inside, show_prospect

INTERRUPTED = 130
"""Exit code of a run that was asked to stop (128 + SIGINT)."""

app = typer.Typer(
    help="Fine-tune one language model together on machines that are not equal.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFolderArgument = Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the summary as JSON on stdout, and nothing else.")
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"polyrank {metadata.version('polyrank')}")
        raise typer.Exit


@app.callback()
def polyrank(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Fine-tune one language model together on machines that are not equal."""


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe in TOML.", metavar="RECIPE")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to it, e.g. local.lr=1e-3."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; must not exist. Default: runs/NAME."),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(help="Also run the homogeneous control: weakest, or a LoRA type."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Carry out a recipe: train, evaluate, and write a PEFT adapter."""
    with attending() as invocation:
        from polyrank import config
        from polyrank.run.folder import unused
        from polyrank.runner import runner

        forced = [] if control is None else [f"control={json.dumps(control)}"]
        read = config.read(recipe, [*(overrides or []), *forced])
        outcome = runner.start(read, out or unused(Path("runs") / read.name), invocation)
    show(outcome, as_json)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe in TOML.", metavar="RECIPE")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to it, e.g. plan.seconds=60."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a list of clients as JSON on stdout.")
    ] = False,
) -> None:
    """Tell what each device would train, what that costs, and who cannot take part."""
    from polyrank import config
    from polyrank.runner.plans import prospect

    found = prospect(config.read(recipe, overrides or []))
    show_prospect(found, as_json)
    if not found.feasible:
        raise typer.Exit(1)


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(help="A recipe in TOML.", metavar="RECIPE")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to it, e.g. rounds=20."),
    ] = None,
    rules: Annotated[
        str,
        typer.Option(
            help="Rules, the first of which the others are compared with, e.g. "
            "flexlora,flexlora:delta,fedit; RULE+METHOD sets local.method too. Baselines: "
            "splitlora, cenlora, ft, fedlora."
        ),
    ] = "flexlora,flexlora:delta,fedit",
    seeds: Annotated[
        int, typer.Option(min=1, help="How many seeds: the recipe's and those after it.")
    ] = 3,
    control: Annotated[
        str | None,
        typer.Option(help="Also the first rule with all clients of one type: weakest, or a type."),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Choose each method's rate by validation loss, first seed."),
    ] = False,
    rates: Annotated[
        str | None,
        typer.Option(help="With --tune: rates to try. Default: local.lr times 1/3, 1 and 3."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the comparison. Default: runs/NAME-compare."),
    ] = None,
    figures: Annotated[bool, typer.Option(help="Draw figures (needs matplotlib).")] = True,
    as_json: AsJson = False,
) -> None:
    """Run several methods on the same clients, data and seeds; the same command again goes on."""
    with comparing() as (invocation, following):
        from polyrank import compare, config

        read = config.read(recipe, overrides or [])
        asked = compare.Request.of(
            read,
            tuple(_listed(rules)),
            seeds=seeds,
            control=control,
            tune=tune,
            rates=None if rates is None else tuple(map(_number, _listed(rates))),
        )
        place = out or Path("runs") / f"{read.name}-compare"
        compared = compare.start(asked, place, invocation, following, draw=figures)
    show_compared(compared, as_json)


@app.command()
def resume(
    folder: RunFolderArgument,
    allow_inexact: Annotated[
        bool,
        typer.Option("--allow-inexact", help="Resume in another environment; bytes may differ."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Go on with a run, or a comparison, that was stopped or killed, to the same bytes."""
    from polyrank import compare

    if compare.is_comparison(folder):
        with comparing(allow_inexact) as (invocation, following):
            compared = compare.resume(folder, invocation, following)
        show_compared(compared, as_json)
        return
    with attending(allow_inexact) as invocation:
        from polyrank.runner import runner

        outcome = runner.resume(folder, invocation)
    show(outcome, as_json)


@app.command()
def export(
    folder: RunFolderArgument,
    target: Annotated[
        Path, typer.Argument(help="Folder to write; must not exist.", metavar="FOLDER")
    ],
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the adapter.")] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Write base and adapter as one model.")
    ] = False,
) -> None:
    """Write a run's adapter at any rank, or merged into its base."""
    if merged and rank is not None:
        raise typer.BadParameter("give --rank or --merged, not both")
    if target.exists():
        raise FolderExistsError(f"{target}: exists already; choose another folder")
    from polyrank import report
    from polyrank.runner.inspect import adapter_of

    adapter = adapter_of(folder)
    if merged:
        lost = adapter.save_merged(target)
        typer.echo(f"{target}: base and adapter as one model")
        typer.echo(
            f"rounding to {adapter.model.dtype} changed the update by {lost:.2g} of its norm"
        )
        return
    lost = adapter.save(target, rank=rank)
    if rank is not None or lost:
        kept = "the server's rank" if rank is None else f"rank {rank}"
        typer.echo(f"{kept} keeps {1 - lost:.3%} of the energy")
    typer.echo(report.loading(target))


@app.command("app")
def flower_app(
    recipe: Annotated[Path, typer.Argument(help="A recipe in TOML.", metavar="RECIPE")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; must not exist.", metavar="DIR")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Changes to it, e.g. data.source=client, and to the app, e.g. app.out=/data/run.",
        ),
    ] = None,
) -> None:
    """Write a recipe as a Flower app, to simulate, or to run on other machines."""
    from polyrank import config
    from polyrank.config.app import OWN, own_keys
    from polyrank.flower.app_folder import write_app

    given = overrides or []
    of_recipe = [one for one in given if not one.startswith(OWN)]
    own = own_keys([one for one in given if one.startswith(OWN)])
    written = write_app(config.read(recipe, of_recipe), folder, own=own)
    typer.echo(f"{folder}: a Flower app")
    for line in (*written.notes, *written.next):
        typer.echo(line)


@app.command()
def inspect(folder: RunFolderArgument) -> None:
    """Show a run's ranks, rounds, spectra and discarded energy; also while it goes on."""
    from polyrank.runner.inspect import look

    show_inside(look(folder))


@app.command()
def profile(
    name: Annotated[str, typer.Option(help="Its name in the recipe.")] = "this-machine",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="The rate written: float32 or bfloat16.")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the CPU.")] = None,
    up: Annotated[str | None, typer.Option(help='To the server, e.g. "20 Mbit/s".')] = None,
    down: Annotated[str | None, typer.Option(help='From it, e.g. "100 Mbit/s".')] = None,
    latency: Annotated[str | None, typer.Option(help='One way, e.g. "30 ms".')] = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine, and print it as a device that a recipe takes."""
    from polyrank.runner.measure_device import measure

    measured = measure(
        name, device=device, dtype=dtype, threads=threads, up=up, down=down, latency=latency
    )
    for remark in measured.remarks:
        typer.echo(remark, err=True)
    typer.echo(
        json.dumps(measured.json, indent=2, ensure_ascii=False)
        if as_json
        else measured.toml.rstrip()
    )


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"--rates: expected numbers, got {text!r}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0; 1 after a PolyrankError; 2 wrong usage; 130 stopped."""
    console = Console(stderr=True, highlight=False)
    try:
        app(arguments)
    except InterruptedRunError as error:
        console.print(str(error), markup=False, soft_wrap=True)
        sys.exit(INTERRUPTED)
    except PolyrankError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(1)
    except OSError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(1)


if TYPE_CHECKING:
    from polyrank.compare import Following
    from polyrank.runner.parts import Invocation


@contextmanager
def attending(allow_inexact: bool = False) -> Iterator[Invocation]:
    """Show a run on stderr, and turn the first Ctrl-C or SIGTERM into a wish to stop."""
    console = Console(stderr=True)
    with _wish_to_stop(console) as stop:
        from polyrank.report.progress import Terminal
        from polyrank.runner.parts import Invocation

        with Terminal(console) as terminal:
            yield Invocation(terminal, stop, allow_inexact)


@contextmanager
def comparing(allow_inexact: bool = False) -> Iterator[tuple[Invocation, Following]]:
    """Do the same for a comparison."""
    console = Console(stderr=True)
    with _wish_to_stop(console) as stop:
        from polyrank.compare import Following
        from polyrank.runner.parts import Invocation

        with Following(console) as following:
            yield Invocation(following, stop, allow_inexact), following


@contextmanager
def _wish_to_stop(console: Console) -> Iterator[Callable[[], bool]]:
    """Yield whether Ctrl-C or SIGTERM came; the second one ends at once."""
    wish = threading.Event()

    def note(*_: Any) -> None:
        if wish.is_set():
            raise KeyboardInterrupt
        wish.set()
        console.print("stopping after this step or batch; once more to end at once", style="yellow")

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield wish.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
