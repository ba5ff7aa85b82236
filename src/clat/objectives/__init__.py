"""Objectives: how a batch is attacked and what it costs. One file each, one line each in ``OBJECTIVES``."""

from typing import Protocol

from torch import Tensor, nn

from clat.objectives.clat import Clat
from clat.objectives.clean import Clean
from clat.objectives.fast_at import FastAt
from clat.objectives.free_at import FreeAt
from clat.objectives.grad_align import GradAlign
from clat.objectives.mart import Mart
from clat.objectives.pgd_at import PgdAt
from clat.objectives.score import Score
from clat.objectives.trades import Trades
from clat.threat import Images, Labels, Threat


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


OBJECTIVES: dict[str, type[Objective]] = {
    "clean": Clean,
    "pgd-at": PgdAt,
    "trades": Trades,
    "mart": Mart,
    "score": Score,
    "fast-at": FastAt,
    "free-at": FreeAt,
    "grad-align": GradAlign,
    "clat": Clat,
}
