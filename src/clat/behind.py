"""Running only the part of a network that lies behind a layer's input."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from clat.errors import InputError
from clat.network import Images, eager, hooked


class _Reached(Exception):
    """Raised inside a forward pass that has reached the layer."""


@dataclass
class Front:
    """What a network had computed when it first reached a layer; filled during a forward pass.

    outputs: the modules that had returned by then, the outermost ones only, each with its output at each call.
    """

    layer: nn.Module
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[tuple[nn.Module, Any]] = field(default_factory=list)

    @property
    def feature(self) -> Tensor:
        """The layer's input (batch, ...)."""
        if not self.inputs:
            raise InputError("The network did not run the layer, or gave it no tensor by position.")
        return self.inputs[0]


@contextmanager
def watched(model: nn.Module, layer: nn.Module) -> Iterator[Front]:
    """Records what precedes the layer in the forward pass inside the block."""
    front = Front(layer)
    began: list[int] = []  # for each module that is running, how many outputs there were before it
    reached = False

    def before(module: nn.Module, inputs: Any) -> None:
        nonlocal reached
        if module is layer and not reached:
            reached = True
            front.inputs.extend(entry.clone() for entry in inputs[:1] if isinstance(entry, Tensor))
        began.append(len(front.outputs))

    def after(module: nn.Module, _inputs: Any, output: Any) -> None:
        number = began.pop()
        if not reached:
            del front.outputs[number:]  # what ran inside it need not be known
            front.outputs.append((module, _copied(output)))

    inner = [module for module in model.modules() if module is not model]
    handles = [module.register_forward_pre_hook(before) for module in inner]
    handles += [module.register_forward_hook(after) for module in inner]
    with hooked(handles):
        yield front


def front_of(model: nn.Module, x: Images, layer: nn.Module) -> Front:
    """The outputs of what precedes the layer, for images x; the pass ends at the layer."""

    def stop(_module: nn.Module, _inputs: Any) -> None:
        raise _Reached

    with watched(model, layer) as front, hooked([layer.register_forward_pre_hook(stop)]), suppress(_Reached):
        eager(model, x)
    return front


@contextmanager
def behind(model: nn.Module, front: Front, feature: Tensor) -> Iterator[None]:
    """Inside the block, forward passes reuse the outputs of what precedes the layer, and the layer takes another input.

    Only the layer's own input is another: a shortcut past the layer carries what it had.

    Args:
        feature: like ``front.feature``, cast to its type
    """
    returned: dict[nn.Module, list[Any]] = {}
    for module, output in front.outputs:
        returned.setdefault(module, []).append(output)
    usual = {module: vars(module).get("forward") for module in returned}  # which fixed_norms may have set
    taken: dict[nn.Module, int] = {}
    whole = getattr(model, "_orig_mod", model)  # what ``eager`` runs

    def start(_module: nn.Module, _inputs: Any) -> None:
        taken.clear()

    def change(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if module in taken:
            return None  # a later call of a layer that runs twice
        taken[module] = 1
        other = feature.to(front.feature.dtype)
        return tuple(other if entry is inputs[0] else entry for entry in inputs)  # attention takes one thrice

    for module, outputs in returned.items():
        vars(module)["forward"] = _returning(module, outputs, taken, module.forward)
    try:
        with hooked([whole.register_forward_pre_hook(start), front.layer.register_forward_pre_hook(change)]):
            yield
    finally:
        for module, forward in usual.items():
            if forward is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward


def _returning(
    module: nn.Module, outputs: list[Any], taken: dict[nn.Module, int], forward: Callable[..., Any]
) -> Callable[..., Any]:
    """A forward that returns these outputs, one a call, and then runs the module itself."""

    def returns(*args: Any, **kwargs: Any) -> Any:
        number = taken.get(module, 0)
        taken[module] = number + 1
        return _copied(outputs[number]) if number < len(outputs) else forward(*args, **kwargs)

    return returns


def _copied(output: Any) -> Any:
    """An output that may be changed in place without changing the first one."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, (tuple, list)):
        return type(output)(map(_copied, output)) if type(output) in (tuple, list) else output
    return {key: _copied(value) for key, value in output.items()} if isinstance(output, Mapping) else output
