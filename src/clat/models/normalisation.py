"""The mean and std that a network subtracts and divides by: given, those of the data, or those of its pre-training."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
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


def of_timm(network: nn.Module) -> tuple[Numbers, Numbers]:
    """Mean and std that a timm network was pre-trained with; their average where it now has other channels."""
    found: Any = getattr(network, "pretrained_cfg", None) or {}
    mean, std = found.get("mean", IMAGENET[0]), found.get("std", IMAGENET[1])
    channels = next(module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d))
    if len(mean) != channels:
        mean, std = [sum(mean) / len(mean)] * channels, [sum(std) / len(std)] * channels
    return mean, std


def of_torchvision(weights: Any) -> tuple[Numbers, Numbers]:
    """Mean and std in the transforms that torchvision gives with its weights."""
    transforms = weights.transforms()
    return transforms.mean, transforms.std


def of_preprocessor(folder: Path, name: str) -> tuple[Numbers, Numbers]:
    """Mean and std that make of pixels in [0, 1] what ``preprocessor_config.json`` in a folder makes of 0 to 255.

    Args:
        name: of the network, for messages
    Raises:
        InputError: no such file, or one that does more to the colours than a mean and a std can
    """
    try:
        found = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        more = [key for key, value in found.items() if key.startswith("do_") and value and key not in _HARMLESS]
        if more:
            raise InputError(
                f"{plain(name)} was trained with {plain(more[0])}, which clat does not do to its images; give it a "
                "normalisation by normalise=, or make the network in a factory of yours that does it."
            )
        scale = 255 * found.get("rescale_factor", 1 / 255) if found.get("do_rescale", True) else 255.0
        offset = 1.0 if found.get("rescale_offset", False) else 0.0
        normal = found.get("do_normalize", True)
        mean, std = (found["image_mean"], found["image_std"]) if normal else ([0.0] * 3, [1.0] * 3)
        if found.get("include_top", "EfficientNet" in str(found.get("image_processor_type"))):
            std = [value * other for value, other in zip(std, found["image_std"], strict=True)]  # a second time
        return [(value + offset) / scale for value in mean], [value / scale for value in std]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{plain(name)} does not say how it normalises (no mean and std in preprocessor_config.json); add "
            "normalise=imagenet, normalise=MEAN;STD or normalise=none."
        ) from error


_HARMLESS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


def normalises(network: nn.Module) -> str | None:
    """The name of a module in a network that has a mean and a std, as those that normalise do; None if none has."""
    for name, module in network.named_modules():
        held = {*vars(module), *module._parameters, *module._buffers}
        if any({mean, std} <= held for mean, std in (("mean", "std"), ("mu", "sigma"))):
            return name or type(module).__name__
    return None


def _written(normalise: Any) -> tuple[list[float], list[float]]:
    """The numbers in MEAN;STD."""
    with suppress(ValueError):
        mean, std = ([float(number) for number in part.split("/")] for part in str(normalise).split(";"))
        return mean, std
    raise InputError(
        f"normalise is {plain(normalise)!r}; choose none, data, imagenet or numbers as MEAN;STD, one a channel, e.g. "
        "0.5/0.5/0.5;0.25/0.25/0.25."
    )
