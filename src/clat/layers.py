"""Which modules are layers, in the order they run, and how their outputs are observed inside a forward pass."""

import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from clat.errors import InputError
from clat.text import plain
from clat.threat import Cost, Images, check_images, held

At = Literal["output", "activation"]
Between = Callable[[Tensor, Tensor], Tensor]  # two features (batch, ...) -> how far apart they are (batch,)

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
            listed = plain(", ".join(known))
            raise InputError(f"The network has no layer {plain(name)!r}; clat layers lists them: {listed}.")
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
    with held(model), _hooked(handles):
        _eager(model, x)
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


def bears_channels_last(model: nn.Module) -> bool:
    """False if the CPU would compute wrong gradients, or crash, with the kernels stored channels-last.

    oneDNN's gradient of a strided 1x1 kernel writes past its memory if it has fewer input channels than a vector has
    numbers (uxlfoundation/oneDNN issue 6035, seen with torch 2.14).
    """
    vector = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return not any(
        layer.kernel_size == (1, 1) and max(layer.stride) > 1 and layer.in_channels // layer.groups < vector
        for layer in convolutions
    )


def logits(output: Any) -> Tensor:
    """The class scores (batch, classes) in what a classifier returns: a tensor, ``.logits``, a dict or a tuple."""
    if isinstance(output, Mapping):
        output = output.get("logits", output)
    scores = first_tensor(getattr(output, "logits", output))
    if scores.dim() != 2:
        raise InputError(
            f"The network returned shape {tuple(scores.shape)}; a classifier returns (batch, classes): end it with "
            "pooling and a linear layer."
        )
    return scores.float()


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast is off meanwhile, on devices that have it."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def first_tensor(output: Any) -> Tensor:
    """The first tensor in a module's output, which may be a tensor, a tuple, a list or a dict."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    for value in values if isinstance(values, (tuple, list, type({}.values()))) else ():
        if isinstance(value, Tensor):
            return value
    raise InputError(f"A layer or network returned {type(output).__name__} with no tensor in it.")


class _Stop(Exception):
    """Raised inside a forward pass once nothing after this point is needed."""


def observe(
    model: nn.Module,
    x: Images,
    modules: Mapping[str, nn.Module],
    visit: Callable[[int, Tensor], None],
    *,
    at: At = "output",
    stop_after: int | None = None,
) -> Tensor | None:
    """Runs ``model(x)`` and hands each output of ``modules`` to ``visit(number, feature)`` while it is there.

    Features come with the images along the first dimension. Calls are numbered from 0 in execution order, over all
    modules. With ``at="activation"`` a number may be visited up to three times, as the feature passes its
    normalisation and its activation: the last visit counts.

    Args:
        stop_after: leave the network once this many calls were observed
    Returns:
        the network's class scores (batch, classes), or None if it was left early
    """
    seen = 0
    follow = _Follow(visit, stop_after) if at == "activation" else None

    def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal seen
        feature = first_tensor(output)
        by_image = partial(_by_image, images=len(x), module=module)
        visit(seen, by_image(feature))
        if follow is not None:
            follow.add(seen, feature, by_image)
        seen += 1
        if follow is None and seen == stop_after:
            raise _Stop

    with _hooked([module.register_forward_hook(hook) for module in modules.values()]), follow or nullcontext():
        try:
            return logits(_eager(model, x))
        except _Stop:
            return None


def _eager(model: nn.Module, x: Images) -> Any:
    """What the network returns for x; not by way of ``torch.compile``, whose code does not run hooks."""
    return getattr(model, "_orig_mod", model)._call_impl(x)


def lengths(feature: Tensor) -> Tensor:
    """The l2 norm of each row of a tensor (batch, ...), shape (batch,); its gradient at zero is zero."""
    return torch.linalg.vector_norm(feature, dim=tuple(range(1, feature.dim())))


def l2(first: Tensor, second: Tensor) -> Tensor:
    """The l2 distance of two features (batch, ...), image by image (batch,): Eq. 7."""
    return lengths(second - first)


def record(
    model: nn.Module,
    x: Images,
    modules: Mapping[str, nn.Module],
    *,
    at: At = "output",
    stop_after: int | None = None,
) -> tuple[Tensor | None, dict[int, Tensor]]:
    """Class scores and the modules' features; cloned, since a later module may change them in place.

    With ``stop_after``, the number of calls of the modules, the network is left after the last and gives no scores.
    """
    features: dict[int, Tensor] = {}

    def visit(number: int, feature: Tensor) -> None:
        features[number] = feature.clone()

    return observe(model, x, modules, visit, at=at, stop_after=stop_after), features


def compare(
    model: nn.Module,
    x: Images,
    modules: Mapping[str, nn.Module],
    recorded: Mapping[int, Tensor],
    between: Between = l2,
    *,
    at: At = "output",
    whole: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """Sum over the modules' calls of ``between(recorded feature, feature of x)``, image by image (batch,).

    The network runs only as far as its deepest module; the class scores come with it if the ``whole`` network ran.
    """
    distances: dict[int, Tensor] = {}

    def visit(number: int, feature: Tensor) -> None:
        distances[number] = between(recorded[number].float(), feature.float())

    scores = observe(model, x, modules, visit, at=at, stop_after=None if whole else len(recorded))
    return scores if whole else None, torch.stack(list(distances.values())).sum(0)


def feature_distance(
    model: nn.Module,
    x: Images,
    modules: Mapping[str, nn.Module],
    between: Between = l2,
    *,
    at: At = "output",
    mode: Literal["eval", "batch", "train"] = "eval",
    calls: int | None = None,
) -> Cost:
    """What an attack on features ascends: images z -> how far the modules' features of z are from those of x (batch,).

    Args:
        x: images whose features are taken now, without gradients
        mode: how the network runs meanwhile
        calls: how often the modules run in a forward pass, if that is known; else the network runs to its end once
    """
    with held(model, mode), torch.no_grad():
        _, recorded = record(model, x, modules, at=at, stop_after=calls)
    return lambda z: compare(model, z, modules, recorded, between, at=at)[1]


_CASTS = {"to"}  # around BatchNorm as attacks run it in bf16
_NORMS = {"addcmul", "batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"}
_ACTIVATIONS = {
    *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "celu", "gelu", "silu", "mish"),
    *("hardswish", "hardtanh", "softplus", "prelu", "sigmoid", "tanh"),
}
_WEIGHTED = {"conv1d", "conv2d", "conv3d", "linear", "multi_head_attention_forward", "scaled_dot_product_attention"}


class _Follow(TorchFunctionMode):
    """Follows a layer's output through the normalisation and activation applied to it, as modules or as functions."""

    def __init__(self, visit: Callable[[int, Tensor], None], stop_after: int | None):
        super().__init__()
        self.visit, self.stop_after = visit, stop_after
        self.followed: dict[int, tuple[weakref.ref[Tensor], int, Callable[[Tensor], Tensor]]] = {}
        self.complete = False

    def add(self, number: int, feature: Tensor, by_image: Callable[[Tensor], Tensor]) -> None:
        self.followed[id(feature)] = (weakref.ref(feature), number, by_image)
        self.complete = number + 1 == self.stop_after

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if self.complete and name in _WEIGHTED:
            raise _Stop
        place = 1 if name == "addcmul" else 0  # BatchNorm as attacks run it: clat.threat.fixed_norms
        tensor = args[place] if len(args) > place and isinstance(args[place], Tensor) else None
        reference, number, by_image = self.followed.get(id(tensor), (None, -1, None))
        output = func(*args, **(kwargs or {}))
        if reference is None or by_image is None or reference() is not tensor or not isinstance(output, Tensor):
            return output
        if name in _NORMS or (name in _CASTS and output is not tensor):
            self.visit(number, by_image(output))
            self.followed[id(output)] = (weakref.ref(output), number, by_image)
        elif name in _ACTIVATIONS:
            self.visit(number, by_image(output))
            if self.complete and number + 1 == self.stop_after:
                raise _Stop
        return output


def _by_image(feature: Tensor, *, images: int, module: nn.Module) -> Tensor:
    """The feature with one row an image, whether it was sequence-first or cut each image into windows."""
    sequence_first = isinstance(module, nn.MultiheadAttention) and not module.batch_first
    if feature.dim() > 1 and feature.shape[1] == images and (sequence_first or feature.shape[0] % images):
        feature = feature.transpose(0, 1)
    if feature.dim() < 2 or feature.shape[0] % images:
        raise InputError(
            f"A {type(module).__name__} returned shape {tuple(feature.shape)} for {images} images, so its features "
            "cannot be told apart by image."
        )
    return feature if feature.shape[0] == images else feature.unflatten(0, (images, -1))


@contextmanager
def _hooked(handles: list[RemovableHandle]) -> Iterator[None]:
    """Removes the hooks afterwards; meanwhile attention takes the path on which hooks fire."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
