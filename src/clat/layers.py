"""Which modules of a network are layers, and in which order they run."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clat.errors import InputError
from clat.network import Images, check_images, eager, first_tensor, held, hooked
from clat.shortcuts import is_shortcut

# Layers are the modules with a weight that mixes channels. Attention is one layer: its projections run inside it.
LAYER_TYPES = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)
NORM_TYPES = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


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


def trained_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that train now, read from ``requires_grad``, in the order of definition."""
    return {
        name: module
        for name, module in layer_modules(model).items()
        if any(parameter.requires_grad for parameter in module.parameters())
    }
