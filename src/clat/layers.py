"""Which modules are layers, in the order they run, and how their outputs are observed inside a forward pass."""

import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clat.errors import InputError
from clat.inputs import nearest
from clat.network import Images, check_images, first_tensor, held
from clat.text import plain

WRAPPER = "network."  # what the names of all layers begin with in a network that ``build_model`` made

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


def layers(model: nn.Module, x: Images) -> dict[str, nn.Module]:
    """The layers that run on images x, dotted name -> module, in the order of their first execution.

    Raises:
        InputError: images of another shape or outside [0, 1], or no layer ran
    """
    check_images(x)
    return {call.name: call.module for call in trace(model, x)}


def named_layers(model: nn.Module, x: Images, names: Sequence[str]) -> dict[str, nn.Module]:
    """The layers of these names that run on images x; ``network.``, which ``build_model`` puts first, may be left out.

    Raises:
        InputError: a layer that the network has not
    """
    known = layers(model, x[:1])
    full = {name: name if name in known else f"{WRAPPER}{name}" for name in names}
    for name in names:
        if full[name] not in known:
            listed = [plain(layer.removeprefix(WRAPPER)) for layer in known]
            raise InputError(
                f"The network has no layer {plain(name)!r}; clat layers lists them: {', '.join(listed)}."
                f"{nearest(name, listed)}"
            )
    return {full[name]: known[full[name]] for name in names}


def trained_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that train now, read from ``requires_grad``, in the order of definition."""
    return {
        name: module
        for name, module in layer_modules(model).items()
        if any(parameter.requires_grad for parameter in module.parameters())
    }


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


def is_shortcut(name: str, module: nn.Module) -> bool:
    """True for the projection on a residual block's short path, which the paper's numbering leaves out."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return False
    pointwise = all(size == 1 for size in module.kernel_size)
    return bool(_SHORTCUT.search(name) or (pointwise and _POINTWISE_SHORTCUT.search(name)))


def eager(model: nn.Module, x: Images) -> Any:
    """What the network returns for x; not by way of ``torch.compile``, whose code does not run hooks."""
    return getattr(model, "_orig_mod", model)._call_impl(x)


@contextmanager
def hooked(handles: list[RemovableHandle]) -> Iterator[None]:
    """Removes the hooks afterwards; meanwhile attention takes the path on which hooks fire."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
