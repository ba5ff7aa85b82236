"""MART: adversarial training that weighs misclassified images more (Wang et al. 2020)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clat.compute import full_precision
from clat.errors import InputError
from clat.inputs import check_fields
from clat.network import Images, Labels, logits
from clat.objectives.base import Objective
from clat.threat import Threat, attack_output


@dataclass(frozen=True, kw_only=True)
class Mart(Objective):
    """Boosted cross-entropy on attacked images + beta x KL(p(x) || p(x')) weighted by 1 - p_y(x).

    The boosted cross-entropy adds the margin term -log(1 - the highest probability of a wrong class). Nothing is
    detached. Probabilities are fp32 also under autocast, where the constants that keep the logarithms finite would
    vanish.

    Args:
        beta: weight of the divergence; the authors use 5 for ResNet-18 and 6 for WRN-34-10

    Source: YisenWang/MART.
    """

    name = "mart"
    beta: float = 5.0

    def __post_init__(self) -> None:
        check_fields(self, "mart.")
        if self.beta < 0:
            raise InputError(f"mart.beta is {self.beta}; the weight of the divergence must be 0 or more.")

    def perturb(self, model: nn.Module, x: Images, y: Labels, threat: Threat) -> Images:
        return attack_output(model, x, y, threat)

    def loss(self, model: nn.Module, x: Images, x_adv: Images, y: Labels) -> dict[str, Tensor]:
        clean, attacked = logits(model(x)), logits(model(x_adv))
        with full_precision(x.device):
            p, q = clean.softmax(1), attacked.softmax(1)
            label = y.unsqueeze(1)
            wrong = q.scatter(1, label, -1).max(1).values  # of the likeliest class that is not the label
            margin = -torch.log(1.0001 - wrong + 1e-12)
            error = 1.0000001 - p.gather(1, label).squeeze(1)
            # log p from the scores: p underflows to 0 for the classes that a network rules out
            divergence = (p * (F.log_softmax(clean, 1) - torch.log(q + 1e-12))).sum(1)
            return {
                "boosted_cross_entropy": F.cross_entropy(attacked, y) + margin.mean(),
                "divergence": self.beta * (error * divergence).mean(),
            }
