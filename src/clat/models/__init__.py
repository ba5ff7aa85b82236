"""Networks by name: the paper's, those of timm, torchvision and transformers, and what a factory of yours makes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clat.compute import works_in_channels_last
from clat.errors import InputError
from clat.models.bridges import Bridged, from_factory, from_timm, from_torchvision
from clat.models.densenet import dn121
from clat.models.hugging_face import from_transformers
from clat.models.mixed import MAPS, MixedClassifier
from clat.models.normalisation import Numbers, normalises, statistics
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
    notes: tuple[str, ...]  # sentences on what was assumed when it was made
    new_head: bool  # whether the head has random weights, although the rest was pre-trained

    def __init__(self, network: nn.Module, mean: Numbers, std: Numbers):
        super().__init__()
        self.network = network
        self.spec = {}
        self.source = ""
        self.notes = ()
        self.new_head = False
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
        name: one of ``MODELS``, ``timm/NAME``, ``torchvision/NAME``, ``transformers/NAME`` (on the Hugging Face hub, or
            a folder), or a factory of yours, ``file.py:factory`` or ``package.module:factory``, which is imported and
            called with the options and, where it accepts them, ``classes`` (or ``num_classes``) and ``channels`` (or
            ``in_chans``)
        classes: number of classes
        channels: number of image channels
        mean, std: per-channel statistics of the pixels, subtracted and divided inside the model
        normalise: ``none``, ``data`` (by mean and std), ``imagenet``, or numbers as ``MEAN;STD``, one a channel with
            slashes between them, e.g. ``0.5/0.5/0.5;0.25/0.25/0.25``. Default: by mean and std where they are given;
            without them a network with ``pretrained=True`` as it was trained, any other not at all
        options: passed to the network, e.g. ``width=16`` for rn18; ``pretrained=True`` for the weights that timm,
            torchvision or the hub have for it. Its head is a new one if it is for another number of classes; ``notes``
            of the network says so
    Raises:
        InputError: an unknown name or option, a hub that cannot be reached, or a factory that fails
    """
    for key, count in (("classes", classes), ("channels", channels)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise InputError(f"{key} is {plain(count)}; it is a whole number of 1 or more.")
    made = _network(name, classes, channels, options)
    own = made.own() if made.own and normalise is None and mean is None else None
    mean, std, source = statistics(normalise, mean, std, channels, own)
    if source and ":" in name and (twice := normalises(made.network)):
        raise InputError(
            f"{plain(name)} normalises by itself (in {plain(twice)}); leave the normalisation out here, or there."
        )
    inside = [spec for spec in (options.get("accurate"), options.get("robust")) if isinstance(spec, Mapping)]
    if name == "mixed" and source and any(spec.get("pretrained") or spec.get("normalise") for spec in inside):
        raise InputError(
            "A network in this mixed classifier normalises by itself; build the whole without mean and std."
        )
    model = Normalized(made.network, mean, std)
    model.spec = {"name": name, "classes": classes, "channels": channels, **made.options}
    model.source, model.new_head = source, made.new_head
    model.notes = (made.head,) if made.head else ()
    return model


BRIDGES: dict[str, Callable[[str, int, int, dict[str, Any]], Bridged]] = {
    "timm/": from_timm,
    "torchvision/": from_torchvision,
    "transformers/": from_transformers,
}


def bridge(name: str) -> str | None:
    """The beginning of a name that tells which other library's network it is, such as ``timm/``; None if no other's."""
    return next((prefix for prefix in BRIDGES if name.startswith(prefix)), None)


def _network(name: str, classes: int, channels: int, options: dict[str, Any]) -> Bridged:
    """The network of this name, by default with random weights, without a normalisation around it."""
    library = bridge(name)
    try:
        if name in MODELS:
            made = Bridged(MODELS[name](classes=classes, channels=channels, **options), options=options)
        elif library is not None:
            made = BRIDGES[library](name.removeprefix(library), classes, channels, options)
        elif ":" in name:
            return from_factory(name, classes, channels, options)  # its own forward may rely on a memory layout
        else:
            raise InputError(f"There is no model {name!r}; choose one of {known_names()}.")
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"Model {name} does not take these options: {error}.") from error
    if works_in_channels_last(made.network):
        made.network.to(memory_format=torch.channels_last)
    return made


def known_names() -> str:
    """The names that ``build_model`` takes, in words."""
    others = [f"{library}NAME" for library in BRIDGES]
    return f"{', '.join([*MODELS, *others])}, file.py:factory or package.module:factory"


def takes_statistics(name: str, options: Mapping[str, Any]) -> bool:
    """Whether a network by name normalises by the data's statistics: if told to, or by default if clat makes it with
    random weights. A factory's network is taken as it is."""
    if options.get("normalise") is not None:
        return options["normalise"] == "data"
    return name in MODELS or (bridge(name) is not None and not options.get("pretrained"))


def normalisation_of(model: nn.Module) -> str:
    """How a network normalises the pixels, in words."""
    inside = normalises(model.network if isinstance(model, Normalized) else model)
    alone = f"none by clat; the network has a mean and a std of its own (in {plain(inside)})"
    if not isinstance(model, Normalized):
        return alone if inside else "none by clat, the network takes pixels in [0, 1] as they are"
    if isinstance(model.network, MixedClassifier):
        parts = {part: model.network.get_submodule(part) for part in ("accurate", "robust")}
        inside = "; ".join(f"{part}: {normalisation_of(network)}" for part, network in parts.items())
        return inside if _is_identity(model) else f"{_numbers(model)}, then {inside}"
    if _is_identity(model):
        return alone if inside else "none, the network takes pixels in [0, 1] as they are"
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
