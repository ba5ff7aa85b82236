"""Adversarial weight perturbation: the gradient of a step is taken where the weights hurt most (Wu et al. 2020)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clat.errors import InputError
from clat.inputs import check_fields


@dataclass(frozen=True, kw_only=True)
class Awp:
    """Moves weights along the gradient of the loss, each tensor w by gamma |w|, for the length of one training step.

    Only tensors that train and have more than one dimension are moved: no biases, no normalisation.

    Args:
        gamma: length of the perturbation as a share of each tensor's norm (0.01 for AT-AWP, 0.005 for TRADES-AWP)
        warmup: first epochs without perturbation (0 for AT-AWP, 10 for TRADES-AWP)

    Source: csdongxian/AWP.
    """

    gamma: float = 0.01
    warmup: int = 0

    def __post_init__(self) -> None:
        check_fields(self, "awp.")
        if not 0 < self.gamma < 1:
            raise InputError(f"awp.gamma is {self.gamma}; it must be between 0 and 1, e.g. 0.01.")
        if self.warmup < 0:
            raise InputError(f"awp.warmup is {self.warmup}; give a number of epochs, 0 or more.")

    @contextmanager
    def weights(self, model: nn.Module, backward: Callable[[], object]) -> Iterator[None]:
        """Runs a block, the training step, at the adversarial weights.

        Afterwards the weights are the stored ones plus what the block added to the adversarial ones. As in the
        authors' code, weight decay thus sees the adversarial weights; a weight that the block leaves alone comes back
        bit for bit.

        Args:
            backward: fills the parameters' gradients with those of the loss; the buffers that it moves are put back
        """
        gradients = self._gradients(model, backward)
        moved = []
        with torch.no_grad():
            for weight, gradient in gradients:
                before = weight.clone()
                weight.add_(gradient * (self.gamma * weight.norm() / (gradient.norm() + 1e-20)))
                moved.append((weight, before, weight.clone()))
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, before, adversarial in moved:
                    step = weight - adversarial
                    weight.copy_(torch.where(step == 0, before, before + step))

    def _gradients(self, model: nn.Module, backward: Callable[[], object]) -> list[tuple[nn.Parameter, Tensor]]:
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        backward()
        with torch.no_grad():
            for buffer, copy in buffers:
                buffer.copy_(copy)
        found = [(p, p.grad) for p in model.parameters() if p.requires_grad and p.dim() > 1 and p.grad is not None]
        for parameter in model.parameters():
            parameter.grad = None
        return found
