"""What an evaluation attack is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from clat.threat import Images, Labels, Threat

Perturb = Callable[[nn.Module, Images, Labels], Images]


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An attack as ``evaluate`` runs it: on the images that are still classified correctly, batch by batch.

    Args:
        name: as it stands in tables, e.g. "APGD-CE"
        perturb: (network, images (batch, channel, height, width), labels (batch,)) -> attacked images. The network is
            in eval mode and its parameters ask for no gradient; ball and box are enforced on what comes back
        threat: the ball
        passes: forward-and-backward passes an image costs at most; a forward pass alone is a third of one
        seed: of the global generator at the start of each batch
        settings: what else a program needs to know to repeat it
        note: what differs from the attack of that name as published, and why
    """

    name: str
    perturb: Perturb
    threat: Threat
    passes: float
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
