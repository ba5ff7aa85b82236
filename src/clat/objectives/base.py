"""What an objective is."""

from typing import Protocol

from torch import Tensor, nn

from clat.errors import InputError
from clat.network import Images, Labels
from clat.threat import Threat


class Objective(Protocol):
    """Perturbation and cost are two calls, because a cost may be evaluated again at the same perturbed images.

    Two more are optional. ``replays``: how often the loop trains on each batch (Free-AT). ``probe`` with
    ``largest_drop``: the accuracy that the loop measures after each epoch, and the fall that ends the run (Fast-AT).
    The loop makes an objective anew for each epoch, so what one keeps from call to call lives for an epoch.
    """

    def perturb(self, model: nn.Module, x: Images, y: Labels, threat: Threat) -> Images:
        """The images to train on: x itself, or x attacked within the threat model. Leaves the network untouched."""
        ...

    def loss(self, model: nn.Module, x: Images, x_adv: Images, y: Labels) -> dict[str, Tensor]:
        """The named terms, already weighted, whose sum is minimised (scalars)."""
        ...


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
