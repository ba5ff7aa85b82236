"""The interface of a tuner: which parameters train, and when they are chosen again."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from clat.network import Images, Labels
from clat.threat import Threat
from clat.tuners.selection import Selection

Batch = tuple[Images, Labels]
Measure = Callable[[], tuple[float, float]]  # clean and robust accuracy on the held-out images, of the network as it is


class Tuner(ABC):
    """A frozen dataclass whose fields are its recipe keys, and which knows its own name.

    Its decision is a value, ``Selection``. One is due before the first epoch.
    """

    name: ClassVar[str] = ""  # in recipes; its keys stand under it, with underscores for dashes
    batch: int = 1  # training images that a selection is made on
    every: int = 0  # epochs from one selection to the next, 0 for a single one
    optimizer_state: Literal["reset", "keep"] = "reset"  # at a selection; kept is that of what is selected again
    lr_schedule: Literal["continue", "restart"] = "continue"  # at a selection
    ends: bool = False  # whether ``end`` does something; the run then keeps the network it started from

    def due(self, epoch: int) -> bool:
        """Whether a selection is made before this epoch; epochs count from 1 (Algorithm 1, line 3)."""
        return epoch == 1 or (self.every > 0 and (epoch - 1) % self.every == 0)

    def unseen(self) -> int:
        """How many images that were not trained on a selection also needs."""
        return 0

    def averages(self) -> bool:
        """Whether ``select`` takes ``mean``, with which several processes measure one batch, each a part of it."""
        return False

    @abstractmethod
    def select(
        self,
        model: nn.Module,
        x: Images,
        y: Labels,
        threat: Threat,
        *,
        epoch: int = 1,
        seed: int = 0,
        unseen: Batch | None = None,
    ) -> Selection:
        """Chooses what trains, from one batch of training images. Leaves the network as it was.

        Args:
            unseen: images and labels that were not trained on; given if ``unseen()`` asks for some
        """

    def begin(self, model: nn.Module, selection: Selection, *, seed: int = 0) -> None:
        """Gives the network parameters that a selection trains beyond its own. By default there are none."""

    def state(self, model: nn.Module) -> dict[str, Tensor] | None:
        """The network's ``state_dict`` in its ordinary form, where ``begin`` has changed it; else None."""
        return None

    def undo(self, model: nn.Module) -> None:
        """Removes what ``begin`` added and merges what was trained into the weights."""

    def end(self, model: nn.Module, start: Mapping[str, Tensor], measure: Measure) -> dict[str, Any]:
        """Changes the best network once all epochs are done; returns facts for the record.

        Among them are the ``clean`` and ``robust`` accuracy afterwards. Called only if ``ends``.

        Args:
            start: every tensor as it was before the first epoch
        """
        return {}
