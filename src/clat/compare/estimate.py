"""What a comparison will take, from a timed pass of each network."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from clat.compare.images import split
from clat.compare.plan import Arm, Comparison
from clat.compare.recipes import resolved
from clat.compare.unit import attacks_of
from clat.data.dataset import Dataset
from clat.evaluation.cost import pass_seconds

HOW = (
    "The estimate counts passes, timed here on each network: steps + 1 for each training image and epoch, the "
    "validation steps for each held-out one, and for each evaluated one the most that the attack can take."
)


def pass_times(
    comparison: Comparison, data: Dataset, build: Callable[[str], nn.Module], device: Any = None
) -> dict[str, float]:
    """Seconds of a pass for an image, by network."""
    models = dict.fromkeys(arm.model for arm in comparison.arms)
    return {name: pass_seconds(build(name), data, batch_size=64, device=device) for name in models}


def unit_seconds(comparison: Comparison, arm: Arm, times: Mapping[str, float], total: int, classes: int) -> float:
    """Seconds to train and evaluate an arm with one seed.

    Args:
        times: what ``pass_times`` found
        total: images of the training split
        classes: of the data
    """
    keys = resolved(arm.keys)
    training, held = (len(part) for part in split(total, keys["holdout"], keys["holdout_seed"], keys["images"]))
    steps = 0 if keys["objective"] == "clean" else keys["threat"]["steps"]
    passes = keys["epochs"] * (training * (steps + 1) + held * (keys["validation_steps"] + 1))
    for evaluation in comparison.evaluations:
        attacks = attacks_of(evaluation, classes)
        images = evaluation.images or total
        passes += len(arm.evaluated) * images * (1 + sum(attack.passes for attack in attacks))
    return passes * times[arm.model]
