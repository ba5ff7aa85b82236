"""The optimizer of a selection, its learning rate at each step, and its state by parameter name."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from clat.layers import NORM_TYPES
from clat.training.recipe import Recipe


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of the parameters that train; those without weight decay form their own group."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norms = {p for module in model.modules() if isinstance(module, NORM_TYPES) for p in module.parameters()}
    spared = {"all": set(), "no_norm": norms, "kernels": {p for p in parameters if p.dim() < 2}}[recipe.decay]
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if p not in spared]}]
    if spared:
        groups.append({"params": [p for p in parameters if p in spared], "weight_decay": 0.0})
    fused = all(parameter.device.type in ("cuda", "cpu") for parameter in parameters)  # one kernel, where there is one
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=fused)
    return torch.optim.SGD(
        groups,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        fused=fused,
    )


def learning_rate(recipe: Recipe, epoch: int, step: int, steps: int, selected: int) -> float:
    """The learning rate of a step.

    Args:
        epoch: from 1; step: within the epoch, from 0; steps: of an epoch
        selected: the epoch of the last selection, where the tuner's policy restarts the schedule then
    """
    tuner = recipe.tuner
    first, length = 1, recipe.epochs
    if tuner.lr_schedule == "restart" and tuner.every:
        first, length = selected, min(tuner.every, recipe.epochs - selected + 1)
    done = epoch - first + step / steps  # epochs
    progress = done / length
    if recipe.schedule == "cyclic":
        progress += 0.5 / (steps * length)  # the middle of the step: at neither end is the rate zero
        return recipe.lr * min(progress / recipe.peak, (1 - progress) / (1 - recipe.peak))
    if recipe.schedule == "cosine":
        rate = recipe.lr * (1 + math.cos(math.pi * progress)) / 2
    else:
        rate = recipe.lr / 10 ** sum(epoch - first + 1 >= milestone for milestone in recipe.milestones)
    return rate * (done + 1 / steps) / recipe.warmup if done + 1 / steps < recipe.warmup else rate


def set_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, rate: float) -> None:
    """Sets the learning rate, and the momentum if it cycles."""
    for group in optimizer.param_groups:
        group["lr"] = rate
        if recipe.cycle_momentum:
            group["momentum"] = recipe.momentum - 0.1 * rate / recipe.lr


def optimizer_state(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's tensors as ``parameter|key``."""
    return {
        f"{name}|{key}": value
        for name, parameter in model.named_parameters()
        for key, value in (optimizer.state.get(parameter, {}) if optimizer else {}).items()
        if isinstance(value, Tensor)
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Puts back what ``optimizer_state`` returned, for the parameters that train now; others start with momentum 0."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for entry, value in stored.items():
        name, key = entry.rsplit("|", 1)
        if name in parameters:
            same_layout = torch.empty_like(parameters[name] if key != "step" else value)
            optimizer.state[parameters[name]][key] = same_layout.copy_(value)
    if isinstance(optimizer, torch.optim.SGD) and any("momentum_buffer" in state for state in optimizer.state.values()):
        for parameter in parameters.values():  # the fused step takes momentum of all or of none
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
