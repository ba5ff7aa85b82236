"""What evaluations, verdicts and sweeps found: accuracies with intervals, checks, curves."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from clat.compare.statistics import paired_difference
from clat.evaluation.accuracy import Accuracy, Result
from clat.evaluation.sweep import Curve
from clat.report import pictures
from clat.report.blocks import Block, Cell, Picture, Pictures, Section, Text, number, share, table, words
from clat.report.records import Evaluated, Records
from clat.report.svg import picture
from clat.report.words import radius, strength


@dataclass(frozen=True)
class Network:
    """A network with what was measured on it.

    Args:
        name: as it is shown
        records: of its checkpoints
        checkpoint: the one that is shown first
    """

    name: str
    records: Records
    checkpoint: str = "best"

    @property
    def headline(self) -> Evaluated | None:
        """The evaluation with the most attacks, of the checkpoint that is shown, if there is one."""
        return next((each for each in self.records.evaluations if each.checkpoint == self.checkpoint), None)


def attack_words(result: Result) -> str:
    starts = len(result.attacks) // max(1, len(result.attack.split(", ")))
    return f"{result.attack}{f', {starts} starts' if starts > 1 else ''}"


def ball(result: Result) -> str:
    return f"{result.norm} eps {radius(result.eps, result.norm)}"


def ends(accuracy: Accuracy) -> str:
    """The 95 % interval in percent."""
    low, high = accuracy.interval
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def accuracies(network: Network, key: str, base: Network | None = None) -> Section | None:
    """All evaluations, those of the base beside them, and the paired difference where both were measured alike."""
    if not network.records.evaluations:
        return None
    rows: list[tuple[Cell, ...]] = []
    said: list[str] = []
    blocks: list[Block] = []
    for each in network.records.evaluations:
        rows.append(_evaluation_row(network.name, each))
        twin = _twin(network, each, base)
        if base is not None and twin is not None:
            rows.append(_evaluation_row(base.name, twin))
            named = {base.name: twin.result, network.name: each.result}
            said.append(_difference(base.name, each.result, twin.result))
            blocks = blocks or [Pictures((_beside(named, key),))]
    heading = "network | checkpoint | attack | ball | images | clean % | robust %"
    blocks.append(table("Accuracy with its 95 % Wilson interval", heading, rows))
    how = dict.fromkeys(str(each.result.measured) for each in network.records.evaluations)
    blocks.append(Text("How it was measured", tuple(how)))
    return Section("Accuracy", tuple(said), tuple(blocks))


def _evaluation_row(name: str, each: Evaluated) -> tuple[Cell, ...]:
    result = each.result
    images = Cell(f"{result.clean.n:,} {result.measured.split}", float(result.clean.n))
    what = (words(name), words(each.checkpoint), words(attack_words(result)), words(ball(result)))
    return (*what, images, share(result.clean), share(result.robust))


def _twin(network: Network, each: Evaluated, base: Network | None) -> Evaluated | None:
    """The base's evaluation by the same attacks on the same images."""
    if base is None or each.checkpoint != network.checkpoint:
        return None

    def how(result: Result) -> tuple[Any, ...]:
        attacks = [(attack.name, attack.seed, attack.settings) for attack in result.attacks]
        return result.measured.data, result.measured.split, result.measured.images, result.eps, result.norm, attacks

    for other in base.records.evaluations:
        if other.checkpoint == base.checkpoint and how(other.result) == how(each.result):
            return other
    return None


def _difference(base: str, result: Result, other: Result) -> str:
    """The paired differences in words."""
    parts = []
    for name, wrong in (("clean", {-1}), ("robust", {*range(1, 1 + len(result.attacks)), -1})):
        a, b = (np.array([[outcome not in wrong for outcome in each.outcomes]]) for each in (result, other))
        found = paired_difference(a, b)
        parts.append(f"{name} {100 * found.mean:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}]")
    return (
        f"Beside {base}, under {attack_words(result)}, {ball(result)}: {', '.join(parts)}, paired over the same "
        f"{result.clean.n:,} images. One run of each: another seed may say otherwise."
    )


def _beside(named: dict[str, Result], key: str) -> Picture:
    def points(result: Result) -> list[tuple[float, float, float]]:
        both = ((accuracy.value, *accuracy.interval) for accuracy in (result.clean, result.robust))
        return [(100 * value, 100 * low, 100 * high) for value, low, high in both]

    result = next(iter(named.values()))
    series = {name: points(each) for name, each in named.items()}
    draw = pictures.intervals_panel(["clean", "robust"], series, "accuracy (%)")
    figures = (
        f"{name} clean {100 * e.clean.value:.1f}, robust {100 * e.robust.value:.1f}" for name, e in named.items()
    )
    alt = f"Accuracy in percent: {'; '.join(figures)}."
    rows = [
        (words(name), words(row), share(accuracy))
        for name, each in named.items()
        for row, accuracy in (("clean", each.clean), ("robust", each.robust))
    ]
    return picture(
        pictures.figure_of(draw, height=1.9, legend=2),
        f"{key}-beside",
        alt,
        f"With 95 % intervals; robust under {attack_words(result)}, {ball(result)}.",
        table("Accuracy", "network | images | accuracy %", rows),
    )


def trust(network: Network) -> Section | None:
    """What the checks of ``clat trust`` found."""
    if not network.records.verdicts:
        return None
    blocks: list[Block] = []
    said: list[str] = []
    for checkpoint, verdict in network.records.verdicts:
        said.append(
            f"The {checkpoint} checkpoint: {verdict.text}; on {verdict.clean.n:,} {verdict.measured.split} images, "
            f"{verdict.norm} eps {radius(verdict.eps, verdict.norm)}. Checks find signs; they prove nothing."
        )
        for folded in (False, True):
            rows = [
                (words(each.check), words(each.status), words(each.measured), number(each.seconds, "{:.1f}"))
                for each in verdict.findings
                if (each.status in ("pass", "skipped")) == folded
            ]
            if rows:
                title = f"{len(rows)} checks that passed or were skipped" if folded else "Checks to look at"
                blocks.append(table(title, "check | result | measured | seconds", rows, folded=folded))
    return Section("Can the robust accuracy be trusted?", tuple(said), tuple(blocks))


def sweeps(network: Network, key: str, base: Network | None = None) -> Section | None:
    """Accuracy as the attack grows stronger, with the base's curve where it was measured at the same points."""
    drawn: list[Picture] = []
    said: list[str] = []
    for checkpoint, curve in network.records.curves:
        if checkpoint != network.checkpoint:
            continue
        named = {network.name: curve}
        for other, beside in base.records.curves if base else ():
            if base is not None and other == base.checkpoint and _points(beside) == _points(curve):
                named = {base.name: beside, network.name: curve}
        said += [
            f"The accuracy of {name} rises from {each.over} {strength(each, weak)} to {strength(each, strong)}: a sign "
            "of gradient masking or of too weak an attack."
            for name, each in named.items()
            for weak, strong in each.rises
        ]
        drawn.append(_sweep(named, f"{key}-sweep{len(drawn)}"))
    return Section("As the attack grows stronger", tuple(said), (Pictures(tuple(drawn)),)) if drawn else None


def _points(curve: Curve) -> Any:
    return curve.over, curve.norm, curve.measured.data, [(point.eps, point.steps) for point in curve.points]


def _sweep(named: dict[str, Curve], key: str) -> Picture:
    first = next(iter(named.values()))
    weakest, strongest = first.points[0], first.points[-1]
    figures = (
        f"{name} {100 * each.points[0].accuracy.value:.1f} to {100 * each.points[-1].accuracy.value:.1f}"
        for name, each in named.items()
    )
    alt = (
        f"Accuracy in percent from {first.over} {strength(first, weakest)} to {strength(first, strongest)}: "
        f"{'; '.join(figures)}."
    )
    rows = [
        (Cell(strength(first, point), getattr(point, first.over)),
         *(share(each.points[place].accuracy) for each in named.values()))
        for place, point in enumerate(first.points)
    ]  # fmt: skip
    numbers = table("Accuracy with its 95 % Wilson interval", first.over, rows)
    numbers = replace(numbers, headings=(first.over, *(f"{name} %" for name in named)))
    figure = pictures.figure_of(pictures.sweep_panel(named), height=3.4, legend=2)
    return picture(figure, key, alt, "One random start at each point; bands are 95 % Wilson intervals.", numbers)
