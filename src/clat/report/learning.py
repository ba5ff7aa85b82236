"""What a run learned: accuracy by epoch, and which layers trained when."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from clat.compare.recipes import validated_by
from clat.evaluation.accuracy import Accuracy
from clat.layer_names import WRAPPER
from clat.report import pictures
from clat.report.blocks import Cell, Picture, Pictures, Section, Table, number, table, words
from clat.report.examples import Examined
from clat.report.reading import Told
from clat.report.svg import picture
from clat.report.words import attack_name
from clat.tuners.order import ranked
from clat.tuners.selection import Selection


def validation_attack(run: Told) -> str:
    """What the held-out images were under, e.g. PGD-10 linf eps 8/255."""
    threat = validated_by(run.recipe)
    return attack_name(f"PGD-{threat.steps}", threat)


def held_out(entry: Mapping[str, Any], kind: str) -> Accuracy:
    """An epoch's held-out accuracy with its count."""
    return _counted(entry[kind], entry["validation_images"])


def _counted(share: float, images: int) -> Accuracy:
    return Accuracy(round(share * images), images)


def learning(run: Told, key: str) -> Section:
    """Accuracy and loss by epoch, the gap between best and last, and where layers were selected again."""
    again_at = [selection.epoch for selection in run.selections[1:]]
    lines = _lines(run)
    best, last = run.metrics[run.best - 1], run.metrics[-1]
    gap = 100 * (best["robust"] - last["robust"])
    chance = "the epoch was chosen on these images, so a small gap may be chance"
    averaged = " of the averaged weights" if run.recipe.get("average") else ""
    said = (
        f"Held-out robust accuracy{averaged} is {100 * best['robust']:.1f} % in epoch {run.best}, which is kept as the "
        f"best, and {100 * last['robust']:.1f} % in the last, epoch {len(run.metrics)}: "
        + (f"a robust-overfitting gap of {gap:.1f} points; {chance}." if gap > 0 else "no robust overfitting.")
    )
    if "robust, training" in lines:
        fit = 100 * last["train_robust"]
        said += (
            f" On {last['train_images']:,} training images, measured in the same way, the last is at {fit:.1f} %: a "
            f"generalisation gap of {fit - 100 * last['robust']:.1f} points."
        )
    images = f"{last['validation_images']:,} held-out"
    if "robust, training" in lines:
        images += f" and {last['train_images']:,} training"
    caption = f"On {images} images under {validation_attack(run)}, with 95 % intervals; the ring is the best epoch."
    alt = f"Held-out accuracy over {len(run.metrics)} epochs. {said}"
    loss_alt = f"Training loss from {run.metrics[0]['loss']:.3g} to {last['loss']:.3g} over {len(run.metrics)} epochs."
    loss = pictures.loss_panel([entry["loss"] for entry in run.metrics], again_at)
    rows = [(number(entry["epoch"]), number(entry["loss"], "{:.4g}")) for entry in run.metrics]
    both = (
        picture(
            pictures.figure_of(
                pictures.learning_panel(lines, again_at, run.best), height=3.2, legend=2 if len(lines) > 2 else 3
            ),
            f"{key}-curve",
            alt,
            caption,
            _epochs(run, lines, again_at),
        ),
        picture(
            pictures.figure_of(loss, height=3.2, legend=3),
            f"{key}-loss",
            loss_alt,
            "Mean over the epoch.",
            table("Training loss", "epoch | loss", rows),
        ),
    )
    return Section("Learning", (said,), (Pictures(both),))


def _lines(run: Told) -> dict[str, list[pictures.Span]]:
    """Accuracy by epoch with its interval, on held-out images and, where it was measured, on training images."""
    found = {f"{kind}, held-out": [held_out(entry, kind) for entry in run.metrics] for kind in ("clean", "robust")}
    if all("train_images" in entry for entry in run.metrics):
        for kind in ("clean", "robust"):
            own = [_counted(entry[f"train_{kind}"], entry["train_images"]) for entry in run.metrics]
            found[f"{kind}, training"] = own
    return {name: [(each.value, *each.interval) for each in accuracies] for name, accuracies in found.items()}


def _epochs(run: Told, lines: Mapping[str, Sequence[pictures.Span]], again_at: Sequence[int]) -> Table:
    rows = []
    for place, entry in enumerate(run.metrics):
        cells = [_share(points[place]) for points in lines.values()]
        seconds, selected = number(entry["seconds"], "{:.1f}"), words("yes" if entry["epoch"] in again_at else "")
        rows.append((number(entry["epoch"]), *cells, seconds, selected))
    heading = ("epoch", *(f"{name} %" for name in lines), "seconds", "layers selected again")
    return Table("Every epoch", heading, tuple(rows))


def _share(span: pictures.Span) -> Cell:
    value, low, high = span
    return Cell(f"{100 * value:.1f}", value, f"[{100 * low:.1f}, {100 * high:.1f}]" if low < high else "")


def layers(run: Told, key: str, examined: Examined | None) -> Section | None:
    """Which layers trained when, and how critical they were."""
    scored = [selection for selection in run.selections if selection.scores]
    if not scored:
        return None
    index = _selectable(scored)
    height = 0.8 + (0.17 if len(index) <= pictures.DENSE else 0.12) * len(index)
    shown = [_heat(run, scored, index, height, key)]
    if examined is not None and examined.before and examined.after:
        titles, how = ("before training", "after training"), examined.how
        shown.append(_pairs(index, examined.before, examined.after, titles, how, height, key))
    elif len(scored) > 1:
        ends = (scored[0], scored[-1])
        first, last = ({score.name: score.criticality for score in each.scores} for each in ends)
        titles = (f"before epoch {ends[0].epoch}", f"before epoch {ends[1].epoch}")
        how = "As the run recorded it at its first and its last selection, on other images each."
        shown.append(_pairs(index, first, last, titles, how, height, key))
    return Section("Which layers trained", (f"Trained {_trained(scored)}.",), (Pictures(tuple(shown)),))


def _selectable(scored: Sequence[Selection]) -> dict[str, int | None]:
    """The layers that a selection chooses from, by name, with their numbers, in the order in which they run."""
    chosen = {
        name for selection in scored for name in (*selection.layers, *(s.name for s in ranked(list(selection.scores))))
    }
    return {score.name: score.index for each in scored for score in each.scores if score.name in chosen}


def _trained(scored: Sequence[Selection]) -> str:
    return "; ".join(f"from epoch {each.epoch}: {', '.join(map(_short, each.layers))}" for each in scored)


def _heat(run: Told, scored: Sequence[Selection], index: Mapping[str, int | None], height: float, key: str) -> Picture:
    ranking = str(run.recipe.get("critical", {}).get("ranking", "criticality"))
    labels = [layer_label(name, number) for name, number in index.items()]
    found = [{score.name: _finite(score.criticality) for score in selection.scores} for selection in scored]
    values = [[scores.get(name, 0.0) for scores in found] for name in index]
    marked = {(row, at) for at, each in enumerate(scored) for row, name in enumerate(index) if name in each.layers}
    epochs = [str(selection.epoch) for selection in scored]
    rows = []
    for place, (label, line) in enumerate(zip(labels, values, strict=True)):
        stars = (" *" if (place, at) in marked else "" for at in range(len(line)))
        cells = (Cell(f"{value:.3g}{star}", value) for value, star in zip(line, stars, strict=True))
        rows.append((Cell(label, place), *cells))
    title = f"{ranking.capitalize()} at each selection; * trains from this epoch on"
    draw = pictures.heat_panel(labels, epochs, values, marked, "selected before epoch")
    return picture(
        pictures.figure_of(draw, height=height),
        f"{key}-heat",
        f"Heat map of {ranking} over {len(index)} layers and {len(scored)} selections. Trained {_trained(scored)}.",
        f"First layer at the top; the stronger the colour, the higher the {ranking}; dots: trained from this epoch on.",
        Table(title, ("layer", *(f"epoch {epoch}" for epoch in epochs)), tuple(rows)),
    )


def _pairs(
    index: Mapping[str, int | None],
    before: Mapping[str, float],
    after: Mapping[str, float],
    titles: tuple[str, str],
    how: str,
    height: float,
    key: str,
) -> Picture:
    """Criticality of each layer at two times."""
    names = [name for name in index if name in before and name in after]
    labels = [layer_label(name, index[name]) for name in names]
    pairs = [(_finite(before[name]), _finite(after[name])) for name in names]
    risen = sum(late > early for early, late in pairs)
    draw = pictures.pairs_panel(labels, [early for early, _ in pairs], [late for _, late in pairs], titles)
    rows = [
        (Cell(label, place), number(early, "{:.3g}"), number(late, "{:.3g}"))
        for place, (label, (early, late)) in enumerate(zip(labels, pairs, strict=True))
    ]
    return picture(
        pictures.figure_of(draw, height=height, legend=2),
        f"{key}-pairs",
        f"Criticality of {len(names)} layers {titles[0]} and {titles[1]}: it rose in {risen}.",
        how,
        table("Criticality", f"layer | {titles[0]} | {titles[1]}", rows),
    )


def _finite(value: float) -> float:
    return float(value) if math.isfinite(value) else 0.0


def _short(name: str) -> str:
    return name.removeprefix(WRAPPER)


def layer_label(name: str, index: int | None) -> str:
    """The paper's number and the name, e.g. ``layer3.1.conv1 (11)``."""
    return f"{_short(name)} ({index})" if index else _short(name)
