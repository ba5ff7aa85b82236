"""The records of evaluations and verdicts in a folder, and the sweeps that they make up."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from clat.evaluation.accuracy import Result
from clat.evaluation.record import read_record
from clat.evaluation.sweep import Curve, Over, Point
from clat.evaluation.trust import Verdict
from clat.evaluation.trust.record import read_verdict
from clat.threat import Lp

RECORD = re.compile(r"[\w.+-]+-[0-9a-f]{12}\.json")
VERDICT = re.compile(r"trust-[0-9a-f]{12}\.json")


@dataclass(frozen=True)
class Evaluated:
    """An evaluation, and the checkpoint that it is of."""

    checkpoint: str
    result: Result

    @property
    def strength(self) -> tuple[int, int]:
        """What orders evaluations: how many different attacks, then how many images."""
        return len(self.result.attack.split(", ")), self.result.clean.n


@dataclass(frozen=True)
class Records:
    """What a folder of records holds.

    Args:
        evaluations: the strongest first, without those that are points of a sweep
        curves: the sweeps, with the checkpoint of each
        verdicts: of ``clat trust``, with the checkpoint of each; one that found something first
        left_out: sentences on records that are not shown
    """

    evaluations: tuple[Evaluated, ...] = ()
    curves: tuple[tuple[str, Curve], ...] = ()
    verdicts: tuple[tuple[str, Verdict], ...] = ()
    left_out: tuple[str, ...] = ()


def records_in(places: Sequence[Path], checkpoints: Mapping[str, str] | None = None) -> Records:
    """Reads the records among the files, or in the folders, given.

    Args:
        checkpoints: digest of the weights -> name of the checkpoint; records of other weights are left out. None takes
            all, under their digests
    Raises:
        InputError: a record that is damaged
    """
    results: list[Evaluated] = []
    verdicts: list[tuple[str, Verdict]] = []
    unfinished = strange = 0
    for path in _files(places):
        if VERDICT.fullmatch(path.name):
            verdict = read_verdict(path)
            name = _checkpoint(verdict.measured.networks[0].weights, checkpoints)
            if name:
                verdicts.append((name, verdict))
            strange += not name
            continue
        result, finished = read_record(path)
        name = _checkpoint(result.measured.networks[0].weights, checkpoints)
        if name and finished:
            results.append(Evaluated(name, result))
        strange += not name
        unfinished += bool(name) and not finished
    curves, in_sweep = curves_of(results)
    alone = [each for each in results if each not in in_sweep] or results
    alone.sort(key=lambda each: (each.checkpoint != "best", [-part for part in each.strength]))
    verdicts.sort(key=lambda each: (each[0] != "best", each[1].ok, -each[1].clean.n))
    said = []
    if unfinished:
        said.append(f"{_records(unfinished)} of an evaluation that was interrupted; its command, given again, ends it.")
    if strange:
        said.append(f"{_records(strange)} of other weights than those in the run folder now, and not shown.")
    return Records(tuple(alone), tuple(curves), tuple(verdicts), tuple(said))


def _records(count: int) -> str:
    return f"{count} record{'s are' if count > 1 else ' is'}"


def _files(places: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            found += sorted(path for path in place.iterdir() if RECORD.fullmatch(path.name) and path.is_file())
        else:
            found.append(place)
    return found


def _checkpoint(weights: str, checkpoints: Mapping[str, str] | None) -> str:
    return weights[:8] if checkpoints is None else checkpoints.get(weights, "")


def curves_of(results: Sequence[Evaluated]) -> tuple[list[tuple[str, Curve]], list[Evaluated]]:
    """The sweeps among evaluations, and the evaluations in them: PGD from one start, on the same images, in one way."""
    alike: dict[str, list[Evaluated]] = defaultdict(list)
    for each in results:
        if _is_point(each.result):
            how = json.dumps([each.checkpoint, each.result.measured.to_json(), each.result.norm], sort_keys=True)
            alike[how].append(each)
    curves: list[tuple[str, Curve]] = []
    used: list[Evaluated] = []
    for group in alike.values():
        for over in ("eps", "steps"):
            for curve, points in _curves(group, over):
                curves.append((group[0].checkpoint, curve))
                used += points
    return curves, used


def _is_point(result: Result) -> bool:
    attack = result.attacks[0]
    steps, step = attack.settings.get("steps"), attack.settings.get("step")
    if len(result.attacks) > 1 or type(steps) is not int or not isinstance(step, float):
        return False
    return attack.name == f"PGD-{steps}" and abs(step - result.eps / 4) < 1e-9


def _curves(group: Sequence[Evaluated], over: Over) -> list[tuple[Curve, list[Evaluated]]]:
    """The curves of two or more points in a group; what does not vary in a curve is the same in all of its points."""
    lines: dict[float, dict[float, Evaluated]] = defaultdict(dict)
    for each in group:
        steps, eps = each.result.attacks[0].settings["steps"], each.result.eps
        fixed, varies = (steps, eps) if over == "eps" else (eps, steps)
        lines[fixed][varies] = each
    found = []
    for line in lines.values():
        if len(line) > 1:
            points = [line[key] for key in sorted(line)]
            first = points[0].result
            shown = [Point(p.result.eps, p.result.attacks[0].settings["steps"], p.result.robust) for p in points]
            if over == "eps":
                shown.insert(0, Point(0.0, shown[0].steps, first.clean))
            found.append(
                (Curve(over=over, norm=cast(Lp, first.norm), points=tuple(shown), measured=first.measured), points)
            )
    return found
