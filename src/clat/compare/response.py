"""Which layer helps when it trains alone, and does a ranking tell beforehand?

Arms that train one listed layer are compared with the checkpoint that they start from: the change is the layer's
response. Arms from the same checkpoint that chose their layers by a ranking recorded what it measured of every layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clat.compare.plan import Arm, Comparison, Side
from clat.compare.result import Entry
from clat.compare.statistics import LEVEL, Outcomes, RankCorrelation, cochran, rank_correlation
from clat.compare.table import MEASURES, markdown_table, outcomes
from clat.text import plain

BySeed = dict[int, dict[str, float]]  # seed -> layer -> value

WEIGHTS = "number of weights"  # what every ranking has to beat: it is known without measuring
RANKINGS_TITLE = (
    "Rank correlation (Spearman) of the response with what each ranking measured before, and with the number of weights"
)


@dataclass(frozen=True)
class Start:
    """The layers that trained alone from one checkpoint.

    Args:
        side: the arm and the checkpoint
        responses: of each measure, the change of the accuracy in points
        rankings: by the name of the arm that chose by it, what it measured; and each layer's ``number of weights``
        alike: of each measure, the p of all these networks being right equally often, as ``cochran`` has it
    """

    side: Side
    responses: Mapping[str, BySeed]
    rankings: Mapping[str, BySeed]
    alike: Mapping[str, float]


def starts(comparison: Comparison, entries: Sequence[Entry]) -> list[Start]:
    """One for each checkpoint from which several layers trained alone; none in most comparisons."""
    sides = dict.fromkeys(Side(arm.start, arm.checkpoint) for arm in comparison.arms if arm.start and alone(arm))
    found = []
    for side in sides:
        arms = [arm for arm in comparison.arms if (arm.start, arm.checkpoint) == (side.arm, side.checkpoint)]
        responses = {measure: _responses(comparison, entries, side, arms, measure) for measure in MEASURES}
        if any(len(layers) > 1 for layers in responses[MEASURES[0]].values()):
            rankings = {arm.name: values for arm in arms if not alone(arm) and (values := _measured(entries, arm))}
            rankings[WEIGHTS] = _weights(entries, arms)
            alike = {measure: _alike(comparison, entries, arms, measure) for measure in MEASURES}
            found.append(Start(side, responses, rankings, alike))
    return found


def alone(arm: Arm) -> bool:
    """Whether the arm trains one layer that its recipe names."""
    return len(arm.keys.get("critical", {}).get("layers", ())) == 1


def _responses(
    comparison: Comparison, entries: Sequence[Entry], side: Side, arms: Sequence[Arm], measure: str
) -> BySeed:
    before = outcomes(comparison, entries, side, measure)
    found: BySeed = {}
    for arm in filter(alone, arms):
        after = outcomes(comparison, entries, Side(arm.name, arm.evaluated[0]), measure)
        layers = {entry["seed"]: _layer(entry) for entry in entries if entry["arm"] == arm.name}
        for seed in after.keys() & before.keys():
            change = 100 * (after[seed].mean() - before[seed].mean())
            found.setdefault(seed, {})[layers[seed]] = float(change)
    return found


def _layer(entry: Entry) -> str:
    """The layer that trained alone."""
    return str(entry["selected"][0]["layers"][0])


def _weights(entries: Sequence[Entry], arms: Sequence[Arm]) -> BySeed:
    """How many weights trained with each layer."""
    names = {arm.name for arm in arms if alone(arm)}
    found: BySeed = {}
    for entry in entries:
        if entry["arm"] in names:
            found.setdefault(entry["seed"], {})[_layer(entry)] = float(entry["trainable"])
    return found


def _alike(comparison: Comparison, entries: Sequence[Entry], arms: Sequence[Arm], measure: str) -> float:
    by_seed: dict[int, list[Outcomes]] = {}
    for arm in filter(alone, arms):
        for seed, right in outcomes(comparison, entries, Side(arm.name, arm.evaluated[0]), measure).items():
            by_seed.setdefault(seed, []).append(right)
    return cochran([np.stack(rights) for rights in by_seed.values()])


def _measured(entries: Sequence[Entry], arm: Arm) -> BySeed:
    own = (entry for entry in entries if entry["arm"] == arm.name and entry["selected"])
    return {entry["seed"]: values for entry in own if (values := entry["selected"][0].get("measured"))}


def _paired(first: BySeed, second: BySeed) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """The values of the layers that both have, seed by seed, the layers in one order; seeds that lack some wait."""
    shared = {seed: first[seed].keys() & second[seed].keys() for seed in sorted(first.keys() & second.keys())}
    layers = sorted(max(shared.values(), key=len, default=()))
    if len(layers) < 3:
        return []
    whole = [seed for seed, there in shared.items() if there == set(layers)]
    return [(np.array([first[seed][each] for each in layers]), np.array([second[seed][each] for each in layers]))
            for seed in whole]  # fmt: skip


def layers_alone(comparison: Comparison, entries: Sequence[Entry]) -> list[str]:
    """The responses of all starts as paragraphs of Markdown; none where no layers trained alone."""
    return [paragraph for start in starts(comparison, entries) for paragraph in _paragraphs(start)]


def _paragraphs(start: Start) -> list[str]:
    """The responses, and how well each ranking tells them."""
    name, robust = plain(start.side), start.responses["robust"]
    seeds = sorted(robust)
    layers = list(dict.fromkeys(layer for seed in seeds for layer in robust[seed]))
    body = []
    for layer in layers:
        changes = ([each[seed].get(layer) for seed in seeds] for each in start.responses.values())
        body.append([f"`{plain(layer)}`", *(_points(values) for values in changes)])
    tables = [
        f"Each layer trained alone from {name}: change in points, seed by seed ({', '.join(map(str, seeds))}).",
        markdown_table(["layer", *start.responses], body),
    ]
    tables += differ(start)
    if len(seeds) > 1:
        pair = [{0: robust[seed]} for seed in seeds[:2]]
        found = rank_correlation(_paired(*pair))
        tables.append(f"Rank correlation of the robust response between the first two seeds: {found}.")
    told = [[plain(name), seeds_of(found), *map(str, found.values())] for name, found in correlations(start).items()]
    tables += [f"{RANKINGS_TITLE}:", markdown_table(["ranking", "seeds", *start.responses], told)]
    return tables


def seeds_of(found: Mapping[str, RankCorrelation]) -> str:
    """How many seeds a ranking's correlations have."""
    return str(max(each.seeds for each in found.values()))


def correlations(start: Start) -> dict[str, dict[str, RankCorrelation]]:
    """How well what each ranking measured before tells each response after."""
    return {
        ranking: {name: rank_correlation(_paired(values, each)) for name, each in start.responses.items()}
        for ranking, values in start.rankings.items()
    }


def differ(start: Start) -> list[str]:
    """Of each measure, whether the networks differ, in a sentence."""
    found = []
    for measure, p in start.alike.items():
        difference = "a difference" if p < LEVEL else "no difference"
        found.append(f"{measure.capitalize()}: {difference} between these networks is found (Cochran's Q, p {p:.2g}).")
    return found


def _points(values: Sequence[float | None]) -> str:
    return ", ".join("" if value is None else f"{value:+.1f}" for value in values)
