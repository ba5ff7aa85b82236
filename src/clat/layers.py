"""Which modules of a network are layers, and in which order they run."""

import re
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from clat.errors import InputError
from clat.inputs import nearest
from clat.network import Images, check_images, eager, first_tensor, held, hooked
from clat.text import plain

WRAPPER = "network."  # begins the names of all layers of a network that ``build_model`` made

# Layers are the modules with a weight that mixes channels. Attention is one layer: its projections run inside it.
LAYER_TYPES = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)
NORM_TYPES = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)

# Projection shortcuts by the names in use: kuangliu and TRADES (shortcut, convShortcut), torchvision and timm
# (downsample, there a 1x1 convolution; ConvNeXt's downsample on the main path is larger).
_SHORTCUT = re.compile(r"shortcut|skip", re.IGNORECASE)
_POINTWISE_SHORTCUT = re.compile(r"downsample", re.IGNORECASE)


@dataclass(frozen=True)
class Call:
    """One execution of a layer in a forward pass: a layer used twice has two.

    ``index`` is the paper's: 1-based, in execution order, projection shortcuts not counted (None).
    ``norm`` is the dotted name of the normalisation that takes the layer's output directly, if there is one.
    """

    name: str
    module: nn.Module
    index: int | None
    norm: str | None = None

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())


def find_layers(model: nn.Module, x: Images) -> dict[str, nn.Module]:
    """The layers that run on images x, dotted name -> module, in the order of their first execution.

    Raises:
        InputError: images of another shape or outside [0, 1], or no layer ran
    """
    check_images(x)
    return {call.name: call.module for call in trace(model, x)}


@torch.no_grad()
def trace(model: nn.Module, x: Images) -> list[Call]:
    """Runs the network once in eval mode and lists its layer calls in execution order.

    Raises:
        InputError: no convolution, linear layer or attention block ran
    """
    calls: list[Call] = []
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    norms = [module for module in names if isinstance(module, NORM_TYPES)]
    outputs: list[weakref.ref[Tensor]] = []

    def on_layer(name: str, module: nn.Module) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            index = None if is_shortcut(name, module) else 1 + sum(call.index is not None for call in calls)
            calls.append(Call(name, module, index))
            outputs.append(weakref.ref(first_tensor(output)))

        return hook

    def on_norm(module: nn.Module, inputs: Any) -> None:
        for number, output in enumerate(outputs):
            if inputs and inputs[0] is output():
                call = calls[number]
                calls[number] = Call(call.name, call.module, call.index, names[module])

    handles = [module.register_forward_hook(on_layer(name, module)) for name, module in layer_modules(model).items()]
    handles += [module.register_forward_pre_hook(on_norm) for module in norms]
    with held(model), hooked(handles):
        eager(model, x)
    if not calls:
        raise InputError(
            f"{type(model).__name__} ran no convolution, linear layer or attention block, so there is no layer to rank."
        )
    return calls


def layer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution, linear layer and attention block by dotted name, in the order of definition."""
    found: dict[str, nn.Module] = {}
    inside_attention: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, LAYER_TYPES) and module not in inside_attention:
            found[name] = module
            if isinstance(module, nn.MultiheadAttention):
                inside_attention.update(module.modules())
    return found


def is_shortcut(name: str, module: nn.Module) -> bool:
    """True for the projection on a residual block's short path, which the paper's numbering leaves out."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return False
    pointwise = all(size == 1 for size in module.kernel_size)
    return bool(_SHORTCUT.search(name) or (pointwise and _POINTWISE_SHORTCUT.search(name)))


def named_layers(model: nn.Module, x: Images, names: Sequence[str]) -> dict[str, nn.Module]:
    """The layers of these names that run on images x; ``network.``, which ``build_model`` puts first, may be left out.

    Raises:
        InputError: the network has no such layer
    """
    known = find_layers(model, x[:1])
    full = {name: name if name in known else f"{WRAPPER}{name}" for name in names}
    for name in names:
        if full[name] not in known:
            listed = [plain(layer.removeprefix(WRAPPER)) for layer in known]
            raise InputError(
                f"The network has no layer {plain(name)!r}; clat layers lists them: {', '.join(listed)}."
                f"{nearest(name, listed)}"
            )
    return {full[name]: known[full[name]] for name in names}


def matching(patterns: Sequence[str], names: Iterable[str], key: str) -> set[str]:
    """The layers whose names match a pattern, ``*`` being anything, as in ``*.se.*``; ``network.`` may be left out.

    Args:
        key: where the patterns stand, for messages
    Raises:
        InputError: a pattern that matches no layer, with the names near it
    """
    short = {name.removeprefix(WRAPPER): name for name in names}
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for bare, name in short.items() if fnmatchcase(bare, pattern) or fnmatchcase(name, pattern)}
        if not matched:
            near = sorted(short, key=lambda bare: -_likeness(pattern, bare))[:3]
            raise InputError(
                f"{key} has {plain(pattern)!r}, which matches no layer of the network; near it are "
                f"{', '.join(map(plain, near))}."
            )
        found |= matched
    return found


def _likeness(pattern: str, name: str) -> float:
    """How much a layer's name is like a pattern's longest piece without wildcards, from 0 to 1."""
    piece = max(re.split(r"[*?.\[\]]+", pattern), key=len)
    return max(SequenceMatcher(None, piece, part).ratio() for part in name.split("."))


def trained_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that train now, read from ``requires_grad``, in the order of definition."""
    return {
        name: module
        for name, module in layer_modules(model).items()
        if any(parameter.requires_grad for parameter in module.parameters())
    }
