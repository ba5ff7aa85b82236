"""Networks by name: the paper's, any of timm or torchvision, any factory of the user's, which the user names."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clat.compute import works_in_channels_last
from clat.errors import InputError
from clat.models.bridges import from_factory, from_timm, from_torchvision
from clat.models.densenet import dn121
from clat.models.mixed import MAPS, MixedClassifier
from clat.models.normalisation import Numbers, own_statistics, statistics
from clat.models.preact_resnet import preactrn18
from clat.models.resnet import rn18, rn50
from clat.models.spec import recorded
from clat.models.vgg import vgg19
from clat.models.wide_resnet import rawrn70_16, wide_resnet
from clat.text import plain


class Normalized(nn.Module):
    """A network that takes pixels in [0, 1] and normalises them itself, channel by channel."""

    mean: Tensor
    std: Tensor
    spec: dict[str, Any]  # the arguments of ``build_model`` that make the network again; in every checkpoint
    source: str  # where mean and std come from, in words; empty if from a file

    def __init__(self, network: nn.Module, mean: Numbers, std: Numbers):
        super().__init__()
        self.network = network
        self.spec = {}
        self.source = ""
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Any:
        if x.shape[1:2] != self.mean.shape[:1]:  # one value would silently be used for all three channels
            raise InputError(f"The network takes images with {len(self.mean)} channels; these have {x.shape[1]}.")
        return self.network((x - self.mean) / self.std)


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


def build_model(
    name: str,
    classes: int,
    *,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    normalise: str | None = None,
    **options: Any,
) -> Normalized:
    """A classifier for images (batch, channels, height, width) with pixels in [0, 1].

    Args:
        name: one of ``MODELS``, ``timm/NAME``, ``torchvision/NAME``, or a factory of yours, ``file.py:factory`` or
            ``package.module:factory``, which is imported and called with the options and, where it accepts them,
            ``classes`` (or ``num_classes``) and ``channels`` (or ``in_chans``)
        classes: number of classes
        channels: number of image channels
        mean, std: per-channel statistics of the pixels, subtracted and divided inside the model
        normalise: ``none``, ``data`` (by mean and std), ``imagenet``, or numbers as ``MEAN;STD``, one a channel with
            slashes between them, e.g. ``0.5/0.5/0.5;0.25/0.25/0.25``. Default: by mean and std where they are given;
            without them a timm network with ``pretrained=True`` as it was trained, any other not at all
        options: passed to the network, e.g. ``width=16`` for rn18 or ``pretrained=True`` for timm
    Raises:
        InputError: an unknown name or option, or a factory that fails
    """
    for key, count in (("classes", classes), ("channels", channels)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise InputError(f"{key} is {plain(count)}; it is a whole number of 1 or more.")
    network = _network(name, classes, channels, options)
    own = own_statistics(network) if name.startswith("timm/") and options.get("pretrained") else None
    mean, std, source = statistics(normalise, mean, std, channels, own)
    inside = [spec for spec in (options.get("accurate"), options.get("robust")) if isinstance(spec, Mapping)]
    if name == "mixed" and source and any(spec.get("pretrained") or spec.get("normalise") for spec in inside):
        raise InputError(
            "A network in this mixed classifier normalises by itself; build the whole without mean and std."
        )
    model = Normalized(network, mean, std)
    model.spec = {"name": name, "classes": classes, "channels": channels, **options}
    model.source = source
    return model


def _network(name: str, classes: int, channels: int, options: dict[str, Any]) -> nn.Module:
    """The network of this name, by default with random weights, without a normalisation around it."""
    try:
        if name in MODELS:
            network = MODELS[name](classes=classes, channels=channels, **options)
        elif name.startswith("timm/"):
            network = from_timm(name.removeprefix("timm/"), classes, channels, options)
        elif name.startswith("torchvision/"):
            network = from_torchvision(name.removeprefix("torchvision/"), classes, channels, options)
        elif name.startswith("transformers/"):
            raise InputError("Networks of transformers cannot be built yet; name a factory of yours that makes one.")
        elif ":" in name:
            return from_factory(name, classes, channels, options)  # its own forward may rely on a memory layout
        else:
            raise InputError(
                f"There is no model {name!r}; choose one of {', '.join(MODELS)}, timm/NAME, torchvision/NAME, "
                "file.py:factory or package.module:factory."
            )
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"Model {name} does not take these options: {error}.") from error
    return network.to(memory_format=torch.channels_last) if works_in_channels_last(network) else network


def takes_statistics(name: str, options: Mapping[str, Any]) -> bool:
    """Whether a network by name normalises by the data's statistics: if told to, or by default if clat makes it with
    random weights. A factory's network is taken as it is."""
    if options.get("normalise") is not None:
        return options["normalise"] == "data"
    return name in MODELS or (name.startswith(("timm/", "torchvision/")) and not options.get("pretrained"))


def normalisation_of(model: nn.Module) -> str:
    """How a network normalises the pixels, in words."""
    if not isinstance(model, Normalized):
        return "none by clat, the network takes pixels in [0, 1] as they are"
    if isinstance(model.network, MixedClassifier):
        parts = {part: model.network.get_submodule(part) for part in ("accurate", "robust")}
        inside = "; ".join(f"{part}: {normalisation_of(network)}" for part, network in parts.items())
        return inside if _is_identity(model) else f"{_numbers(model)}, then {inside}"
    if _is_identity(model):
        return "none, the network takes pixels in [0, 1] as they are"
    return _numbers(model) + (f" ({model.source})" if model.source else "")


def _is_identity(model: Normalized) -> bool:
    return not model.mean.any() and bool((model.std == 1).all())


def _numbers(model: Normalized) -> str:
    mean, std = (
        "/".join([f"{value:.4g}" for value in values[:4]] + ["..."] * (len(values) > 4))
        for values in (model.mean.flatten().tolist(), model.std.flatten().tolist())
    )
    return f"mean {mean}, std {std}"


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
    specs = [recorded(model.spec) for model in (accurate, robust)]
    classes, channels = specs[0]["classes"], specs[0]["channels"]
    model = build_model("mixed", classes, channels=channels, accurate=specs[0], robust=specs[1], **options)
    model.network.get_submodule("accurate").load_state_dict(accurate.state_dict())
    model.network.get_submodule("robust").load_state_dict(robust.state_dict())
    return model
