"""Pictures of results; matplotlib is imported only when one is drawn."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from clat.cli.tables import radius
from clat.errors import InputError
from clat.evaluation.sweep import Curve
from clat.files import write_atomically
from clat.text import plain

KINDS = (".png", ".pdf", ".svg")

# Okabe and Ito's colours, which colour-blind readers can tell apart, each with a marker of its own.
_STYLES = (
    *(("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P")),
    ("#000000", "X"),
)


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
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(0.6 + 4.4 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, curves in zip(axes, panels, strict=True):
        first = next(iter(curves.values()))
        places = _places(first)
        for (name, curve), (colour, marker) in zip(curves.items(), cycle(_STYLES), strict=False):
            accuracies = [point.accuracy for point in curve.points]
            low, high = zip(*([100 * end for end in accuracy.interval] for accuracy in accuracies), strict=True)
            axis.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
            values = [100 * accuracy.value for accuracy in accuracies]
            label = plain(name).replace("$", r"\$")  # no formula
            axis.plot(places, values, color=colour, marker=marker, ms=4.5, lw=1.6, label=label, clip_on=False, zorder=3)
        # Doublings lie equally far apart, and so does 0 from the first strength above it.
        axis.set_xscale("symlog", base=2, linthresh=min(place for place in places if place), linscale=0.5)
        axis.set_xticks(places, [f"{place:g}" for place in places])
        axis.xaxis.set_minor_locator(NullLocator())
        title, label = _words(first)
        axis.set_title(title, fontsize="medium", loc="left")
        axis.set_xlabel(label)
        axis.grid(color="0.92", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 100)
    axes[0].set_ylabel(f"accuracy (%) on {first.points[0].accuracy.n:,} images")
    lines, names = axes[0].get_legend_handles_labels()
    title = "Bands: 95 % Wilson intervals"
    figure.legend(lines, names, loc="outside lower center", ncols=3, frameon=False, title=title)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=200))


def draw_learning(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Held-out accuracy by epoch, a panel each for clean and robust, a line for each arm with the range of its seeds.

    Training accuracy is a thinner line where the runs recorded it.

    Args:
        entries: the units of a comparison's result
        path: the file to write; its suffix names the kind
    Raises:
        InputError: a suffix of no known kind, or a place that cannot be written
    """
    check_picture(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.4, 4.4), layout="constrained")
    panels = figure.subplots(1, 2)
    arms = dict.fromkeys(entry["arm"] for entry in entries)
    for axis, measure in zip(panels, ("clean", "robust"), strict=True):
        for arm, (colour, _), dash in zip(arms, cycle(_STYLES), _dashes(), strict=False):
            own = [entry["curves"] for entry in entries if entry["arm"] == arm]
            for key, width in ((measure, 1.6), (f"train_{measure}", 0.7)):
                curves = [curve[key] for curve in own if key in curve]
                if not curves:
                    continue
                epochs = range(1, min(map(len, curves)) + 1)
                at = [[100 * curve[epoch - 1] for curve in curves] for epoch in epochs]
                axis.fill_between(epochs, [min(v) for v in at], [max(v) for v in at], color=colour, alpha=0.15, lw=0)
                label = plain(arm).replace("$", r"\$") if key == measure else None
                mean = [sum(values) / len(values) for values in at]
                axis.plot(
                    epochs, mean, color=colour, lw=width, ls=dash, marker="." if len(mean) == 1 else "", label=label
                )
        axis.set_title(f"{measure}, held-out images (%)", fontsize="medium", loc="left")
        axis.set_xlabel("epoch")
        axis.grid(color="0.92", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    lines, names = panels[0].get_legend_handles_labels()
    title = "Lines: mean over seeds; bands: their range"
    figure.legend(lines, names, loc="outside lower center", ncols=4, frameon=False, title=title)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150))


def _dashes() -> Iterator[str]:
    """Solid until the colours are used up, then broken."""
    return (style for style in cycle(("-", "--", ":", "-.")) for _ in _STYLES)


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
