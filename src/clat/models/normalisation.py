"""The mean and std that a network subtracts and divides by: given, those of the data, or those of its pre-training."""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from clat.errors import InputError
from clat.text import plain

Numbers = Sequence[float]  # one a channel

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std of its training images, as torchvision has them


def statistics(
    normalise: str | None,
    mean: Numbers | None,
    std: Numbers | None,
    channels: int,
    own: tuple[Numbers, Numbers] | None,
) -> tuple[Numbers, Numbers, str]:
    """Mean, std and where they come from, in words.

    Args:
        normalise: as for ``build_model``
        mean, std: the statistics of the data, where they are given
        own: those that the network was pre-trained with
    """
    if (mean is None) != (std is None):
        raise InputError("Give both mean and std, or neither.")
    given = (mean, std) if mean is not None and std is not None else None
    if given is not None and normalise not in (None, "data"):
        raise InputError(f"Both normalise={plain(normalise)} and the statistics of the data are given; give one.")
    chosen, source = given, "as given" if normalise is None else "statistics of the data"
    if given is None and normalise == "data":
        raise InputError("normalise=data needs the mean and std of the data, which are not known here.")
    if given is None and normalise is None:
        chosen, source = own, "as it was pre-trained"
    elif normalise == "imagenet":
        chosen, source = IMAGENET, "those of ImageNet"
    elif normalise not in (None, "data", "none"):
        chosen, source = _written(normalise), "as given"
    if chosen is None:
        return [0.0] * channels, [1.0] * channels, ""
    for key, values in zip(("mean", "std"), chosen, strict=True):
        if len(values) != channels or not all(map(math.isfinite, values)) or (key == "std" and not min(values) > 0):
            raise InputError(
                f"The normalisation's {key} is {'/'.join(f'{value:g}' for value in values)}; give one number a channel "
                f"({channels}), std above 0."
            )
    return *chosen, source


def own_statistics(network: nn.Module) -> tuple[Numbers, Numbers]:
    """Mean and std that a timm network was pre-trained with; their average where it now has other channels."""
    found: Any = getattr(network, "pretrained_cfg", None) or {}
    mean, std = found.get("mean", IMAGENET[0]), found.get("std", IMAGENET[1])
    channels = next(module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d))
    if len(mean) != channels:
        mean, std = [sum(mean) / len(mean)] * channels, [sum(std) / len(std)] * channels
    return mean, std


def _written(normalise: Any) -> tuple[list[float], list[float]]:
    """The numbers in MEAN;STD."""
    with suppress(ValueError):
        mean, std = ([float(number) for number in part.split("/")] for part in str(normalise).split(";"))
        return mean, std
    raise InputError(
        f"normalise is {plain(normalise)!r}; choose none, data, imagenet or numbers as MEAN;STD, one a channel, e.g. "
        "0.5/0.5/0.5;0.25/0.25/0.25."
    )
