"""How long a comparison will take, from a timed pass of each network."""

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from clat.compare.plan import Arm, Comparison
from clat.compare.recipes import resolved
from clat.compare.unit import attacks_of
from clat.data.dataset import Dataset
from clat.evaluation.cost import pass_seconds
from clat.training.batches import split
from clat.training.recipe import Recipe
from clat.training.recipe_files import laid_over
from clat.training.runs import Run
from clat.training.train import train

HOW = (
    "The estimate counts passes, timed here on each network by training on a few images: steps + 1 for each training "
    "image and epoch, the validation steps for each held-out one, and for each evaluated one the most that the attack "
    "can take."
)
LONGEST = 20  # seconds that the training on a few images may take; else a pass alone is timed


def pass_times(
    comparison: Comparison,
    data: Dataset,
    build: Callable[[str], nn.Module],
    device: Any = None,
    *,
    one_thread: bool = False,
) -> dict[str, float]:
    """Seconds of a forward and backward pass for an image, by network.

    Args:
        one_thread: as units have it that run side by side
    """
    firsts, threads = {arm.model: arm for arm in reversed(comparison.arms)}, torch.get_num_threads()
    torch.set_num_threads(1 if one_thread else threads)
    try:
        return {model: _pass_seconds(arm, data, build(model), device) for model, arm in firsts.items()}
    finally:
        torch.set_num_threads(threads)


def _pass_seconds(arm: Arm, data: Dataset, model: nn.Module, device: Any) -> float:
    keys = resolved(arm.keys)
    steps, images = _steps(keys), 2 * keys["batch_size"]
    alone = pass_seconds(model, data, batch_size=keys["batch_size"], device=device)
    if alone * images * (steps + 1) > LONGEST or images + 64 > len(data):
        return alone
    short = {"epochs": 1, "images": images, "holdout": 32, "health": False, "extra": None}
    with TemporaryDirectory() as folder:
        few = data.subset(torch.arange(images + 64))
        train(
            Recipe.from_keys(laid_over(arm.keys, short)), model, few, out=Path(folder) / "run", device=device, workers=0
        )
        return Run(Path(folder) / "run").result["seconds"] / (images * (steps + 1))


def _steps(keys: Mapping[str, Any]) -> int:
    return 0 if keys["objective"] == "clean" else keys["threat"]["steps"]


def unit_seconds(
    comparison: Comparison, arm: Arm, times: Mapping[str, float], total: int, classes: int, *, trained: int = 0
) -> float:
    """Seconds to train and evaluate an arm with one seed.

    Args:
        times: what ``pass_times`` found
        total: images of the training split
        classes: of the data
        trained: epochs that are done
    """
    keys = resolved(arm.keys)
    training, held = (len(part) for part in split(total, keys["holdout"], keys["holdout_seed"], keys["images"]))
    validated = held + min(held, keys["train_sample"])
    passes = (keys["epochs"] - trained) * (training * (_steps(keys) + 1) + validated * (keys["validation_steps"] + 1))
    for evaluation in comparison.evaluations:
        attacks = attacks_of(evaluation, classes)
        images = evaluation.images or total
        passes += len(arm.evaluated) * images * (1 + sum(attack.passes for attack in attacks))
    return passes * times[arm.model]
