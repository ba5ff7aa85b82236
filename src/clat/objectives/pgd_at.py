"""Adversarial training with projected gradient descent (Madry et al. 2018)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from clat.network import Images, Labels, logits
from clat.objectives.base import Objective
from clat.threat import Threat, attack_output


@dataclass(frozen=True, kw_only=True)
class PgdAt(Objective):
    """Cross-entropy on images attacked by PGD on the cross-entropy; no clean term."""

    name = "pgd-at"

    def takes_soft_labels(self) -> bool:
        return True

    def perturb(self, model: nn.Module, x: Images, y: Labels, threat: Threat) -> Images:
        return attack_output(model, x, y, threat)

    def loss(self, model: nn.Module, x: Images, x_adv: Images, y: Labels) -> dict[str, Tensor]:
        return {"cross_entropy": F.cross_entropy(logits(model(x_adv)), y)}
