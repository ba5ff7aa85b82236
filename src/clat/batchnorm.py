"""BatchNorm as attacks run it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


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
