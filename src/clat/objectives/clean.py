"""Training without an attack."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from clat.network import Images, Labels, logits
from clat.objectives.base import Objective
from clat.threat import Threat


@dataclass(frozen=True, kw_only=True)
class Clean(Objective):
    """Cross-entropy on the images as they are."""

    name = "clean"

    def attacks_pixels(self) -> bool:
        return False

    def takes_soft_labels(self) -> bool:
        return True

    def perturb(self, model: nn.Module, x: Images, y: Labels, threat: Threat) -> Images:
        return x

    def loss(self, model: nn.Module, x: Images, x_adv: Images, y: Labels) -> dict[str, Tensor]:
        return {"cross_entropy": F.cross_entropy(logits(model(x)), y)}
