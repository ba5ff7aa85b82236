"""What a pass through a network costs on this machine."""

import time

import torch
from torch import nn

from clat.attacks import pgd_attack
from clat.compute import placed
from clat.data.dataset import Dataset, to_unit
from clat.network import Images, Labels, class_scores
from clat.threat import NoGradientError, Threat


def pass_seconds(
    model: nn.Module, data: Dataset, *, batch_size: int = 250, device: torch.device | str | None = None
) -> float:
    """Seconds that a forward and backward pass takes for an image here, measured in a few seconds."""
    with placed([model], device) as place:
        few = data.subset(torch.arange(min(batch_size, len(data)))).to(place)
        pixels, y = next(few.batches(batch_size, workers=0))
        x, found = to_unit(pixels), 0.0
        for images in (1, min(8, len(x)), len(x)):  # the first warms up; over 5 seconds are left out
            if found * images > 5:
                break
            start = time.perf_counter()
            passes = _passes(model, x[:images], y[:images])
            found = (time.perf_counter() - start) / passes / images
    return found


def _passes(model: nn.Module, x: Images, y: Labels) -> float:
    """Runs the network on the images; returns how many forward and backward passes that was."""
    try:
        pgd_attack(model, x, y, Threat(steps=1)).sum().item()
        return 4 / 3  # a pass and a forward pass, a third of one
    except NoGradientError:
        class_scores(model, x).sum().item()
        return 2 / 3
