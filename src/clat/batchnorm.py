"""BatchNorm as attacks run it, and as several processes run it together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import handle_torch_function, has_torch_function_unary


@contextmanager
def fixed_norms(model: nn.Module) -> Iterator[None]:
    """Runs BatchNorm in eval mode without keeping its input for the backward pass.

    In eval mode BatchNorm is x scale + shift, channel by channel, so its gradient needs the scale alone. This halves
    the memory of an attack. Features of lower precision than fp32 are computed in fp32 and returned in theirs, as
    torch's own BatchNorm does. A compiled network is left unchanged: each attack would compile it again.
    """
    compiled = getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod")
    norms = [] if compiled else [module for module in model.modules() if isinstance(module, _BatchNorm)]
    norms = [norm for norm in norms if _is_own(norm) and not norm.training and norm.running_mean is not None]
    with _running({norm: _fixed(norm) for norm in norms}):
        yield


@contextmanager
def shared_norms(model: nn.Module, mean: Callable[[Tensor], Tensor], processes: int) -> Iterator[None]:
    """Lets BatchNorm in train mode take its statistics over the images of all processes, which are as many in each.

    The network then computes what it would with the whole batch in one process, to rounding; so do its gradients, once
    they are averaged. torch.nn.SyncBatchNorm does the same on GPUs only.

    Args:
        mean: of a tensor over all processes
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and _is_own(module)]
    with _running({norm: _shared(norm, mean, processes) for norm in norms} if processes > 1 else {}):
        yield


@contextmanager
def _running(forwards: dict[_BatchNorm, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside the block, these modules run these functions."""
    before = {norm: vars(norm).get("forward") for norm in forwards}
    for norm, forward in forwards.items():
        vars(norm)["forward"] = forward
    try:
        yield
    finally:
        for norm, usual in before.items():
            if usual is None:
                del vars(norm)["forward"]
            else:
                vars(norm)["forward"] = usual


def _is_own(norm: _BatchNorm) -> bool:
    """Whether the module runs torch's own forward, or that of ``shared_norms``."""
    here = vars(norm).get("forward")
    return type(norm).forward is _BatchNorm.forward and (here is None or hasattr(here, "shares_statistics"))


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
    usual = norm.forward

    def forward(x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != len(scale) or x.dtype not in (variance.dtype, torch.bfloat16, torch.float16):
            return usual(x)
        if x.dtype != exact:
            return batch_norm(x, usual, scale)
        shape = (1, -1, *[1] * (x.dim() - 2))
        return torch.addcmul(shift.view(shape), x, scale.view(shape))

    return forward


def _shared(norm: _BatchNorm, mean: Callable[[Tensor], Tensor], processes: int) -> Callable[[Tensor], Tensor]:
    usual = norm.forward

    def forward(x: Tensor) -> Tensor:
        if not norm.training:
            return usual(x)
        norm._check_input_dim(x)
        dims, shape = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        own_variance, own = torch.var_mean(exact, dims, correction=0)
        middle = _Mean.apply(own, mean)
        variance = _Mean.apply(own_variance + (own - middle).square(), mean)
        _move(norm, middle.detach(), variance.detach(), processes * x.numel() // x.shape[1])
        scale = torch.rsqrt(variance + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -middle * scale if norm.bias is None else norm.bias - middle * scale
        return torch.addcmul(shift.view(shape), exact, scale.view(shape)).to(x.dtype)

    vars(forward)["shares_statistics"] = True
    return forward


@torch.no_grad()
def _move(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: int) -> None:
    """Moves the running statistics as torch does: by ``momentum``, or to the mean of all batches if there is none."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked.add_(1)
    rate = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean, rate)
    norm.running_var.lerp_(variance * (count / (count - 1)), rate)


class _Mean(torch.autograd.Function):
    """The mean over processes. What each process's loss sends back is averaged in the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.mean = mean
        return mean(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Mean.apply(gradient, ctx.mean), None


def batch_norm(x: Tensor, usual: Callable[[Tensor], Tensor], scale: Tensor) -> Tensor:
    """Torch's own BatchNorm on bf16 or fp16, with fp32 inside and no fp32 copy of the features.

    Modes that follow torch's functions see it under this name.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(batch_norm, (x,), x, usual, scale)
    return _LowPrecision.apply(x, usual, scale)


class _LowPrecision(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, usual: Callable[[Tensor], Tensor], scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return usual(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        none, one = torch.zeros_like(scale), torch.ones_like(scale)
        return torch.batch_norm(gradient, scale, None, none, one, False, 0.0, 0.0, False), None, None
