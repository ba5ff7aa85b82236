"""Activation checkpointing: blocks of a network keep their input alone and are computed again for the gradient."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from clat.errors import InputError

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that a network is a sequence of, such as those of a residual network or a transformer.

    A block is an entry of a container, has parts of its own, and does not itself contain two or more such entries.

    Raises:
        InputError: there are none
    """
    inside: set[nn.Module] = set()
    found: list[nn.Module] = []
    for container in model.modules():
        for entry in _composite(container):
            divided = any(len(_composite(module)) > 1 for module in entry.modules())
            if entry not in inside and not divided:
                found.append(entry)
                inside.update(entry.modules())
    if not found:
        raise InputError(
            f"{type(model).__name__} is no sequence of blocks that could be recomputed; set recompute to false."
        )
    return found


def _composite(container: nn.Module) -> list[nn.Module]:
    """The entries of a container that have parts of their own and are no containers."""
    entries = container.children() if isinstance(container, CONTAINERS) else ()
    return [entry for entry in entries if any(entry.children()) and not isinstance(entry, CONTAINERS)]


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the block, forward passes keep the inputs of these modules and not what is computed in them.

    The backward pass may be outside: a module is computed again in the modes that it had, and its buffers move once. A
    module with hooks in it, as features are observed by, keeps everything.
    """
    usual = {block: vars(block).get("forward") for block in blocks}
    for block in usual:
        vars(block)["forward"] = _recomputing(block, block.forward)
    try:
        yield
    finally:
        for block, forward in usual.items():
            if forward is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = forward


def _recomputing(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    modules = list(block.modules())

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or any(m._forward_hooks or m._forward_pre_hooks for m in modules):
            return forward(*args, **kwargs)
        contexts = nullcontext(), _AsBefore(modules)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: contexts, **kwargs)

    return run


class _AsBefore:
    """Modules in the modes that they had, with copies of the buffers that training moves. Entered once a gradient."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modes = [(module, module.training) for module in modules]

    def __enter__(self) -> None:
        self.found = [(module, module.training, dict(module._buffers)) for module, _ in self.modes]
        for module, training in self.modes:
            module.training = training
            if training:
                module._buffers.update({n: b if b is None else b.clone() for n, b in module._buffers.items()})

    def __exit__(self, *_: object) -> None:
        for module, training, buffers in self.found:
            module.training = training
            module._buffers.update(buffers)
