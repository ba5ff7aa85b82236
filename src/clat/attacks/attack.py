"""The interface of an evaluation attack."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clat.errors import InputError
from clat.network import Images, Labels, check_gradient, logits
from clat.threat import Threat

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


@contextmanager
def finite_scores(model: nn.Module) -> Iterator[Callable[[Images], Tensor]]:
    """What an evaluation attack asks for class scores (batch, classes), image batch by image batch.

    Raises:
        NoGradientError: the attack wants a gradient, and the scores have none
        InputError: at the end, if a score was not finite: attacks lose their way there, and the image would pass as
            robust
    """
    finite: Tensor | None = None

    def scores(x: Images) -> Tensor:
        nonlocal finite
        found = logits(model(x))
        found = found.clone() if found.is_inference() else found  # attacks write to it
        if x.requires_grad and torch.is_grad_enabled():
            check_gradient(found)
        now = torch.isfinite(found.detach()).all()
        finite = now if finite is None else finite & now
        return found

    yield scores
    if finite is not None and not finite:
        raise InputError(
            "The network gave class scores that are not finite on attacked images, so that the attack means nothing "
            "there; check its weights, and for roots, divisions or logarithms without a derivative."
        )
