"""Weight averaging: what is validated and kept as the best network is a mean over steps or epochs of training."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from clat.errors import InputError
from clat.inputs import check_fields
from clat.network import snapshot, tensors


@dataclass(frozen=True, kw_only=True)
class Average:
    """How weights are averaged.

    Args:
        kind: ema, a moving average over steps, or swa, the mean of the weights at the end of each epoch
        decay: of ema: the weight tau of what was averaged before; in its first steps t it is (1 + t) / (10 + t) if
            that is smaller, so that the random start is forgotten
        start: epoch, counted from 1, from which weights are averaged
        from_start: for fine-tuning: the average begins with the weights that the run starts from and keeps its decay
            from the first step on; in swa they count as one epoch

    Source: Gowal et al. 2020 (ema, with this warm-up), Izmailov et al. 2018 (swa), Wortsman et al. 2022 (from_start).
    """

    kind: Literal["ema", "swa"] = "ema"
    decay: float = 0.995
    start: int = 1
    from_start: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "average.")
        if not 0 < self.decay < 1:
            raise InputError(f"average.decay is {self.decay}; it must be between 0 and 1, e.g. 0.995.")
        if self.start < 1:
            raise InputError(f"average.start is {self.start}; epochs count from 1.")

    def rate(self, count: int) -> float:
        """The weight of the next tensors in an average that ``count`` have gone into."""
        if self.kind == "swa":
            return 1 / (count + 1 + self.from_start)
        return 1 - self.decay if self.from_start else max(1 - self.decay, 9 / (10 + count))


class Averaged:
    """The average of a network while it trains; without an ``Average`` it is the network itself.

    Buffers are averaged like weights, BatchNorm's running statistics among them; integer ones are copied. A tensor that
    never changes keeps its value.
    """

    def __init__(self, model: nn.Module, average: Average | None):
        self.model, self.average = model, average
        self.tensors: dict[str, Tensor] = {}  # by name; none before the start
        self.count = 0
        self.first = snapshot(model) if average and average.from_start else {}  # until it is in the average

    @torch.no_grad()
    def take(self, epoch: int, *, last: bool) -> None:
        """Adds the network's weights to the average after a step; ``last`` says that it was the last of its epoch."""
        average = self.average
        if average is None or epoch < average.start or (average.kind == "swa" and not last):
            return
        rate = average.rate(self.count)
        for name, tensor in tensors(self.model).items():
            if name in self.first and not self.count:
                self.tensors[name] = self.first.pop(name)
            if name not in self.tensors:
                self.tensors[name] = tensor.detach().clone()
            elif tensor.is_floating_point():
                self.tensors[name].lerp_(tensor, rate)
            else:
                self.tensors[name].copy_(tensor)
        self.count, self.first = self.count + 1, {}

    def stop(self) -> None:
        """Forgets the average: from here on the network itself is used."""
        self.average, self.tensors, self.count, self.first = None, {}, 0, {}

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Puts the average into the network inside the block, then the network's own tensors back, bit for bit."""
        own = {name: tensor.detach().clone() for name, tensor in tensors(self.model).items()} if self.tensors else {}
        try:
            self._put(self.tensors)
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, tensor in tensors(self.model).items():
            if name in values:
                tensor.copy_(values[name])
