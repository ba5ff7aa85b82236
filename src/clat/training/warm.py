"""Attacks that start where the last epoch's attack on the same image ended."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from clat.data.crops import Crops
from clat.network import Images, per_image
from clat.threat import Threat


@dataclass(frozen=True, kw_only=True, eq=False)
class WarmThreat(Threat):
    """A threat model whose first iterate is given for some images of one batch.

    Args:
        delta: perturbations (batch, channel, height, width)
        known: for which images they are to be used, bool (batch,); the others start as ``start`` says
    """

    delta: Tensor
    known: Tensor

    def __post_init__(self) -> None:
        """Its other fields are those of a threat model that was checked."""

    def first(self, x: Images) -> Images:
        fresh = super().first(x)
        return torch.where(per_image(self.known, x), self.project(x + self.delta, x), fresh)


class Perturbations:
    """The last perturbation of every training image, as it lies in the image before crop and flip.

    A pixel that an epoch's crop left out keeps its earlier value. Half precision: two bytes a value, 307 MB for the
    50,000 images of CIFAR-10, in memory and in the run folder.

    Args:
        images: how many there are
        shape: (channel, height, width) of one
    """

    def __init__(self, images: int, shape: tuple[int, ...], device: torch.device) -> None:
        self.tensors = {
            "delta": torch.zeros(images, *shape, dtype=torch.float16, device=device),
            "known": torch.zeros(images, dtype=torch.bool, device=device),
        }

    def threat(self, threat: Threat, order: Tensor, crops: Crops | None) -> Threat:
        """The threat model of a batch: the images at these places, cropped so."""
        order = order.to(self.tensors["delta"].device)
        delta = self.tensors["delta"][order]
        usual = {field.name: getattr(threat, field.name) for field in fields(threat)}
        shown = delta if crops is None else crops.apply(delta)
        return WarmThreat(**usual, delta=shown.float(), known=self.tensors["known"][order])

    def keep(self, delta: Tensor, order: Tensor, crops: Crops | None) -> None:
        """Remembers the perturbations that were found for a batch."""
        order, delta = order.to(delta.device), delta.detach().half()
        before = self.tensors["delta"][order]
        self.tensors["delta"][order] = delta if crops is None else crops.undo(delta, before)
        self.tensors["known"][order] = True
