"""BatchNorm as attacks run it."""

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
    norms = [norm for norm in norms if _is_fixed(norm)]
    for norm in norms:
        vars(norm)["forward"] = _fixed(norm)
    try:
        yield
    finally:
        for norm in norms:
            del vars(norm)["forward"]


def _is_fixed(norm: _BatchNorm) -> bool:
    """Whether the module is in eval mode, has running statistics and has torch's own forward."""
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
    usual = norm.forward

    def forward(x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != len(scale) or x.dtype not in (variance.dtype, torch.bfloat16, torch.float16):
            return usual(x)
        if x.dtype != exact:
            return batch_norm(x, usual, scale)
        shape = (1, -1, *[1] * (x.dim() - 2))
        return torch.addcmul(shift.view(shape), x, scale.view(shape))

    return forward


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
