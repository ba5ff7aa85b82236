"""GradAlign: one-step training with a penalty on gradients that turn inside the ball (Andriushchenko et al. 2020)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clat.errors import InputError
from clat.features import lengths
from clat.inputs import check_fields
from clat.network import Images, Labels, logits, per_image
from clat.objectives.base import Objective, check_one_step
from clat.threat import Threat, attack_output


@dataclass(frozen=True, kw_only=True)
class GradAlign(Objective):
    """CE(f(x + FGSM)) + weight x mean(1 - cos(g(x), g(x + noise))), with g the gradient of CE by the image.

    The noise is uniform in [-eps, eps] and not cut with the box. FGSM moves pixels by exactly eps, which is how the
    loss knows it. g(x) is detached: only the noisy gradient is differentiated again. Images with a zero gradient are
    left out of the mean.

    g(x) is computed again in the loss, in train mode. With ``threat.mode`` batch, BatchNorm's statistics therefore
    move as often as the authors' (clean, noisy, attacked).

    Args:
        weight: lambda; the authors' rule is 0.02 x 10^(255 eps / 8), which is 0.2 at 8/255 and 2 at 16/255

    Source: tml-epfl/understanding-fast-adv-training.
    """

    name = "grad-align"
    weight: float = 0.2

    def __post_init__(self) -> None:
        check_fields(self, "grad_align.")
        if self.weight < 0:
            raise InputError(f"grad_align.weight is {self.weight}; lambda must be 0 or more.")

    def perturb(self, model: nn.Module, x: Images, y: Labels, threat: Threat) -> Images:
        check_one_step(threat, "grad-align", "eps")
        if threat.start != "zero" or threat.norm != "linf" or float(threat.step) < threat.radius:
            raise InputError(
                "grad-align attacks by FGSM; set threat.start to zero, threat.norm to linf and threat.step to eps."
            )
        return attack_output(model, x, y, threat)

    def loss(self, model: nn.Module, x: Images, x_adv: Images, y: Labels) -> dict[str, Tensor]:
        eps = (x_adv - x).abs().max().item()
        clean = _gradient(model, x, y)
        noisy = _gradient(model, x + torch.empty_like(x).uniform_(-eps, eps), y, differentiable=True)
        kept = (lengths(clean) > 0) & (lengths(noisy) > 0)  # at zero a direction is not defined, nor its derivative
        turn = 1 - (_direction(clean[kept]) * _direction(noisy[kept])).flatten(1).sum(1)
        return {
            "cross_entropy": F.cross_entropy(logits(model(x_adv)), y),
            "alignment": self.weight * turn.sum() / max(len(turn), 1),
        }


def _gradient(model: nn.Module, x: Images, y: Labels, *, differentiable: bool = False) -> Tensor:
    x = x.detach().requires_grad_()
    cost = F.cross_entropy(logits(model(x)), y, reduction="sum")
    return torch.autograd.grad(cost, x, create_graph=differentiable)[0].float()


def _direction(gradient: Tensor) -> Tensor:
    return gradient / per_image(lengths(gradient), gradient)
