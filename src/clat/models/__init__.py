"""Networks by name: the paper's, any of timm or torchvision, any factory of the user's, which the user names.

Normalisation lives inside the model.
"""

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from clat.compute import bears_channels_last
from clat.errors import InputError
from clat.models.densenet import dn121
from clat.models.mixed import MAPS, MixedClassifier
from clat.models.preact_resnet import preactrn18
from clat.models.resnet import rn18, rn50
from clat.models.spec import recorded
from clat.models.vgg import vgg19
from clat.models.wide_resnet import rawrn70_16, wide_resnet
from clat.text import plain

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std of its training images, as torchvision has them


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
    source: str  # whence mean and std, in words; empty where a file had them

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = network
        self.spec = {}
        self.source = ""
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
    try:
        if name in MODELS:
            network = MODELS[name](classes=classes, channels=channels, **options)
        elif name.startswith("timm/"):
            network = _timm(name.removeprefix("timm/"), classes, channels, options)
        elif name.startswith("torchvision/"):
            network = _torchvision(name.removeprefix("torchvision/"), classes, channels, options)
        elif name.startswith("transformers/"):
            raise InputError("Networks of transformers cannot be built yet; name a factory of yours that makes one.")
        elif ":" in name:
            network = _factory(name, classes, channels, options)
        else:
            raise InputError(
                f"There is no model {name!r}; choose one of {', '.join(MODELS)}, timm/NAME, torchvision/NAME, "
                "file.py:factory or package.module:factory."
            )
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"Model {name} does not take these options: {error}.") from error
    if ":" not in name and bears_channels_last(
        network
    ):  # a user's own forward may rely on the layout of its activations
        network = network.to(memory_format=torch.channels_last)
    mean, std, source = _statistics(normalise, mean, std, channels, _own_statistics(name, network, options))
    inside = [spec for spec in (options.get("accurate"), options.get("robust")) if isinstance(spec, Mapping)]
    if name == "mixed" and source and any(spec.get("pretrained") or spec.get("normalise") for spec in inside):
        raise InputError(
            "A network in this mixed classifier normalises by itself; build the whole without mean and std."
        )
    model = Normalized(network, mean, std)
    model.spec = {"name": name, "classes": classes, "channels": channels, **options}
    model.source = source
    return model


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


def _statistics(
    normalise: str | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    channels: int,
    own: tuple[Sequence[float], Sequence[float]] | None,
) -> tuple[Sequence[float], Sequence[float], str]:
    """Mean, std and whence they are, in words."""
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


def _written(normalise: Any) -> tuple[list[float], list[float]]:
    """The numbers in MEAN;STD."""
    with suppress(ValueError):
        mean, std = ([float(number) for number in part.split("/")] for part in str(normalise).split(";"))
        return mean, std
    raise InputError(
        f"normalise is {plain(normalise)!r}; choose none, data, imagenet or numbers as MEAN;STD, one a channel, e.g. "
        "0.5/0.5/0.5;0.25/0.25/0.25."
    )


def _own_statistics(
    name: str, network: nn.Module, options: Mapping[str, Any]
) -> tuple[Sequence[float], Sequence[float]] | None:
    """Mean and std that a timm network was pre-trained with; their mean over the channels where it has others now."""
    if not name.startswith("timm/") or not options.get("pretrained"):
        return None
    found: Any = getattr(network, "pretrained_cfg", None) or {}
    mean, std = found.get("mean", IMAGENET[0]), found.get("std", IMAGENET[1])
    channels = next(module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d))
    if len(mean) != channels:
        mean, std = [sum(mean) / len(mean)] * channels, [sum(std) / len(std)] * channels
    return mean, std


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


def _timm(name: str, classes: int, channels: int, options: dict[str, Any]) -> nn.Module:
    import timm

    if options.get("checkpoint_path"):
        raise InputError(f"Bring the weights in with clat import FILE --model timm/{name}, not with checkpoint_path.")
    try:
        return timm.create_model(name, num_classes=classes, in_chans=channels, **options)
    except (RuntimeError, ValueError, OSError, AssertionError) as error:
        raise InputError(f"timm could not make {name!r}: {error}.") from error


def _torchvision(name: str, classes: int, channels: int, options: dict[str, Any]) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise InputError(f"torchvision has no classifier {plain(name)!r}.")
    if options.get("weights") or options.get("pretrained"):
        raise InputError(
            f"Weights of torchvision come in with clat import FILE --model torchvision/{name}; timm/NAME has "
            "pretrained=true."
        )
    if channels != 3:
        raise InputError(f"Networks of torchvision take images with 3 channels; these have {channels}.")
    return models.get_model(name, weights=None, num_classes=classes, **options)


def _factory(name: str, classes: int, channels: int, options: dict[str, Any]) -> nn.Module:
    """The network that code of the user's makes; only ever called with a name that the user gave in this call."""
    place, _, attribute = name.rpartition(":")
    file = Path(place) if place.endswith(".py") else None
    with _importable(file.parent if file else Path()):
        try:
            factory = getattr(_executed(file) if file else importlib.import_module(place), attribute)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"Model {plain(name)!r} could not be imported: {plain(error)}.") from error
        try:
            accepted = inspect.signature(factory).parameters
            for value, keys in ((classes, ("classes", "num_classes")), (channels, ("channels", "in_chans"))):
                for key in keys:
                    if key in accepted:
                        options = {key: value, **options}
                        break
            network = factory(**options)
        except Exception as error:
            said = f"{type(error).__name__}: {plain(error)}" if str(error) else type(error).__name__
            raise InputError(f"Model {plain(name)!r} failed with the options {options}: {said}.") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"Model {name!r} returned {type(network).__name__}; it must return a torch.nn.Module.")
    return network


def _executed(file: Path) -> ModuleType:
    """A Python file as a module, under a name that no other module can have."""
    if not file.is_file():
        raise InputError(f"There is no Python file at {plain(file)}.")
    name = f"_clat_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
    described = importlib.util.spec_from_file_location(name, file)
    assert described is not None
    assert described.loader is not None
    module = importlib.util.module_from_spec(described)
    sys.modules[name] = module  # dataclasses look their module up
    described.loader.exec_module(module)
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Lets the user's code import what lies beside it, and nothing thereafter."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(entry)
