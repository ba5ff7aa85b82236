"""SCORE: squared distances between probability vectors in place of cross-entropy and divergence (Pang et al. 2022)."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clat.errors import InputError
from clat.inputs import check_fields
from clat.network import Images, Labels, held, logits
from clat.objectives.base import Objective, check_start
from clat.threat import Threat, ascend


@dataclass(frozen=True, kw_only=True)
class Score(Objective):
    """Mean of ReLU(d - b), with d image by image one of two forms ("LSE") and b a level below which nothing is gained.

    pgd-at: d = |p(x') - onehot(y)|^2, and x' maximises d. The authors attack in train mode, with clip 0.4.
    trades: d = |p(x) - onehot(y)|^2 + beta |p(x') - p(x)|^2, and x' maximises the second distance. The authors attack
    in eval mode, with clip 0.3. p(x) is detached in the attack but not in the loss.

    Args:
        form: pgd-at or trades
        beta: weight of the second distance of the form trades
        clip: c in b = c^2 K / (K - 1) for K classes, the squared distance from onehot(y) to the prediction that gives
            the label 1 - c and the others equal shares; 0 clips nothing

    Source: P2333/SCORE, the code without generated data.
    """

    name = "score"
    form: Literal["pgd-at", "trades"] = "trades"
    beta: float = 6.0
    clip: float = 0.3

    def __post_init__(self) -> None:
        check_fields(self, "score.")
        if self.beta < 0:
            raise InputError(f"score.beta is {self.beta}; the weight of the second distance must be 0 or more.")
        if not 0 <= self.clip < 1:
            raise InputError(f"score.clip is {self.clip}; it must be 0 or more and below 1.")

    def perturb(self, model: nn.Module, x: Images, y: Labels, threat: Threat) -> Images:
        if self.form == "pgd-at":
            return ascend(lambda z: _to_label(_probabilities(model, z), y), x, threat, model=model)
        check_start(threat, "score in its form trades")
        with held(model, threat.mode), torch.no_grad():
            target = _probabilities(model, x)
        return ascend(lambda z: _squared(_probabilities(model, z) - target), x, threat, model=model)

    def loss(self, model: nn.Module, x: Images, x_adv: Images, y: Labels) -> dict[str, Tensor]:
        if self.form == "pgd-at":
            p = _probabilities(model, x_adv)
            distance = _to_label(p, y)
        else:
            p = _probabilities(model, x)
            distance = _to_label(p, y) + self.beta * _squared(_probabilities(model, x_adv) - p)
        classes = p.shape[1]
        return {"squared_error": F.relu(distance - self.clip**2 * classes / (classes - 1)).mean()}


def _probabilities(model: nn.Module, x: Images) -> Tensor:
    return logits(model(x)).softmax(1)


def _to_label(p: Tensor, y: Labels) -> Tensor:
    return _squared(p - F.one_hot(y, p.shape[1]))


def _squared(difference: Tensor) -> Tensor:
    """The squared l2 norm of each row (batch, classes), shape (batch,)."""
    return difference.square().sum(1)
