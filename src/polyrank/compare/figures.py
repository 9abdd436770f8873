"""A comparison as figures, SVG and PNG: loss against rounds and bytes, by category, and energy.

A method has the same colour, marker and line in all of them. The colours are those of Okabe and Ito
(2008), which people with the common kinds of colour blindness can tell apart. The files do not
depend on when they are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polyrank.compare.curves import Curve, apart, discarded_by_round, loss_by_bytes, loss_by_round
from polyrank.compare.results import records_of
from polyrank.errors import PolyrankError
from polyrank.run import storage

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#777777")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 2, 1, 2)))
_STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "svg.hashsalt": "polyrank",
}
_DPI = 160
_BANDS = 5
"""The most methods whose ranges are drawn as bands."""
_LOSS = "validation loss per token"

Style = Mapping[str, Any]


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def check_drawing() -> None:
    """Raise PolyrankError if matplotlib is missing."""
    if not can_draw():
        raise PolyrankError(
            "figures need matplotlib: pip install 'polyrank[report]', or ask for none with "
            "--no-figures"
        )


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what `results` (compare.json of this folder) hold into ``figures/``; return the files.

    A figure for which there are no numbers is not drawn: no validation, or no rule that discards.
    """
    check_drawing()
    import matplotlib

    styles = _styles([method["label"] for method in results["methods"]])
    runs = {
        method["label"]: [
            records_of(folder / run["folder"]) for run in method["runs"] if run["failure"] is None
        ]
        for method in results["methods"]
    }
    seeds = len(results["seeds"])
    shape = "band" if len(runs) <= _BANDS else "bars"
    over = f"mean of {seeds} seeds, {shape}: lowest to highest" if seeds > 1 else "one seed"
    files: list[Path] = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # Whatever style the user has set.
        matplotlib.rcParams.update(_STYLE)
        if curves := loss_by_round(runs):
            figure = _lines(curves, styles, f"Validation loss of the training clients ({over})")
            _name(figure, "round", _LOSS)
            files += _save(figure, folder, "loss-by-round")
        pooled = {
            method["label"] for method in results["methods"] if method["pooled"]
        }  # Nothing is sent.
        sending = {label: each for label, each in runs.items() if label not in pooled}
        if curves := loss_by_bytes(sending):
            figure = _lines(curves, styles, f"Validation loss for what was sent ({over})", log=True)
            _name(figure, "MiB up and down so far, all clients together", _LOSS)
            files += _save(figure, folder, "loss-by-bytes")
        if curves := discarded_by_round(runs):
            title = f"Energy discarded by the cut to the server's rank ({over})"
            figure = _lines(curves, styles, title, from_zero=True)
            _name(figure, "round", "share of ‖D‖² discarded, %")
            files += _save(figure, folder, "energy-discarded")
        if figure := _categories(results, styles):
            files += _save(figure, folder, "loss-by-category")
    return files


def _save(figure: Any, folder: Path, name: str) -> list[Path]:
    place = folder / "figures"
    place.mkdir(exist_ok=True)
    files = []
    for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
        path = place / f"{name}.{kind}"
        with storage.disk_errors(path):
            figure.savefig(path, dpi=_DPI, metadata=metadata, bbox_inches="tight")
        files.append(path)
    return files


def _styles(labels: Sequence[str]) -> dict[str, Style]:
    """A colour, marker and line for each method."""
    return {
        label: {
            "color": _COLOURS[place % len(_COLOURS)],
            "marker": _MARKERS[place % len(_MARKERS)],
            "linestyle": _LINES[(place + place // len(_COLOURS)) % len(_LINES)],
        }
        for place, label in enumerate(labels)
    }


def _lines(
    curves: Sequence[Curve],
    styles: Mapping[str, Style],
    title: str,
    *,
    log: bool = False,
    from_zero: bool = False,
) -> Any:
    """Return a figure of curves with their bands, each named at its end."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    figure = Figure(figsize=(7.2, 4.0))
    axes = figure.add_subplot()
    for place, curve in enumerate(curves):
        if curve.low != curve.high:
            _range(
                axes,
                curve,
                styles[curve.label]["color"],
                place - (len(curves) - 1) / 2,
                len(styles) <= _BANDS,
            )
        axes.plot(curve.x, curve.mean, **styles[curve.label])
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.margins(x=0.015)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.set_title(title)
    _label_ends(axes, curves, styles)
    return figure


def _range(axes: Any, curve: Curve, colour: str, place: float, bands: bool) -> None:
    """Draw a curve's range over seeds: a band, or bars side by side where bands would blur."""
    from matplotlib.transforms import ScaledTranslation

    if bands:
        axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.08, linewidth=0)
        for bound in (curve.low, curve.high):
            axes.plot(curve.x, bound, color=colour, alpha=0.35, linewidth=0.6)
        return
    aside = ScaledTranslation(0.025 * place, 0, axes.get_figure().dpi_scale_trans)
    axes.vlines(
        curve.x, curve.low, curve.high, color=colour, alpha=0.6, linewidth=0.8
    ).set_transform(axes.transData + aside)


def _label_ends(axes: Any, curves: Sequence[Curve], styles: Mapping[str, Style]) -> None:
    """Name each curve right of the axes, at the height of its end, without overlaps.

    A line leads from the end to the name where all curves end at the right.
    """
    low, high = axes.get_ylim()
    ends = [(curve.mean[-1] - low) / (high - low) for curve in curves]
    together = len({curve.x[-1] for curve in curves}) == 1
    for curve, end, place in zip(curves, ends, apart(ends, 0.06, 0.0, 1.0), strict=True):
        style = styles[curve.label]
        outside = {"transform": axes.transAxes, "clip_on": False, "color": style["color"]}
        if together:
            axes.plot([1.0, 1.03, 1.05], [end, place, place], **outside, linewidth=0.8)
        axes.plot([1.07], [place], **outside, marker=style["marker"])
        axes.text(1.09, place, curve.label, **outside, verticalalignment="center")


def _name(figure: Any, x: str, y: str) -> None:
    figure.axes[0].set_xlabel(x)
    figure.axes[0].set_ylabel(y)


def _categories(results: Mapping[str, Any], styles: Mapping[str, Style]) -> Any:
    """Return a dot plot of the test loss per category; None if no method has a result."""
    from matplotlib.figure import Figure

    methods = [method for method in results["methods"] if method["per_category"]]
    panels = [(who, _sorted(methods, who)) for who in ("seen", "unseen")]
    panels = [(who, names) for who, names in panels if names]
    if not panels:
        return None
    counts = [len(names) for _, names in panels]
    row = 0.12 + 0.03 * len(methods)  # Inches: methods lie one above the other within a row.
    figure = Figure(figsize=(7.2, 1.1 * len(panels) + row * sum(counts)), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=counts)[:, 0]
    for axes, (who, names) in zip(grid, panels, strict=True):
        for place, method in enumerate(methods):
            shift = 0.6 * ((place + 0.5) / len(methods) - 0.5)
            losses = [
                method["per_category"].get(name, {}).get(who, {}).get("loss") for name in names
            ]
            known = [(loss, y + shift) for y, loss in enumerate(losses) if loss is not None]
            style = {**styles[method["label"]], "linestyle": "none"}
            axes.plot([x for x, _ in known], [y for _, y in known], **style, label=method["label"])
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        for y in range(0, len(names), 2):
            axes.axhspan(y - 0.5, y + 0.5, color="#F4F4F4", linewidth=0, zorder=0)
        axes.set_title(f"{who} clients")
    grid[-1].set_xlabel("test loss per token, mean over the category's clients and over seeds")
    grid[0].legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=2.2, handletextpad=0.2
    )
    return figure


def _sorted(methods: Sequence[Mapping[str, Any]], who: str) -> list[str]:
    """The categories that have a loss, those with the highest of the first method first."""
    losses = methods[0]["per_category"] if methods else {}
    known = {name: scores[who]["loss"] for name, scores in losses.items()}
    return sorted((n for n in known if known[n] is not None), key=lambda n: (-known[n], n))
