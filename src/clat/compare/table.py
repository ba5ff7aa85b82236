"""A comparison's results: figures for each arm, a verdict on each contrast, and both as Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from clat.compare.plan import Arm, Comparison, Evaluation, Side
from clat.compare.recipes import validated_by
from clat.compare.result import Entry
from clat.compare.statistics import Contrast, Outcomes, contrasts, paired_difference, unpack
from clat.text import plain

MEASURES = ("robust", "clean")


@dataclass(frozen=True)
class Verdict:
    """One contrast on one measure."""

    measure: str
    contrast: Contrast
    seeds: tuple[int, ...]

    @property
    def short(self) -> str:
        """The verdict in a few words, for a table that has the figures beside it."""
        found = self.contrast.difference
        better = "first is better" if found.mean >= 0 else "first is worse"
        parts = [better if self.contrast.found else self.contrast.noise]
        parts += ["1 seed"] if len(found.seeds) == 1 else []
        parts += ["the seeds scatter"] if found.scattered else []
        return ", ".join(parts)

    @property
    def by_seed(self) -> str:
        """How many images only the first and only the second gets right, and McNemar's p, seed by seed."""
        tests = zip(self.seeds, self.contrast.difference.seeds, strict=True)
        return "; ".join(f"seed {seed}: {test.first} to {test.second} (p {test.p:.2g})" for seed, test in tests)

    def to_json(self) -> dict[str, Any]:
        difference = self.contrast.difference
        return {
            "first": self.contrast.first,
            "second": self.contrast.second,
            "measure": self.measure,
            "of_seeds": list(self.seeds),
            **asdict(difference),
            "p_holm": self.contrast.p,
            "words": str(self.contrast),
        }


def verdicts(comparison: Comparison, entries: Sequence[Entry]) -> list[Verdict]:
    """Each contrast whose arms have a seed in common, robust and clean; all of a measure are one family."""
    found: list[Verdict] = []
    for measure in MEASURES:
        differences, seeds = {}, {}
        for first, second in comparison.contrasts:
            one, other = (outcomes(comparison, entries, side, measure) for side in (first, second))
            common = tuple(seed for seed in one if seed in other)
            if common:
                pair = str(first), str(second)
                differences[pair] = paired_difference(*(np.stack([each[s] for s in common]) for each in (one, other)))
                seeds[pair] = common
        answered = contrasts(differences, among=len(set(comparison.contrasts)))
        found += [Verdict(measure, each, seeds[each.first, each.second]) for each in answered]
    return found


def outcomes(comparison: Comparison, entries: Sequence[Entry], side: Side, measure: str) -> dict[int, Outcomes]:
    """Whether each image of the first evaluation is answered right, by seed."""
    found = {}
    for entry in entries:
        measured = figures(entry, comparison.evaluations[0], side.checkpoint)
        if entry["arm"] == side.arm and measured is not None:
            found[entry["seed"]] = unpack(measured[f"{measure}_images"])
    return found


def figures(entry: Entry, evaluation: Evaluation, checkpoint: str) -> Mapping[str, Any] | None:
    """The figures of an entry for one evaluation at one checkpoint."""
    wanted = {key: value for key, value in asdict(evaluation).items() if key != "images" or value is not None}
    for found in entry["evaluations"]:
        same = all(found["evaluation"].get(key) == value for key, value in wanted.items())
        if found["checkpoint"] == checkpoint and same:
            return found
    return None


def findings(comparison: Comparison, entries: Sequence[Entry]) -> dict[str, Any]:
    """What result.json says beside the units."""
    return {
        "seeds": {
            arm.name: [entry["seed"] for entry in entries if entry["arm"] == arm.name] for arm in comparison.arms
        },
        "contrasts": [verdict.to_json() for verdict in verdicts(comparison, entries)],
    }


def columns(comparison: Comparison) -> list[str]:
    """The headings of the arms' table."""
    checkpoints = _checkpoints(comparison)
    return ["arm", "seeds", *(f"{name} {each}" for each in checkpoints for name in ("clean", "robust")),
            "best epoch", "seconds", "TFLOPs", "trains"]  # fmt: skip


def rows(comparison: Comparison, entries: Sequence[Entry], evaluation: Evaluation) -> list[list[str]]:
    """A row for each arm that has an entry: means over seeds and the spread (standard deviation) between them.

    The last cell is the share of the parameters that train: in each run the most that do so at a time, over seeds from
    the lowest to the highest.
    """
    found = []
    for arm in comparison.arms:
        own = [entry for entry in entries if entry["arm"] == arm.name]
        if own:
            found.append(_row(arm, own, evaluation, _checkpoints(comparison)))
    return found


def _row(arm: Arm, entries: Sequence[Entry], evaluation: Evaluation, checkpoints: Sequence[str]) -> list[str]:
    cells = [arm.name, str(len(entries))]
    for checkpoint in checkpoints:
        measured = [found for entry in entries if (found := figures(entry, evaluation, checkpoint))]
        for measure in ("clean", "robust"):
            cells.append(_spread([100 * each[measure] / each["evaluation"]["images"] for each in measured], "{:.1f}"))
    cells.append(_spread([entry["best"]["epoch"] for entry in entries], "{:.0f}"))
    cells.append(_spread([entry["seconds"] for entry in entries], "{:.0f}"))
    cells.append(_spread([entry["flops"] / 1e12 for entry in entries if "flops" in entry], "{:.3g}"))
    shares = sorted({f"{100 * entry['trainable'] / entry['parameters']:.1f}" for entry in entries}, key=float)
    return [*cells, f"{shares[0]} to {shares[-1]} %" if len(shares) > 1 else f"{shares[0]} %"]


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def _checkpoints(comparison: Comparison) -> list[str]:
    every = ("best", "last", "averaged")
    return [name for name in every if any(name in arm.evaluated for arm in comparison.arms)]


def measured_how(comparison: Comparison, entries: Sequence[Entry], evaluation: Evaluation) -> str:
    """Attack, eps and images, on one line."""
    for entry in entries:
        for checkpoint in _checkpoints(comparison):
            if (found := figures(entry, evaluation, checkpoint)) is not None:
                n = found["evaluation"]["images"]
                eps = f"{255 * evaluation.eps:.3g}/255"
                chosen = " (the best checkpoint was chosen on them)" if evaluation.of == "held-out" else ""
                return f"{found['attack']}, linf eps {eps}, {n:,} {evaluation.of} images{chosen}"
    return f"{evaluation.tier} tier"


def validated_how(entries: Sequence[Entry]) -> str:
    """Which attack each arm's held-out images were under, where they differ; empty where all had the same one.

    The best checkpoint is chosen by it, and it is what the learning curves show.
    """
    arms: dict[str, dict[str, None]] = {}
    for entry in entries:
        threat = validated_by(entry["recipe"])
        eps, step = (
            f"{255 * length:.3g}/255" if threat.norm == "linf" else f"{length:.3g}"
            for length in (threat.radius, threat.step)
        )
        arms.setdefault(f"PGD-{threat.steps}, {threat.norm} eps {eps}, step {step}", {})[entry["arm"]] = None
    if len(arms) < 2:
        return ""
    most = max(arms, key=lambda attack: len(arms[attack]))
    others = "; ".join(f"{', '.join(arms[attack])}: {attack}" for attack in arms if attack != most)
    return (
        "The held-out images, on which the best checkpoint is chosen, were not attacked alike, so robust accuracies by "
        f"epoch do not compare. {others}; all others: {most}."
    )


def lines_of(verdict: Verdict) -> list[str]:
    """A contrast in words, and the figures behind it."""
    return [
        f"{verdict.measure}: {verdict.contrast} (p {verdict.contrast.p:.2g} after Holm)",
        f"images that only one of them gets right, and McNemar's test: {verdict.by_seed}",
    ]


def markdown(comparison: Comparison, entries: Sequence[Entry], more: Sequence[str] = ()) -> str:
    """The whole result as a page.

    Args:
        more: paragraphs that stand after the contrasts
    """
    parts = [f"# {plain(comparison.question)}"]
    for evaluation in comparison.evaluations:
        parts.append(f"{measured_how(comparison, entries, evaluation)}. Percent; mean over seeds ± their spread.")
        parts.append(markdown_table(columns(comparison), rows(comparison, entries, evaluation)))
    parts.append(plain(validated_how(entries)))
    found = verdicts(comparison, entries)
    if found:
        parts.append(
            "Contrasts, fixed beforehand: by how many points the first is above the other, with the 95 % interval over "
            "images and seeds. Last, McNemar's test for each seed."
        )
        parts.append(contrasts_table(found))
    parts += more
    if comparison.printed:
        parts.append("As printed:")
        parts.append("\n".join(f"- {plain(row)}" for row in _flat(comparison.printed)))
    parts.append("\n".join(f"- {plain(note)}" for note in comparison.notes))
    if comparison.then:
        parts.append("The rest of the question:\n\n" + "\n".join(f"    {plain(line)}" for line in comparison.then))
    parts = [part for part in parts if part]
    return "\n\n".join(parts) + "\n"


def contrasts_table(found: Sequence[Verdict]) -> str:
    """The contrasts in Markdown: points by which the first is above the second, verdict, and the tests by seed."""
    headings = ("measure", "first", "against", "points", "p (Holm)", "verdict", "images that only one gets right")
    body = []
    for verdict in found:
        contrast, difference = verdict.contrast, verdict.contrast.difference
        points = f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
        arms = (contrast.first, contrast.second)
        body.append((verdict.measure, *arms, points, f"{contrast.p:.2g}", verdict.short, verdict.by_seed))
    return markdown_table(headings, body)


def _flat(printed: Mapping[str, Any], before: str = "") -> list[str]:
    """Nested keys and values, a line for each value."""
    found: list[str] = []
    for key, value in printed.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{before}{key}, ")
        else:
            found.append(f"{before}{key}: {' / '.join(map(str, value)) if isinstance(value, list) else value}")
    return found


def markdown_table(headings: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    first, *others = [f"| {' | '.join(cells)} |" for cells in (headings, *body)]
    return "\n".join([first, "|" + "---|" * len(headings), *others])
