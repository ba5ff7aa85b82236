"""The threat model, and the one inner maximisation that every attack of this library runs."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clat.checks import check_fields, check_least, shown
from clat.errors import InputError

Images = Tensor  # Float[Tensor, "batch channel height width"], pixels in [0, 1]
Labels = Tensor  # Int64[Tensor, "batch"]
Cost = Callable[[Images], Tensor]  # Images -> Float[Tensor, "batch"], one value per image

GAUSSIAN_START = 0.001  # standard deviation of the "gaussian" start, after TRADES


def fraction(value: float | str) -> float:
    """A number given as a number or as text such as ``8/255``. Raises InputError if it is neither."""
    try:
        # Not all by Fraction, which writes 1e999999999 out.
        number = float(Fraction(value)) if isinstance(value, str) and "/" in value else float(value)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise InputError(f"{shown(value)} is not a number; write it like 0.03 or 8/255.")
    return number


@dataclass(frozen=True, kw_only=True)
class Threat:
    """What an attacker may do and how it is simulated. The defaults are Section 4.1 of the paper.

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
    norm: Literal["linf", "l2"] = "linf"
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
        check_least(self, 0, "steps", prefix="threat.")

    @property
    def radius(self) -> float:
        """eps as a number."""
        return float(self.eps)

    def distance(self, x_adv: Images, x: Images) -> Tensor:
        """The norm of the perturbation of each image, shape (batch,)."""
        order = torch.inf if self.norm == "linf" else 2
        return torch.linalg.vector_norm((x_adv - x).flatten(1), ord=order, dim=1)

    def project(self, x_adv: Images, x: Images) -> Images:
        """The point of the ball around x, cut with the box [0, 1], that each image of x_adv is moved to."""
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


def check_images(x: Images) -> None:
    """Raises InputError unless x is (batch, channel, height, width) with finite pixels in [0, 1]."""
    if not isinstance(x, Tensor):
        raise InputError(
            f"Images must be a float tensor (batch, channel, height, width); got {type(x).__name__}, which "
            "torch.as_tensor may convert."
        )
    if x.dim() != 4 or not x.is_floating_point():
        divide = "; divide uint8 pixels by 255" if x.dtype == torch.uint8 else ""
        raise InputError(
            f"Images must be a float tensor (batch, channel, height, width); got {x.dtype} {tuple(x.shape)}{divide}."
        )
    if not x.numel():
        raise InputError("The batch has no images.")
    if x.is_meta:
        return  # a shape without values
    low, high = torch.stack(torch.aminmax(x)).tolist()
    if math.isnan(low) or math.isnan(high):
        raise InputError("Some pixels are NaN; clean the data first.")
    if low < -1e-6 or high > 1 + 1e-6:
        raise InputError(
            f"Pixels lie in [{low:.3g}, {high:.3g}], not in [0, 1]; divide by 255, or leave the normalisation to the "
            "model."
        )


def whole_labels(y: Labels, x: Images, classes: int | None = None) -> Labels:
    """The labels of a batch as int64, whatever integers they come as.

    Args:
        classes: the network's outputs, if labels are to be compared with them
    Raises:
        InputError: no tensor of integers, not one label an image, or labels that the network has no output for
    """
    if not isinstance(y, Tensor):
        raise InputError(f"Labels must be a tensor of whole numbers, one an image; got {type(y).__name__}.")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise InputError(f"Labels must be whole numbers, such as int64; got {y.dtype}.")
    if y.shape != x.shape[:1]:
        raise InputError(f"There are {len(x)} images but labels of shape {tuple(y.shape)}; give one label an image.")
    y = y.long()
    if classes is not None and not y.is_meta:
        first, last = torch.stack(torch.aminmax(y)).tolist()
        if not 0 <= first <= last < classes:
            raise InputError(f"The labels run from {first} to {last}, but the network has {classes} outputs.")
    return y


def check_start(threat: Threat, objective: str) -> None:
    """Raises InputError if the attack starts at the image itself, where the distance to it has no gradient."""
    if threat.start == "zero":
        raise InputError(
            f"threat.start is zero, where the attack of {objective} has no gradient; set it to gaussian or uniform."
        )


def check_one_step(threat: Threat, objective: str, length: str) -> None:
    """Raises InputError unless the attack has one step."""
    if threat.steps != 1:
        raise InputError(
            f"threat.steps is {threat.steps}, but {objective} attacks in one step; set it to 1 and threat.step to "
            f"{length}."
        )


class NoGradientError(InputError):
    """What the network returns has no gradient to the pixels."""


def check_gradient(values: Tensor) -> None:
    """Raises NoGradientError unless a value computed from the pixels has a gradient to them."""
    if not values.requires_grad:
        raise NoGradientError(
            "Gradient attacks cannot see through this network: what it returns has no gradient to the pixels; attack "
            "it without gradients, by clat evaluate --tier blackbox (Square)."
        )


def per_image(values: Tensor, like: Images) -> Tensor:
    """Shape (batch,) made to multiply a tensor of shape (batch, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def ascend(
    cost: Cost,
    x: Images,
    threat: Threat,
    *,
    model: nn.Module,
    keep: Literal["last", "best"] = "last",
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
        model: the network that the cost runs, whose state is held meanwhile
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


@contextmanager
def held(model: nn.Module, mode: Literal["eval", "batch", "train"] = "eval") -> Iterator[None]:
    """Runs the network in ``mode`` with no parameter asking for gradients, then puts everything back.

    Back come each module's training flag, each parameter's ``requires_grad`` and, unless the mode is "train",
    each buffer's content.
    """
    training = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = [] if mode == "train" else list(model.buffers())
    copies = [(buffer.clone(), buffer._version) for buffer in buffers]
    try:
        model.train(mode != "eval")
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, was_training in training:
            module.training = was_training
        for parameter in trainable:
            parameter.requires_grad_(True)
        with torch.no_grad():
            for buffer, (copy, version) in zip(buffers, copies, strict=True):
                # Untouched ones may belong to a graph that is still needed. BatchNorm in train mode bumps no version.
                if mode == "batch" or buffer._version != version:
                    buffer.copy_(copy)


@contextmanager
def fixed_norms(model: nn.Module) -> Iterator[None]:
    """Runs BatchNorm that is in eval mode as what it is then, x scale + shift, channel by channel.

    Unlike torch's own, that keeps none of its input for the backward pass, which halves the memory of an attack, and
    its gradient is one multiplication. Like torch's own, it computes features of lower precision than fp32 in fp32 and
    gives them back in theirs. A compiled network is left alone, since it would be compiled anew at each attack.
    """
    compiled = getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod")
    norms = [] if compiled else [module for module in model.modules() if isinstance(module, _BatchNorm)]
    norms = [norm for norm in norms if _is_fixed(norm)]
    for norm in norms:
        vars(norm)["forward"] = _fixed(norm)
    try:
        yield
    finally:
        for norm in norms:
            del vars(norm)["forward"]


def _is_fixed(norm: _BatchNorm) -> bool:
    """In eval mode, with statistics, and running torch's own code."""
    own = type(norm).forward is _BatchNorm.forward and "forward" not in vars(norm)
    return own and not norm.training and norm.running_mean is not None


def _fixed(norm: _BatchNorm) -> Callable[[Tensor], Tensor]:
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    exact = torch.promote_types(variance.dtype, torch.float32)
    with torch.no_grad():
        scale = torch.rsqrt(variance.to(exact) + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -mean * scale if norm.bias is None else norm.bias - mean * scale
    taken = {variance.dtype, torch.bfloat16, torch.float16} if variance.dtype == torch.float32 else {variance.dtype}
    usual = norm.forward

    def forward(x: Tensor) -> Tensor:
        if x.dtype not in taken or x.dim() < 2 or x.shape[1] != len(scale):
            return usual(x)
        shape = (1, -1, *[1] * (x.dim() - 2))
        return torch.addcmul(shift.view(shape), x.to(exact), scale.view(shape)).to(x.dtype)

    return forward
