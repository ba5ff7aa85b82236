"""The page of a comparison: the question, the arms, the contrasts and the curves."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import yaml

from clat.compare.plan import Comparison
from clat.compare.response import RANKINGS_TITLE, Start, alone, correlations, differ, seeds_of, starts
from clat.compare.result import Entry, read_entries
from clat.compare.table import Verdict, columns, figures, measured_how, rows, validated_how, verdicts
from clat.errors import InputError
from clat.files import read_sealed
from clat.report import pictures
from clat.report.blocks import Block, Cell, Figure, Missing, Page, Picture, Pictures, Section, Table, Text, words
from clat.report.blocks import number as amount
from clat.report.svg import picture
from clat.text import plain


def read_comparison(path: Path) -> tuple[Comparison, list[Entry]]:
    """The comparison in a result.json, and its units. Raises InputError if it is damaged or something else."""
    entries = read_entries(path)
    try:
        return Comparison.from_json(read_sealed(path)["comparison"]), entries
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{plain(path)} is no result of clat compare's; put it back from a copy.") from error


def comparison_page(comparison: Comparison, entries: Sequence[Entry], *, place: int = 1) -> Page:
    """Everything that a comparison's result tells.

    Args:
        place: of the comparison on the page
    """
    key = f"comparison{place}"
    found = verdicts(comparison, entries)
    arms = {entry["arm"] for entry in entries}
    seeds = {entry["seed"] for entry in entries}
    sections = [
        contrasts(found, key),
        measured(comparison, entries, key),
        *(layers_alone(start, f"{key}-start{place}") for place, start in enumerate(starts(comparison, entries), 1)),
        learning(_drawn(comparison, entries), key),
        again(comparison, entries),
    ]
    robust = [verdict for verdict in found if verdict.measure == "robust"]
    apart = sum(verdict.contrast.found for verdict in robust)
    said = f"{apart} of {len(comparison.contrasts)} contrasts show a difference in robust accuracy" if robust else ""
    left = len(comparison.contrasts) - len(robust)
    return Page(
        kind="Comparison",
        title=comparison.question,
        verdict=said + (f"; {left} are not measured yet." if said and left else "." if said else ""),
        figures=(
            Figure("Arms", f"{len(arms)} of {len(comparison.arms)}", "that have a result"),
            Figure(
                "Seeds",
                str(len(seeds)),
                "one seed says nothing about a recipe" if len(seeds) < 2 else "of each arm at most",
            ),
            Figure("Contrasts", f"{len(robust)} of {len(comparison.contrasts)}", "fixed beforehand, Holm-corrected"),
        ),
        sections=tuple(section for section in sections if section is not None),
        missing=tuple(_missing(comparison, entries)),
    )


def contrasts(found: Sequence[Verdict], key: str) -> Section | None:
    """The differences that the plan asked for, with intervals and verdicts."""
    if not found:
        return None
    drawn = []
    for measure in dict.fromkeys(verdict.measure for verdict in found):
        own = [verdict for verdict in found if verdict.measure == measure]
        names = [(each.contrast.first, each.contrast.second) for each in own]
        differences = (verdict.contrast.difference for verdict in own)
        spans = [(100 * each.mean, 100 * each.low, 100 * each.high) for each in differences]
        apart = [each.contrast.found for each in own]
        draw = pictures.forest_panel(names, spans, apart, f"difference in {measure} accuracy (points)")
        alt = f"Differences in {measure} accuracy. {' '.join(f'{each.contrast}.' for each in own)}"
        figure = pictures.figure_of(draw, height=0.8 + 0.42 * len(own))
        caption = f"{measure.capitalize()}: above zero the first is better. Filled: found, p (Holm) up to 0.05."
        drawn.append(picture(figure, f"{key}-{measure}", alt, caption, _numbers(measure, own)))
    heading = ("measure", "first", "against", "points", "p (Holm)", "verdict")
    answered = [(words(each.measure), *_difference(each), words(each.short)) for each in found]
    answers = Table("Paired differences with 95 % intervals over images and seeds", heading, tuple(answered))
    said = Text("In words", tuple(f"{verdict.measure.capitalize()}: {verdict.contrast}." for verdict in found))
    return Section("Contrasts", (), (Pictures(tuple(drawn)), answers, said))


def _difference(verdict: Verdict) -> tuple[Cell, ...]:
    contrast, found = verdict.contrast, verdict.contrast.difference
    interval = f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    points = Cell(f"{100 * found.mean:+.1f}", found.mean, interval)
    return words(contrast.first), words(contrast.second), points, amount(contrast.p, "{:.2g}")


def _numbers(measure: str, own: Sequence[Verdict]) -> Table:
    body = []
    for verdict in own:
        seeds = ", ".join(map(str, verdict.seeds))
        body.append((*_difference(verdict), words(seeds), words(verdict.by_seed)))
    heading = ("first", "against", "points", "p (Holm)", "seeds", "images that only one gets right, by seed")
    return Table(f"{measure.capitalize()} accuracy", heading, tuple(body))


def measured(comparison: Comparison, entries: Sequence[Entry], key: str) -> Section | None:
    """The table of the arms, for each evaluation, and their robust accuracy as points."""
    if not entries:
        return None
    blocks: list[Block] = []
    said = []
    for place, evaluation in enumerate(comparison.evaluations):
        how = measured_how(comparison, entries, evaluation)
        said.append(f"{how}. Percent; mean over seeds ± their standard deviation.")
        body = [tuple(_cell(text) for text in row) for row in rows(comparison, entries, evaluation)]
        blocks.append(Table(how, tuple(columns(comparison)), tuple(body)))
        if not place:
            blocks.append(Pictures((_points(comparison, _drawn(comparison, entries), key),)))
    return Section("Arms", tuple(said), tuple(blocks))


def _cell(text: str) -> Cell:
    """A cell that sorts by the number it begins with, if it does."""
    first, _, rest = text.partition(" ")
    try:
        return Cell(first, float(first), rest)
    except ValueError:
        return words(text)


def _points(comparison: Comparison, entries: Sequence[Entry], key: str) -> Picture:
    """Robust accuracy of each arm at its checkpoints, images of all seeds together."""
    arms = list(dict.fromkeys(entry["arm"] for entry in entries))
    series: dict[str, list[pictures.Span | None]] = {}
    body = []
    for checkpoint in ("best", "last", "averaged"):
        line: list[pictures.Span | None] = []
        for arm in arms:
            own = [figures(e, comparison.evaluations[0], checkpoint) for e in entries if e["arm"] == arm]
            there = [each for each in own if each is not None]
            values = [100 * each["robust"] / each["evaluation"]["images"] for each in there]
            line.append((statistics.mean(values), min(values), max(values)) if values else None)
            if values:
                spread = f"{min(values):.1f} to {max(values):.1f}"
                body.append((words(arm), words(checkpoint), Cell(f"{statistics.mean(values):.1f}", values[0], spread)))
        if any(line):
            series[checkpoint] = line
    draw = pictures.intervals_panel(arms, series, "robust accuracy (%)")
    parts = (
        f"{arm} {', '.join(f'{name} {value[0]:.1f}' for name, line in series.items() if (value := line[place]))}"
        for place, arm in enumerate(arms)
    )
    alt = f"Robust accuracy in percent, mean over seeds: {'; '.join(parts)}."
    figure = pictures.figure_of(draw, height=1.1 + 0.32 * len(arms), legend=3)
    numbers = Table("Robust accuracy", ("arm", "checkpoint", "mean % (range of the seeds)"), tuple(body))
    caption = "Points: mean over seeds; lines: from the lowest seed to the highest."
    return picture(figure, f"{key}-points", alt, caption, numbers)


def layers_alone(start: Start, key: str) -> Section:
    """How much each layer changed the accuracy when it trained alone, and whether a ranking told."""
    layers = list(dict.fromkeys(layer for seed in start.responses["robust"].values() for layer in seed))
    series: dict[str, list[pictures.Span | None]] = {}
    for measure, by_seed in start.responses.items():
        values = [[own[layer] for own in by_seed.values() if layer in own] for layer in layers]
        series[measure] = [(statistics.mean(own), min(own), max(own)) if own else None for own in values]
    draw = pictures.intervals_panel(layers, series, f"change from {start.side} (points)")
    parts = (
        f"{layer} {', '.join(f'{name} {span[0]:+.1f}' for name, spans in series.items() if (span := spans[place]))}"
        for place, layer in enumerate(layers)
    )
    body = []
    for place, layer in enumerate(layers):
        spans = [spans[place] for spans in series.values()]
        body.append((words(layer), *(amount(span[0], "{:+.1f}") if span else words("") for span in spans)))
    numbers = Table("Change in points, mean over seeds", ("layer", *series), tuple(body))
    figure = pictures.figure_of(draw, height=1.1 + 0.22 * len(layers), legend=2)
    alt = f"Change of accuracy in points when one layer trains, mean over seeds: {'; '.join(parts)}."
    caption = "Points: mean over seeds; lines: from the lowest seed to the highest."
    blocks: list[Block] = [Pictures((picture(figure, key, alt, caption, numbers),))]
    told = [
        (words(name), words(seeds_of(by_measure)), *map(words, by_measure.values()))
        for name, by_measure in correlations(start).items()
    ]
    blocks.append(Table(RANKINGS_TITLE, ("ranking", "seeds", *start.responses), tuple(told)))
    return Section(f"Layers that train alone, from {start.side}", tuple(differ(start)), tuple(blocks))


def _drawn(comparison: Comparison, entries: Sequence[Entry]) -> list[Entry]:
    """All but those that train one layer alone, which have a picture of their own."""
    own = {arm.name for arm in comparison.arms if alone(arm)}
    return [entry for entry in entries if entry["arm"] not in own]


def learning(entries: Sequence[Entry], key: str) -> Section | None:
    """The curves of the arms."""
    if not entries:
        return None
    drawn = []
    for measure in ("clean", "robust"):
        arms = dict.fromkeys(entry["arm"] for entry in entries)
        curves = {
            arm: list(pictures.by_epoch([e["curves"][measure] for e in entries if e["arm"] == arm])) for arm in arms
        }
        draw = pictures.arms_panel(entries, measure)
        parts = (
            f"{arm} from {100 * at[0][1]:.1f} to {100 * at[-1][1]:.1f}, highest {100 * max(v[1] for v in at):.1f}"
            for arm, at in curves.items()
        )
        alt = f"Held-out {measure} accuracy in percent by epoch, mean over seeds: {'; '.join(parts)}."
        body = [
            (amount(epoch + 1), *(_mean(at, epoch) for at in curves.values()))
            for epoch in range(max(map(len, curves.values())))
        ]
        numbers = Table(f"Held-out {measure} accuracy %, mean over seeds", ("epoch", *curves), tuple(body))
        crowded = len(arms) > pictures.CROWDED
        height = 1.1 + 0.32 * len(arms) if crowded else 3.2 + 0.17 * ((len(arms) + 2) // 3)
        figure = pictures.figure_of(draw, height=height, legend=3)
        caption = "Lines: mean over seeds; bands: from the lowest to the highest."
        if crowded:
            caption = (
                "Points: mean over seeds; lines: from the lowest seed to the highest. The numbers have every epoch."
            )
        elif any(f"train_{measure}" in entry["curves"] for entry in entries):
            caption += " Thin: training images, measured in the same way."
        if measure == "robust" and (how := validated_how(entries)):
            caption += f" {plain(how)}"
        drawn.append(picture(figure, f"{key}-learning-{measure}", alt, caption, numbers))
    return Section("Learning", (), (Pictures(tuple(drawn)),))


def _mean(curve: Sequence[pictures.Span], epoch: int) -> Cell:
    return amount(100 * curve[epoch][1], "{:.1f}") if epoch < len(curve) else words("")


def again(comparison: Comparison, entries: Sequence[Entry]) -> Section:
    """The recipes of the arms, what was noted, and where it ran."""
    keys = {
        arm.name: {
            "recipe": arm.recipe,
            "model": arm.model,
            "from": arm.start and f"{arm.start}/{arm.checkpoint}",
            **arm.keys,
        }
        for arm in comparison.arms
    }
    ran = {f"{entry['arm']}, seed {entry['seed']}": entry["environment"] for entry in entries}
    data = {entry["data"]["sha256"]: entry["data"] for entry in entries}
    blocks = tuple(
        Text(title, tuple(yaml.safe_dump(content, sort_keys=False, allow_unicode=True).splitlines()))
        for title, content in (("Arms, every key", keys), ("Data", list(data.values())), ("Versions and hardware", ran))
    )
    more = (Text("The rest of the question", tuple(comparison.then), open=True),) if comparison.then else ()
    return Section("To do it again", tuple(comparison.notes), (*more, *blocks))


def _missing(comparison: Comparison, entries: Sequence[Entry]) -> list[Missing]:
    done = {(entry["arm"], entry["seed"]) for entry in entries}
    left = [f"{arm.name}-{seed}" for arm, seed in comparison.runs() if (arm.name, seed) not in done]
    if not left:
        return []
    shown = ", ".join(left[:6]) + (f" and {len(left) - 6} more" if len(left) > 6 else "")
    return [Missing(f"Units that have not run yet: {shown}", "clat compare FILE --data DATA --out OUT")]
