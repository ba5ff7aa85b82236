"""What a pass through a network costs on this machine."""

import time

import torch
from torch import nn

from clat.compute import placed
from clat.data.dataset import Dataset, to_unit
from clat.network import Images, Labels, NoGradientError, class_scores
from clat.threat import Threat, attack_output


def pass_seconds(
    model: nn.Module, data: Dataset, *, batch_size: int = 250, device: torch.device | str | None = None
) -> float:
    """Seconds that a forward and backward pass takes for an image here, measured in a few seconds."""
    with placed([model], device) as place:
        pixels, y = next(data.first(batch_size).to(place).batches(batch_size, workers=0))
        return seconds_of_images(model, to_unit(pixels), y)


def seconds_of_images(model: nn.Module, x: Images, y: Labels) -> float:
    """``pass_seconds`` on these images, which run together. The attack draws no random numbers."""
    found = 0.0
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
        attack_output(model, x, y, Threat(steps=1, start="zero"), keep="best").sum().item()
        return 4 / 3  # a pass and a forward pass, a third of one
    except (RuntimeError, NoGradientError):  # raised by autograd and by what has no derivative
        class_scores(model, x).sum().item()
        return 2 / 3
