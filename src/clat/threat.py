"""The threat model, and the one inner maximisation that every attack of this library runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clat.batchnorm import fixed_norms
from clat.errors import InputError
from clat.inputs import check_fields, check_least, fraction, shown
from clat.network import (
    Cost,
    Images,
    Labels,
    check_gradient,
    check_images,
    held,
    learnable_labels,
    logits,
    no_overwriting,
    per_image,
)

Lp = Literal["linf", "l2"]  # the norm of a ball
Keep = Literal["last", "best"]  # of an ascent: the last iterate or, image by image, the one with the highest cost

GAUSSIAN_START = 0.001  # standard deviation of the "gaussian" start, after TRADES


@dataclass(frozen=True, kw_only=True)
class Threat:
    """What an attacker is allowed to do and how it is simulated. The defaults are Section 4.1 of the paper.

    Args:
        eps: radius of the ball around each image, in pixels of [0, 1]; a number or text such as 8/255
        step: length of one ascent step, in the same unit
        steps: number of ascent steps
        norm: the ball's norm
        start: first iterate: uniform in the ball, gaussian (0.001 x N(0, 1), as TRADES) or zero (the image itself)
        mode: how the network runs while it is attacked: eval, batch (batch statistics, running ones kept) or
            train (batch statistics, running ones updated)
    """

    eps: float | str = 0.03
    step: float | str = 0.007
    steps: int = 10
    norm: Lp = "linf"
    start: Literal["uniform", "gaussian", "zero"] = "uniform"
    mode: Literal["eval", "batch", "train"] = "eval"

    def __post_init__(self) -> None:
        for key in ("eps", "step"):
            value = fraction(getattr(self, key))
            if not value > 0:
                raise InputError(f"threat.{key} is {value}; it must be a positive number such as 8/255.")
            object.__setattr__(self, key, value)
        check_fields(self, "threat.")
        if self.norm == "linf" and self.radius > 1:
            raise InputError(f"threat.eps is {self.eps}, but pixels lie in [0, 1]; for 8 grey levels write 8/255.")
        check_least(0, prefix="threat.", steps=self.steps)

    @property
    def radius(self) -> float:
        """eps as a number."""
        return float(self.eps)

    def distance(self, x_adv: Images, x: Images) -> Tensor:
        """The norm of the perturbation of each image, shape (batch,)."""
        order = torch.inf if self.norm == "linf" else 2
        return torch.linalg.vector_norm((x_adv - x).flatten(1), ord=order, dim=1)

    def project(self, x_adv: Images, x: Images) -> Images:
        """Projects x_adv onto the ball around x, then onto [0, 1]."""
        if self.norm == "linf":
            x_adv = torch.minimum(torch.maximum(x_adv, x - self.radius), x + self.radius)
        else:
            length = self.distance(x_adv, x).clamp_min(self.radius)
            x_adv = x + (x_adv - x) * per_image(self.radius / length, x)
        return x_adv.clamp(0, 1)

    def first(self, x: Images) -> Images:
        """The first iterate, inside ball and box."""
        if self.start == "zero":
            return x.clone()
        if self.start == "gaussian":
            return self.project(x + GAUSSIAN_START * torch.randn_like(x), x)
        if self.norm == "linf":
            return self.project(x + torch.empty_like(x).uniform_(-self.radius, self.radius), x)
        direction = torch.randn_like(x)
        length = torch.linalg.vector_norm(direction.flatten(1), dim=1)
        radius = self.radius * torch.rand_like(length) ** (1 / x[0].numel())
        return self.project(x + direction * per_image(radius / length, x), x)

    def move(self, x_adv: Images, gradient: Tensor) -> Images:
        """One step along the steepest ascent direction of the norm, not yet projected."""
        step = float(self.step)
        if self.norm == "linf":
            return x_adv + step * gradient.sign()
        length = torch.linalg.vector_norm(gradient.flatten(1), dim=1).clamp_min(1e-30)
        return x_adv + gradient * per_image(step / length, gradient)


def ascend(
    cost: Cost,
    x: Images,
    threat: Threat,
    *,
    model: nn.Module,
    keep: Keep = "last",
    start: Images | None = None,
    momentum: float = 0.0,
) -> Images:
    """Projected gradient ascent on ``cost`` within the threat model, image by image.

    The cost only names what to maximise: ball and box are enforced here. The network's mode, buffers, parameter
    gradients and ``requires_grad`` are the same after as before (running statistics move only if ``threat.mode``
    is "train").

    Args:
        cost: maps images (batch, ...) to one value per image (batch,)
        x: images with pixels in [0, 1]
        threat: ball, steps, start and mode
        model: the network that the cost runs, whose state is restored afterwards
        keep: return the last iterate or, image by image, the one with the highest cost
        start: images like x to start from, moved into ball and box, in place of ``threat.start``
        momentum: share of the earlier direction that each step keeps, the gradients having l1 length 1 (Dong et al.
            2018); 0 follows the gradient

    Source: Madry et al. 2018; Section 4.1 of the paper.
    """
    with held(model, threat.mode), fixed_norms(model), torch.enable_grad():
        x = x.detach()
        x_adv = threat.first(x) if start is None else threat.project(start.detach(), x)
        best, best_cost = x_adv, None
        direction = torch.zeros_like(x)
        for _ in range(threat.steps):
            x_adv = x_adv.detach().requires_grad_()
            values = cost(x_adv)
            check_gradient(values)
            with no_overwriting():
                (gradient,) = torch.autograd.grad(values.sum(), x_adv)
            if keep == "best":
                best, best_cost = _better(best, best_cost, x_adv.detach(), values.detach())
            if momentum:
                length = torch.linalg.vector_norm(gradient.flatten(1), ord=1, dim=1).clamp_min(1e-30)
                gradient = direction = momentum * direction + gradient / per_image(length, gradient)
            x_adv = threat.project(threat.move(x_adv.detach(), gradient), x)
        if keep == "best":
            with torch.no_grad():
                x_adv, _ = _better(best, best_cost, x_adv, cost(x_adv))
    return x_adv.detach()


def _better(best: Images, best_cost: Tensor | None, x_adv: Images, values: Tensor) -> tuple[Images, Tensor]:
    if best_cost is None:
        return x_adv, values
    higher = values > best_cost
    return torch.where(per_image(higher, x_adv), x_adv, best), torch.where(higher, values, best_cost)


def attack_output(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    keep: Keep = "last",
    scores: Callable[[Images], Tensor] | None = None,
) -> Images:
    """Untargeted PGD on the cross-entropy of the output; Section 3.1 uses it in place of one attack a layer.

    Args:
        y: a label an image, or what each class counts for it, float (batch, classes)
        keep: the last iterate, as in training, or of each image the one with the highest loss, as in evaluation
        scores: gives the class scores (batch, classes); default the network's output
    Raises:
        InputError: images of another shape or outside [0, 1]; labels that are neither, or that the network has no
            output for; no threat
    """
    if not isinstance(threat, Threat):
        raise InputError(f"The threat is {shown(threat)}; give a clat.Threat, such as Threat(eps='8/255').")
    check_images(x)
    labels, classes = learnable_labels(y, x), 0

    def cost(z: Images) -> Tensor:
        nonlocal labels, classes
        outputs = logits(model(z)) if scores is None else scores(z)
        if outputs.shape[1] != classes:  # the first pass
            classes = outputs.shape[1]
            labels = learnable_labels(labels, x, classes)
        return F.cross_entropy(outputs, labels, reduction="none")

    return ascend(cost, x, threat, model=model, keep=keep)
