"""TRADES: clean cross-entropy, and a penalty on how far an attack moves the prediction (Zhang et al. 2019)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clat.errors import InputError
from clat.inputs import check_fields
from clat.network import Images, Labels, held, logits
from clat.objectives.base import Objective, check_start
from clat.threat import Threat, ascend


@dataclass(frozen=True, kw_only=True)
class Trades(Objective):
    """CE(f(x), y) + beta x KL(p(x) || p(x')), where x' maximises the same divergence.

    The defaults are the authors' code: the target p(x) of the divergence comes from a second pass over the clean
    images, so BatchNorm's statistics move three times a step (clean, attacked, clean), and it is not detached.

    Args:
        beta: weight of the divergence, 1 / lambda of the paper
        gradient_through_target: let the gradient of the divergence reach p(x) too
        second_clean_forward: compute p(x) a second time, instead of sharing the scores of the cross-entropy

    Source: yaodongyu/TRADES, equation 5 of arXiv 1901.08573.
    """

    name = "trades"
    beta: float = 6.0
    gradient_through_target: bool = True
    second_clean_forward: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "trades.")
        if self.beta < 0:
            raise InputError(f"trades.beta is {self.beta}; the weight of the divergence must be 0 or more.")

    def takes_soft_labels(self) -> bool:
        return True

    def perturb(self, model: nn.Module, x: Images, y: Labels, threat: Threat) -> Images:
        check_start(threat, "trades")
        with held(model, threat.mode), torch.no_grad():
            target = logits(model(x))
        return ascend(lambda z: divergence(target, logits(model(z))), x, threat, model=model)

    def loss(self, model: nn.Module, x: Images, x_adv: Images, y: Labels) -> dict[str, Tensor]:
        clean, attacked = logits(model(x)), logits(model(x_adv))
        target = logits(model(x)) if self.second_clean_forward else clean
        if not self.gradient_through_target:
            target = target.detach()
        return {
            "cross_entropy": F.cross_entropy(clean, y),
            "divergence": self.beta * divergence(target, attacked).mean(),
        }


def divergence(target: Tensor, scores: Tensor) -> Tensor:
    """KL(p || q) of each image, shape (batch,), from the class scores (batch, classes) of p and q."""
    log_p, log_q = F.log_softmax(target, 1), F.log_softmax(scores, 1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
