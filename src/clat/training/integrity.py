"""Checks that frozen tensors did not change in any bit and that selected weights did."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from clat.layers import layer_modules
from clat.network import State, fingerprint, same_bits, tensors
from clat.tuners.selection import Selection


class IntegrityError(RuntimeError):
    """A frozen tensor changed or a selected weight did not; the message names it."""


def verify(model: nn.Module, selection: Selection, before: State) -> None:
    """Compares the network with a snapshot from before training under ``selection``.

    Raises:
        IntegrityError: a frozen parameter or buffer changed, the weight of a selected layer did not move, or a tensor
            appeared or vanished
    """
    now = tensors(model)
    if vanished := before.keys() - now.keys():
        raise IntegrityError(f"{min(vanished)} is gone since the last check; a network keeps its tensors in training.")
    if appeared := now.keys() - before.keys():
        raise IntegrityError(
            f"{min(appeared)} has appeared since the last check; a network keeps its tensors in training (build what a "
            "layer needs before training begins)."
        )
    free = set(selection.trainable) | selection.moving_buffers(model)
    selected = tuple(name + "." for name in selection.layers)
    for name, tensor in now.items():
        same = same_bits(tensor, before[name])
        if name not in free and not same:
            buffer = name in dict(model.named_buffers())
            cause = "call model.eval() before passes of your own" if buffer else "something else writes to it"
            raise IntegrityError(f"{name} is frozen but changed since the last check; {cause}.")
        if name.startswith(selected) and name in selection.trainable and tensor.dim() > 1 and same:
            raise IntegrityError(
                f"{name} is selected but did not move; it got no gradient (is the layer used, and the learning rate "
                "above zero?)."
            )


@dataclass(frozen=True)
class LayerStatus:
    """One layer's state: trained or frozen as a whole, or irregular (``reason`` says how)."""

    name: str
    state: Literal["trained", "frozen", "irregular"]
    parameters: int
    reason: str = ""


def status(model: nn.Module) -> list[LayerStatus]:
    """Which layers of a network train now, by ``requires_grad``; a layer that trains in part is irregular."""
    found = []
    for name, module in layer_modules(model).items():
        own = dict(module.named_parameters())
        trains = [key for key, parameter in own.items() if parameter.requires_grad]
        size = sum(parameter.numel() for parameter in own.values())
        if trains and len(trains) < len(own):
            rest = ", ".join(key for key in own if key not in trains)
            found.append(LayerStatus(name, "irregular", size, f"{', '.join(trains)} trains but {rest} is frozen"))
        else:
            found.append(LayerStatus(name, "trained" if trains else "frozen", size))
    return found


def status_since(model: nn.Module, start: dict[str, str], selections: list[Selection]) -> list[LayerStatus]:
    """Which layers a run trained: selected and moved, or never selected and bit-identical to the start.

    Args:
        start: fingerprint of each tensor when the run started
        selections: the selections made so far
    """
    selected = {name for selection in selections for name in selection.layers}
    first = {parameter: name for name, parameter in model.named_parameters()}  # a tied one has the name it has first
    found = []
    for name, module in layer_modules(model).items():
        own = {first[parameter]: parameter for parameter in module.parameters()}
        trained = name in selected or any(key.startswith(f"{other}.") for other in selected for key in own)
        moved = [key for key, parameter in own.items() if fingerprint(parameter) != start.get(key)]
        weights = [key for key, parameter in own.items() if parameter.dim() > 1]
        size = sum(parameter.numel() for parameter in own.values())
        still = [key for key in weights if key not in moved]
        if trained and still:
            found.append(LayerStatus(name, "irregular", size, f"selected, but {', '.join(still)} did not move"))
        elif not trained and moved:
            found.append(LayerStatus(name, "irregular", size, f"never selected, but {', '.join(moved)} moved"))
        else:
            found.append(LayerStatus(name, "trained" if trained else "frozen", size))
    return found
