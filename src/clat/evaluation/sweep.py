"""Robust accuracy as the attack grows stronger (Figure 4 of the paper)."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from clat.attacks import pgd_threat, restarts
from clat.compute import Precision, placed
from clat.data.arrays import as_dataset
from clat.errors import InputError
from clat.evaluation.accuracy import TOLERATED, Accuracy
from clat.evaluation.evaluate import Progress, evaluate
from clat.evaluation.measured import Measured
from clat.inputs import check_word
from clat.threat import Lp, Threat

Over = Literal["eps", "steps"]


@dataclass(frozen=True)
class Point:
    """Accuracy under PGD of so many steps, each eps / 4 long, from one random start; eps 0 is clean."""

    eps: float
    steps: int
    accuracy: Accuracy


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The result of ``sweep``, weakest attack first, and all that is needed to reproduce it."""

    over: Over
    norm: Lp
    points: tuple[Point, ...]
    measured: Measured
    from_record: tuple[str, ...] = field(default=(), compare=False)  # as ``Result.from_record``, of each attack

    @property
    def rises(self) -> list[tuple[Point, Point]]:
        """Pairs of neighbouring points where accuracy is clearly higher under the stronger attack."""
        pairs = zip(self.points, self.points[1:], strict=False)
        return [(weak, strong) for weak, strong in pairs if strong.accuracy.value - weak.accuracy.value > TOLERATED]

    def to_json(self) -> dict[str, Any]:
        points = [{"eps": point.eps, "steps": point.steps, **point.accuracy.to_json()} for point in self.points]
        rises = [[getattr(weak, self.over), getattr(strong, self.over)] for weak, strong in self.rises]
        return {**asdict(self), "points": points, "rises": rises}


def sweep(
    model: nn.Module,
    data: Any,
    over: Over,
    strengths: Sequence[float],
    *,
    eps: float | str = "8/255",
    steps: int = 20,
    norm: Lp = "linf",
    seed: int = 0,
    batch_size: int = 250,
    workers: int = 2,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    record: Path | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Curve:
    """Accuracy under PGD from one random start at each eps, or for each number of steps, on the same images.

    Each point is measured separately, so the curve can rise where an attack fails; ``Curve.rises`` says where.

    Args:
        strengths: the eps, of which 0 is clean, or the numbers of steps
        eps: of all points, when sweeping over steps
        steps: of all points, when sweeping over eps
        seed: of the random start
        workers: processes that decode images which are not kept in memory
        device: where the network is moved for the call, and then back; default where it is
        record: a folder that keeps each point's evaluation, as that of ``evaluate``
        progress: is told after each batch
    Raises:
        InputError: another word than eps and steps, no positive strength, or one that is not an eps or a number of
            steps; images that do not fit

    Source: Figure 4 of the paper.
    """
    data = as_dataset(data)
    attacks = threats(over, strengths, eps=eps, steps=steps, norm=norm)
    with placed([model], device):
        results = [
            evaluate(
                model,
                data,
                restarts(threat, seed=seed),
                batch_size=batch_size,
                workers=workers,
                device=device,
                precision=precision,
                record=record,
                progress=progress,
            )
            for threat in attacks
        ]
    points = [Point(t.radius, t.steps, r.robust) for t, r in zip(attacks, results, strict=True)]
    if over == "eps" and 0 in strengths:
        points.insert(0, Point(0.0, steps, results[0].clean))
    return Curve(
        over=over,
        norm=norm,
        points=tuple(points),
        measured=results[0].measured,
        from_record=tuple(filter(None, (result.from_record for result in results))),
    )


def threats(over: Over, strengths: Sequence[float], *, eps: float | str, steps: int, norm: Lp) -> list[Threat]:
    """The attacks of a sweep, weakest first; eps 0 needs none.

    Raises:
        InputError: no positive strength, or one that is not an eps or a number of steps
    """
    check_word("over", over, get_args(Over))
    wanted = sorted(set(strengths))
    if not wanted or wanted[-1] <= 0:
        raise InputError(f"There is nothing to sweep over in {over} {list(strengths)}; give positive numbers.")
    if over == "eps":
        return [pgd_threat(value, steps, norm) for value in wanted if value]
    if any(value != int(value) for value in wanted):
        raise InputError(f"Numbers of steps are whole; got {list(strengths)}.")
    return [pgd_threat(eps, int(value), norm) for value in wanted]
