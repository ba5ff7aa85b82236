"""Networks by name: the paper's, any timm model, any factory of the user's. Normalisation lives inside the model."""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clat.errors import InputError
from clat.layers import bears_channels_last
from clat.models.densenet import dn121
from clat.models.mixed import MAPS, MixedClassifier
from clat.models.preact_resnet import preactrn18
from clat.models.resnet import rn18, rn50
from clat.models.vgg import vgg19
from clat.models.wide_resnet import rawrn70_16, wide_resnet


def _mixed(
    *, classes: int, channels: int, accurate: str | Mapping[str, Any], robust: str | Mapping[str, Any], **options: Any
) -> MixedClassifier:
    """Two networks by name or by arguments of ``build_model``; each may have a normalisation of its own inside."""
    specs = [{"name": spec} if isinstance(spec, str) else dict(spec) for spec in (accurate, robust)]
    bases = [build_model(**{**spec, "classes": classes, "channels": channels}) for spec in specs]
    maps = [[f"network.{name}" for name in MAPS.get(spec["name"], ())] for spec in specs]
    for spec, names in zip(specs, maps, strict=True):
        if options.get("alpha") == "learned" and not names:
            raise InputError(f"A learned alpha reads feature maps of {', '.join(MAPS)}, not of {spec['name']}.")
    return MixedClassifier(bases[0], bases[1], maps, channels=channels, **options)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "rn18": rn18,
    "rn50": rn50,
    "dn121": dn121,
    "vgg19": vgg19,
    "preactrn18": preactrn18,
    "wrn34-10": partial(wide_resnet, depth=34, width=10),
    "wrn70-16": partial(wide_resnet, depth=70, width=16),
    "rawrn70-16": rawrn70_16,
    "mixed": _mixed,
}


class Normalized(nn.Module):
    """A network that takes pixels in [0, 1] and normalises them itself, channel by channel."""

    mean: Tensor
    std: Tensor
    spec: dict[str, Any]  # the arguments of ``build_model`` that make the network again; in every checkpoint

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = network
        self.spec = {}
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Any:
        if x.shape[1:2] != self.mean.shape[:1]:  # one channel would silently be taken for each of three
            raise InputError(f"The network takes images with {len(self.mean)} channels; these have {x.shape[1]}.")
        return self.network((x - self.mean) / self.std)


def build_model(
    name: str,
    classes: int,
    *,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **options: Any,
) -> Normalized:
    """A classifier for images (batch, channels, height, width) with pixels in [0, 1].

    Args:
        name: one of ``MODELS``, ``timm/NAME``, or ``package.module:factory``; a factory is called with the options
            and, where it accepts them, ``classes`` (or ``num_classes``) and ``channels`` (or ``in_chans``)
        classes: number of classes
        channels: number of image channels
        mean, std: per-channel statistics of the pixels, subtracted and divided inside the model; default none
        options: passed to the network, e.g. ``width=16`` for rn18 or ``pretrained=True`` for timm
    Raises:
        InputError: an unknown name or option
    """
    try:
        if name in MODELS:
            network = MODELS[name](classes=classes, channels=channels, **options)
        elif name.startswith("timm/"):
            network = _timm(name.removeprefix("timm/"), classes, channels, options)
        elif ":" in name:
            network = _factory(name, classes, channels, options)
        else:
            raise InputError(
                f"There is no model {name!r}; choose one of {', '.join(MODELS)}, timm/NAME or package.module:factory."
            )
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"Model {name} does not take these options: {error}.") from error
    if ":" not in name and bears_channels_last(
        network
    ):  # a user's own forward may rely on the layout of its activations
        network = network.to(memory_format=torch.channels_last)
    zero, one = [0.0] * channels, [1.0] * channels
    model = Normalized(network, zero if mean is None else mean, one if std is None else std)
    model.spec = {"name": name, "classes": classes, "channels": channels, **options}
    return model


def mix(accurate: Normalized, robust: Normalized, **options: Any) -> Normalized:
    """The mixed classifier of copies of two networks that ``build_model`` made, with their weights.

    Args:
        options: those of ``MixedClassifier``, e.g. ``alpha=0.7`` or ``alpha="learned"``
    Raises:
        InputError: the networks have different classes or channels, or were not made by ``build_model``
    """
    for key in ("classes", "channels"):
        values = [model.spec.get(key) for model in (accurate, robust)]
        if values[0] is None or values[0] != values[1]:
            raise InputError(
                f"The two networks have {values[0]} and {values[1]} {key}; mix two from build_model alike."
            )
    specs = [{k: v for k, v in model.spec.items() if k != "pretrained"} for model in (accurate, robust)]
    classes, channels = specs[0]["classes"], specs[0]["channels"]
    model = build_model("mixed", classes, channels=channels, accurate=specs[0], robust=specs[1], **options)
    model.network.get_submodule("accurate").load_state_dict(accurate.state_dict())
    model.network.get_submodule("robust").load_state_dict(robust.state_dict())
    return model


def _timm(name: str, classes: int, channels: int, options: dict[str, Any]) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, num_classes=classes, in_chans=channels, **options)
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"timm could not make {name!r}: {error}.") from error


def _factory(name: str, classes: int, channels: int, options: dict[str, Any]) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's module may lie in the current folder
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"Model {name!r} could not be imported: {error}.") from error
    accepted = inspect.signature(factory).parameters
    for value, keys in ((classes, ("classes", "num_classes")), (channels, ("channels", "in_chans"))):
        for key in keys:
            if key in accepted:
                options = {key: value, **options}
                break
    network = factory(**options)
    if not isinstance(network, nn.Module):
        raise InputError(f"Model {name!r} returned {type(network).__name__}; it must return a torch.nn.Module.")
    return network
