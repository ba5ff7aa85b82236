"""Projected gradient descent on the cross-entropy, with random restarts."""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from clat.attacks.attack import Attack, finite_scores
from clat.errors import InputError
from clat.network import Images, Labels, logits
from clat.threat import Threat, ascend


def pgd(eps: float | str, steps: int, norm: Literal["linf", "l2"] = "linf") -> Threat:
    """The evaluation attack: random start, steps of eps / 4."""
    radius = Threat(eps=eps, norm=norm).radius
    return Threat(eps=radius, step=radius / 4, steps=steps, norm=norm)


def pgd_attack(model: nn.Module, x: Images, y: Labels, threat: Threat) -> Images:
    """PGD on the cross-entropy; of each image the iterate with the highest loss."""
    return _ascend_loss(lambda z: logits(model(z)), model, x, y, threat)


def _ascend_loss(scores: Callable[[Images], Tensor], model: nn.Module, x: Images, y: Labels, threat: Threat) -> Images:
    return ascend(lambda z: F.cross_entropy(scores(z), y, reduction="none"), x, threat, model=model, keep="best")


def restarts(threat: Threat, starts: int = 1, seed: int = 0) -> tuple[Attack, ...]:
    """PGD from so many random starts, each an attack of its own with the next seed.

    Raises:
        InputError: fewer than one start
    """
    if starts < 1:
        raise InputError(f"The number of random starts is {starts}; it must be 1 or more.")
    name = f"PGD-{threat.steps}"

    def perturb(model: nn.Module, x: Images, y: Labels) -> Images:
        with finite_scores(model) as scores:
            return _ascend_loss(scores, model, x, y, threat)

    return tuple(
        Attack(
            name=name if starts == 1 else f"{name}, start {start + 1}",
            perturb=perturb,
            threat=threat,
            passes=threat.steps + 1,
            seed=seed + start,
            settings={"steps": threat.steps, "step": float(threat.step), "from": threat.start},
        )
        for start in range(starts)
    )
