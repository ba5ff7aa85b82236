"""What a tuner is."""

from typing import Literal, Protocol

from torch import nn

from clat.network import Images, Labels
from clat.threat import Threat
from clat.tuners.selection import Selection


class Tuner(Protocol):
    """Decides what trains. The decision is a value, ``Selection``; ``Selection.apply`` puts it into effect.

    Two more methods are optional. ``begin(model, selection, seed=)`` gives the network the parameters that a selection
    trains beyond its own (ConvLoRA). ``end(model, start, measure)`` changes the best network once all epochs are done
    and returns facts for the record, among them its ``clean`` and ``robust`` accuracy (RiFT): ``start`` has all
    tensors as they were before the first epoch, and ``measure()`` gives both accuracies on the held-out images.
    """

    @property
    def batch(self) -> int:
        """Training images that a selection is made on."""
        ...

    @property
    def every(self) -> int:
        """Epochs from one selection to the next, 0 for a single one."""
        ...

    @property
    def momentum(self) -> Literal["drop", "keep"]:
        """What a selection does to the optimizer's state."""
        ...

    @property
    def learning_rate(self) -> Literal["continue", "restart"]:
        """What a selection does to the schedule."""
        ...

    def due(self, epoch: int) -> bool:
        """Whether the selection is made (anew) before this epoch; epochs count from 1."""
        ...

    def select(
        self, model: nn.Module, x: Images, y: Labels, threat: Threat, *, epoch: int = 1, seed: int = 0
    ) -> Selection:
        """Chooses what trains, from one batch of training images; leaves the network untouched."""
        ...
