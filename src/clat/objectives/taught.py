"""Clat with a teacher: the network as it was when the run began."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clat.network import Images, Labels, logits
from clat.objectives.base import Objective
from clat.threat import Threat

if TYPE_CHECKING:
    from clat.objectives.clat import Clat


class Taught(Objective):
    """Clat in a run whose start is known: the start teaches the network its own outputs."""

    def __init__(self, clat: "Clat", start: nn.Module) -> None:
        self.clat, self.start = clat, start

    def perturb(self, model: nn.Module, x: Images, y: Labels, threat: Threat) -> Images:
        return self.clat.perturb(model, x, y, threat)

    def loss(self, model: nn.Module, x: Images, x_adv: Images, y: Labels) -> dict[str, Tensor]:
        """Clat's terms and the teacher's: weight x T^2 KL(start's softmax at T, the network's), as Hinton et al."""
        terms, scored = self.clat.terms(model, x, x_adv, y)
        divergence = torch.stack([self._divergence(z, scores) for z, scores in scored]).mean()
        return {**terms, "teacher": self.clat.teacher * divergence}

    def _divergence(self, x: Images, scores: Tensor) -> Tensor:
        temperature = self.clat.temperature
        with torch.no_grad():
            wanted = torch.softmax(logits(self.start(x)) / temperature, dim=1)
        found = torch.log_softmax(scores / temperature, dim=1)
        return temperature**2 * F.kl_div(found, wanted, reduction="batchmean")
