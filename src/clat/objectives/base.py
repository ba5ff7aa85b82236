"""The interface of an objective: how a batch is attacked, and its loss."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from clat.errors import InputError
from clat.network import Images, Labels
from clat.threat import Threat


class Objective(ABC):
    """A frozen dataclass whose fields are its recipe keys, and which knows its own name.

    Perturbation and cost are two calls, because a cost may be evaluated again at the same perturbed images.
    """

    name: ClassVar[str] = ""  # in recipes; its keys stand under it, with underscores for dashes
    replays: int = 1  # how often each batch is trained on
    largest_drop: float = 1.0  # of the accuracy under ``probe`` from one epoch to the next; a larger one ends the run

    def attacks_pixels(self) -> bool:
        """Whether ``perturb`` maximises something over the pixels, from the threat model's start."""
        return True

    def takes_soft_labels(self) -> bool:
        """Whether ``loss`` also takes, for y, what each class counts for each image, float (batch, classes)."""
        return False

    def carries(self) -> bool:
        """Whether ``loss`` needs what ``perturb`` remembered of the same batch, which must then not be divided."""
        return False

    def learns_from_start(self) -> bool:
        """Whether the loss compares with the network as it was when the run began, which ``begin`` is then given."""
        return False

    def begin(self, start: nn.Module | None = None) -> "Objective":
        """The objective of the next epoch. One that remembers something from batch to batch starts here without it.

        Args:
            start: a frozen copy of the network as it was when the run began, if ``learns_from_start``
        """
        return self

    @abstractmethod
    def perturb(self, model: nn.Module, x: Images, y: Labels, threat: Threat) -> Images:
        """The images to train on: x itself, or x attacked within the threat model. Leaves the network as it was."""

    @abstractmethod
    def loss(self, model: nn.Module, x: Images, x_adv: Images, y: Labels) -> dict[str, Tensor]:
        """The named terms, already weighted, whose sum is minimised (scalars)."""

    def probe(self, model: nn.Module, x: Images, y: Labels, threat: Threat) -> Tensor | None:
        """Which images are classified correctly under the attack that watches for overfitting, bool (batch,).

        None if the objective has no such attack.
        """
        return None


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
