"""What training costs whatever the machine: its floating-point operations.

A multiplication and an addition are two. Convolutions, linear layers and attention count, nothing else does.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from clat.data.dataset import Dataset, to_unit
from clat.network import Images, Labels
from clat.training.batches import split
from clat.training.method import Method
from clat.training.optimizer import make_optimizer
from clat.training.recipe import Recipe
from clat.training.runs import Run
from clat.tuners.selection import Selection

# Images that operations are counted on, and twice as many: a whole batch may need more memory than it had in training.
FEW = 4


def training_flops(
    run: Run, data: Dataset, network: Callable[[], nn.Module], device: torch.device | str | None = None
) -> int:
    """Operations of a finished run's attacks and updates; selections and validation are left out.

    Args:
        data: the training split that it ran on
        network: gives the run's network, a new one each time
        device: where a few images are trained on to count them
    """
    recipe, selections, epochs = Recipe.from_keys(run.recipe), run.selections, run.result["epochs"]
    places, _ = split(len(data), recipe.holdout, recipe.holdout_seed, recipe.images)
    size, place = min(recipe.batch_size, len(places)), torch.device(device or "cpu")
    pixels, y = next(data.subset(places[: 2 * FEW]).to(place).batches(2 * FEW, workers=0))
    x = to_unit(pixels)

    def counted(recipe: Recipe, number: int, images: int) -> int:
        return batch_flops(recipe, network().to(place), selections[number], x[:images], y[:images])

    @cache
    def of_batch(number: int, awp: bool) -> int:
        ran = recipe if awp else replace(recipe, awp=None)
        if size <= 2 * FEW:
            return counted(ran, number, size)
        few, more = counted(ran, number, FEW), counted(ran, number, 2 * FEW)
        return more + (more - few) * (size - 2 * FEW) // FEW  # what does not grow with the images is in both

    total = 0
    for epoch in range(1, epochs + 1):
        current = max(number for number, selection in enumerate(selections) if selection.epoch <= epoch)
        total += of_batch(current, recipe.awp is not None and epoch > recipe.awp.warmup)
    return total * max(1, len(places) // recipe.batch_size)


def batch_flops(recipe: Recipe, model: nn.Module, selection: Selection, x: Images, y: Labels) -> int:
    """Operations that training on a batch takes: the attack, the passes of AWP and of a teacher, and the update.

    Args:
        model: trains a step; give one that is not needed any more
        selection: what trains
        x, y: images in [0, 1] and their labels
    """
    method = Method(model, recipe.objective, recipe.tuner, recipe.threat, seed=recipe.seed)
    method.take(selection)
    optimizer = make_optimizer(recipe, model)
    method.attack(x, y)  # that of an epoch's first batch may do more, such as look for a radius
    with sdpa_kernel(SDPBackend.MATH), _Counted() as counted:
        x_adv = method.attack(x, y)
        method.update(optimizer, x, x_adv, y, awp=recipe.awp)
    return counted.total * recipe.objective.replays


class _Counted(TorchDispatchMode):
    """Adds up what runs inside the block, backward passes too.

    torch's FlopCounterMode raises an error where an attack takes the gradient of its images.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out
