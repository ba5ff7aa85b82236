"""Pictures of results; matplotlib is imported only when one is drawn."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from clat.errors import InputError
from clat.evaluation.sweep import Curve
from clat.files import write_atomically
from clat.report.svg import ACCENT, INK, SERIES, SOFT, STYLE
from clat.report.words import radius
from clat.text import plain

KINDS = (".png", ".pdf", ".svg")
WIDTH = 4.5  # inches of a picture on a page, so that it fits a phone
LONGEST = 26  # letters of a name in a picture
DENSE = 40  # rows from which on they stand closer
CROWDED = 8  # arms whose curves still tell apart

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = tuple((style, colour) for style in ("-", "--", ":", "-.") for colour in SERIES)

Draw = Callable[[Any], None]  # onto an axis
Span = tuple[float, float, float]  # a value with the ends of its interval


def figure_of(draw: Draw, *, height: float, legend: int = 0, turned: bool = False) -> Any:
    """One panel as a figure.

    Args:
        legend: most columns of the legend below; none for 0
        turned: set the labels of x upright
    """
    figure = _panels([draw], (WIDTH, height), legend=legend)
    if turned:
        figure.axes[0].tick_params(axis="x", rotation=90)
    return figure


def short(name: str) -> str:
    """A name as a picture has room for it: its beginning and its end."""
    text = plain(name)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2 - 2]}...{text[-LONGEST // 2 + 1 :]}"


def _panels(draws: Sequence[Draw], size: tuple[float, float], *, legend: int, title: str = "", **shared: Any) -> Any:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(draws), squeeze=False, **shared)[0]
        for axis, draw in zip(axes, draws, strict=True):
            draw(axis)
        handles, names = axes[0].get_legend_handles_labels()
        for columns in range(legend if handles else 0, 0, -1):  # as many as there is room for
            drawn = figure.legend(handles, names, loc="outside lower center", ncols=columns, title=title or None)
            if columns == 1 or drawn.get_window_extent().width <= figure.bbox.width:
                break
            drawn.remove()
    return figure


# Curves over the strength of the attack


def check_picture(path: Path) -> None:
    """Raises InputError unless the file's name says one of the kinds that can be drawn."""
    if path.suffix.lower() not in KINDS:
        raise InputError(f"{path} is no name for a picture; end it with one of {', '.join(KINDS)}.")


def draw_curves(panels: Sequence[Mapping[str, Curve]], path: Path) -> None:
    """Accuracy against the strength of the attack, a panel for each sweep, a line with its 95 % band for each network.

    Args:
        panels: network name -> curve; the curves of a panel run over the same strengths
        path: the file to write; its suffix names the kind
    Raises:
        InputError: a suffix of no known kind, or a place that cannot be written
    """
    check_picture(path)
    size = (0.6 + 4.4 * len(panels), 4.2)
    draws = [sweep_panel(curves) for curves in panels]
    figure = _panels(draws, size, legend=3, title="Bands: 95 % Wilson intervals", sharey=True)
    _write(figure, path, dpi=200)


def sweep_panel(curves: Mapping[str, Curve]) -> Draw:
    """A line with its band for each network."""

    def draw(axis: Any) -> None:
        from matplotlib.ticker import NullLocator

        first = next(iter(curves.values()))
        places = _places(first)
        for (name, curve), colour, marker in zip(curves.items(), cycle(SERIES), cycle(_MARKERS), strict=False):
            accuracies = [point.accuracy for point in curve.points]
            low, high = zip(*([100 * end for end in accuracy.interval] for accuracy in accuracies), strict=True)
            axis.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
            values = [100 * accuracy.value for accuracy in accuracies]
            style = {"color": colour, "marker": marker, "ms": 4.5, "lw": 1.6, "clip_on": False, "zorder": 3}
            axis.plot(places, values, label=short(name), **style)
        # Doublings lie equally far apart, and so does 0 from the first strength above it.
        axis.set_xscale("symlog", base=2, linthresh=min(place for place in places if place), linscale=0.5)
        axis.set_xticks(places, [f"{place:g}" for place in places])
        axis.xaxis.set_minor_locator(NullLocator())
        title, label = _words(first)
        axis.set_title(title, fontsize="medium", loc="left")
        axis.set_xlabel(label)
        axis.set_ylim(0, 100)
        axis.set_ylabel(f"accuracy (%) on {first.points[0].accuracy.n:,} images")

    return draw


def _places(curve: Curve) -> list[float]:
    """Where the points stand on the strength axis: linf radii in grey levels, l2 radii and steps as they are."""
    unit = 255 if curve.over == "eps" and curve.norm == "linf" else 1
    return [unit * getattr(point, curve.over) for point in curve.points]


def _words(curve: Curve) -> tuple[str, str]:
    """Title and label of the strength axis."""
    point = curve.points[-1]
    if curve.over == "steps":
        return f"PGD, {curve.norm} eps {radius(point.eps, curve.norm)}", "steps, each eps / 4 long"
    unit = "grey levels of 255" if curve.norm == "linf" else "pixels of [0, 1]"
    return f"PGD-{point.steps}, {curve.norm}", f"eps ({unit})"


# Curves over epochs


def draw_learning(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Held-out accuracy by epoch, a panel each for clean and robust, as ``arms_panel`` draws it.

    Args:
        entries: the units of a comparison's result
        path: the file to write; its suffix names the kind
    Raises:
        InputError: a suffix of no known kind, or a place that cannot be written
    """
    check_picture(path)
    draws = [arms_panel(entries, measure) for measure in ("clean", "robust")]
    count = len({entry["arm"] for entry in entries})
    height = 4.4 if count <= CROWDED else 1.1 + 0.26 * count
    figure = _panels(draws, (9.4, height), legend=4, title="Mean over seeds, and their range")
    _write(figure, path, dpi=150)


def arms_panel(entries: Sequence[Mapping[str, Any]], measure: str) -> Draw:
    """A line for each arm with the range of its seeds; a thinner one for training accuracy, where it was recorded.

    Where there are too many arms to tell apart: the epoch with the highest mean, and the last one.
    """
    arms = dict.fromkeys(entry["arm"] for entry in entries)
    if len(arms) > CROWDED:
        curves = [list(by_epoch([e["curves"][measure] for e in entries if e["arm"] == arm])) for arm in arms]
        ends = {
            "highest epoch": [max(at, key=lambda span: span[1]) for at in curves],
            "last": [at[-1] for at in curves],
        }
        spans = {name: [(100 * mean, 100 * low, 100 * high) for low, mean, high in at] for name, at in ends.items()}
        return intervals_panel(list(arms), spans, f"{measure}, held-out images (%)")

    def draw(axis: Any) -> None:
        for arm, (dash, colour) in zip(arms, cycle(_LINES), strict=False):
            own = [entry["curves"] for entry in entries if entry["arm"] == arm]
            for key, width in ((measure, 1.6), (f"train_{measure}", 0.7)):
                at = list(by_epoch([curve[key] for curve in own if key in curve]))
                if not at:
                    continue
                epochs = range(1, len(at) + 1)
                low, mean, high = ([100 * values[place] for values in at] for place in range(3))
                axis.fill_between(epochs, low, high, color=colour, alpha=0.15, lw=0)
                style = {"color": colour, "lw": width, "ls": dash, "marker": "." if len(at) == 1 else ""}
                axis.plot(epochs, mean, label=short(arm) if key == measure else None, **style)
        axis.set_title(f"{measure}, held-out images (%)", fontsize="medium", loc="left")
        axis.set_xlabel("epoch")

    return draw


def by_epoch(curves: Sequence[Sequence[float]]) -> Iterator[Span]:
    """Lowest, mean and highest of several curves at each epoch that all of them have."""
    for values in zip(*curves, strict=False):
        yield min(values), sum(values) / len(values), max(values)


def learning_panel(lines: Mapping[str, Sequence[Span]], reselected: Sequence[int], best: int | None) -> Draw:
    """Accuracy by epoch with its intervals, a tick where layers were selected again, a ring around the best epoch."""

    def draw(axis: Any) -> None:
        for place, (name, spans) in enumerate(lines.items()):
            colour, marker = SERIES[place % 2], _MARKERS[place % 2]  # clean and robust, held-out and in training
            epochs = range(1, len(spans) + 1)
            values, low, high = ([100 * span[end] for span in spans] for end in range(3))
            dash = "--" if name.endswith("training") else "-"
            axis.fill_between(epochs, low, high, color=colour, alpha=0.13, linewidth=0)
            shown = marker if len(values) == 1 else ""
            axis.plot(epochs, values, color=colour, lw=1.8, ls=dash, marker=shown, label=name, zorder=3)
            if best and not name.endswith("training"):
                ring = {"ms": 7, "mfc": "none", "mec": colour, "mew": 1.4, "zorder": 4}
                axis.plot([best], [values[best - 1]], "o", **ring)
        _epochs(axis, reselected)
        axis.set_title("accuracy (%)", fontsize="medium", loc="left")

    return draw


def loss_panel(losses: Sequence[float], reselected: Sequence[int]) -> Draw:
    """Training loss by epoch."""

    def draw(axis: Any) -> None:
        marker = "o" if len(losses) == 1 else ""
        axis.plot(range(1, len(losses) + 1), losses, color=INK, lw=1.6, marker=marker, label="loss")
        _epochs(axis, reselected)
        axis.set_title("training loss", fontsize="medium", loc="left")

    return draw


def _epochs(axis: Any, reselected: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, epoch in enumerate(reselected):
        label = "layers selected again" if not number else None
        axis.axvline(epoch - 0.5, color=SOFT, lw=0.9, ls=(0, (1, 2.5)), label=label)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_xlabel("epoch")


# Layers, differences and classes


def heat_panel(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], marked: set[tuple[int, int]], x: str
) -> Draw:
    """Cells whose colour is the stronger the larger their value, by its square root; those marked have a dot.

    Args:
        values: one list for each row, of a number for each column
        marked: (row, column) of the cells with a dot
        x: label of the columns
    """

    def draw(axis: Any) -> None:
        from matplotlib.patches import Rectangle

        largest = max((value for line in values for value in line), default=0) or 1
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                strength = 0.04 + 0.86 * max(0, value / largest) ** 0.5
                corner = (column - 0.48, row - 0.48)
                axis.add_patch(Rectangle(corner, 0.96, 0.96, facecolor=ACCENT, alpha=strength, linewidth=0))
                if (row, column) in marked:
                    axis.plot([column], [row], "o", ms=3.6, color=INK, mew=0)
        axis.set_xlim(-0.6, len(columns) - 0.4)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        thinned = range(0, len(columns), 1 + len(columns) // 20)
        axis.set_xticks(thinned, [short(columns[place]) for place in thinned])
        axis.set_yticks(range(len(rows)), [short(name) for name in rows])
        axis.tick_params(length=0, labelsize=8 if len(rows) <= DENSE else 6)
        axis.grid(visible=False)
        for side in axis.spines.values():
            side.set_visible(False)
        axis.set_xlabel(x)

    return draw


def pairs_panel(rows: Sequence[str], before: Sequence[float], after: Sequence[float], names: tuple[str, str]) -> Draw:
    """Two values for each row, joined by a line."""

    def draw(axis: Any) -> None:
        places = range(len(rows))
        axis.hlines(places, before, after, color=SOFT, lw=0.9)
        axis.plot(before, places, "o", color=SOFT, mfc="none", ms=4.5, label=names[0])
        axis.plot(after, places, "o", color=ACCENT, ms=4.5, mew=0, label=names[1])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_yticks(places, [short(name) for name in rows])
        axis.tick_params(axis="y", length=0, labelsize=8 if len(rows) <= DENSE else 6)
        axis.grid(axis="y", visible=False)
        axis.set_xlim(left=0)

    return draw


def forest_panel(rows: Sequence[tuple[str, str]], differences: Sequence[Span], found: Sequence[bool], x: str) -> Draw:
    """Differences with their intervals around zero; filled where one is found.

    Args:
        rows: what is compared with what, one above the other
        differences: mean, low and high of each row
    """

    def draw(axis: Any) -> None:
        axis.axvline(0, color=SOFT, lw=0.9)
        for place, ((mean, low, high), apart) in enumerate(zip(differences, found, strict=True)):
            axis.hlines(place, low, high, color=ACCENT, lw=1.8)
            axis.plot([mean], [place], "o", color=ACCENT, mfc=ACCENT if apart else "none", ms=5.5, mew=1.4)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_yticks(range(len(rows)), [f"{short(first)}\nagainst {short(second)}" for first, second in rows])
        axis.tick_params(axis="y", length=0, labelsize=8)
        axis.grid(axis="y", visible=False)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel(x)

    return draw


def intervals_panel(rows: Sequence[str], series: Mapping[str, Sequence[Span | None]], x: str) -> Draw:
    """Values with their intervals, one below the other for each series in a row.

    Args:
        series: name -> value, low and high for each row; None where there is no value
    """

    def draw(axis: Any) -> None:
        apart = 0.34 / max(1, len(series) - 1)
        for number, ((name, found), colour, marker) in enumerate(zip(series.items(), SERIES, _MARKERS, strict=False)):
            shift = apart * (number - (len(series) - 1) / 2)
            label: str | None = short(name)
            for place, value in enumerate(found):
                if value is not None:
                    axis.hlines(place + shift, value[1], value[2], color=colour, lw=1.6)
                    axis.plot([value[0]], [place + shift], marker, color=colour, ms=4.8, mew=0, label=label)
                    label = None
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_yticks(range(len(rows)), [short(name) for name in rows])
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel(x)

    return draw


def _write(figure: Any, path: Path, dpi: int) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=dpi))
