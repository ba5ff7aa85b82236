"""The criticality-targeted objective: Eq. 7-9."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clat.errors import InputError
from clat.features import At, Between, compare, feature_distance, l2, lengths, record
from clat.inputs import check_fields, check_least
from clat.layers import trace, trained_layers
from clat.network import Images, Labels
from clat.objectives.base import Objective, check_start
from clat.objectives.latent import Latent
from clat.objectives.taught import Taught
from clat.threat import Threat, ascend, attack_output

Distance = Literal["l2", "mean", "relative"]


@dataclass(frozen=True, kw_only=True)
class Clat(Objective):
    """Cross-entropy + weight x L_C on the layers that train, which are read from ``requires_grad``.

    L_C is the sum over these layers of E_x ||F_i(x + delta) - F_i(x)||, with one delta for all of them (Eq. 8). The
    defaults are those that measured best (docs/method.md); the letter of Eq. 8 and 9 is ``cross_entropy="clean",
    attack="feature"``.

    Args:
        weight: lambda of Eq. 9, for which the paper gives no value
        cross_entropy: images of the cross-entropy term: adversarial, clean (Eq. 9), or the mean of both
        attack: what delta maximises: label, the cross-entropy of the output; feature, L_C itself (Eq. 8); or latent,
            the cross-entropy, by a delta on the input of the first selected layer, of the length that the pixel attack
            reaches there
        distance: l2 (Eq. 7), mean (l2 / N, as in Eq. 5) or relative (l2 / the length of the clean feature)
        at: features at the layer's output or after its normalisation and activation
        teacher: weight of the divergence from the network as it was when the run began, on the images of the
            cross-entropy; 0 for none
        temperature: that both networks' scores are divided by in it
    """

    name = "clat"
    weight: float = 0.01
    cross_entropy: Literal["clean", "adversarial", "both"] = "adversarial"
    attack: Literal["feature", "label", "latent"] = "label"
    distance: Distance = "l2"
    at: At = "output"
    teacher: float = 0.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        check_fields(self, "clat.")
        check_least(0.0, prefix="clat.", weight=self.weight, teacher=self.teacher)
        if not self.temperature > 0:
            raise InputError(f"clat.temperature is {self.temperature}; it must be above 0.")
        if self.teacher and self.attack == "latent":
            raise InputError(
                "clat.teacher needs attacked images, and clat.attack latent makes none; set the attack to label, or "
                "the teacher to 0."
            )

    def attacks_pixels(self) -> bool:
        return self.attack != "latent"

    def takes_soft_labels(self) -> bool:
        return True

    def carries(self) -> bool:
        return self.attack == "latent"

    def learns_from_start(self) -> bool:
        return self.teacher > 0

    def begin(self, start: nn.Module | None = None) -> Objective:
        if self.attack == "latent":
            between = self._distance
            return Latent(weight=self.weight, cross_entropy=self.cross_entropy, between=between, at=self.at)
        return self if start is None else Taught(self, start)

    def perturb(self, model: nn.Module, x: Images, y: Labels, threat: Threat) -> Images:
        """The inner maximisation of Eq. 8: the network runs only as far as its deepest selected layer."""
        if self.attack == "latent":
            raise InputError("clat.attack latent carries its perturbation to the loss; call begin() first.")
        if self.attack == "label":
            return attack_output(model, x, y, threat)
        check_start(threat, self.name)
        selected = self._selected(model)
        calls = sum(call.name in selected for call in trace(model, x[:1]))
        cost = feature_distance(model, x, selected, self._distance, at=self.at, mode=threat.mode, calls=calls)
        return ascend(cost, x, threat, model=model)

    def loss(self, model: nn.Module, x: Images, x_adv: Images, y: Labels) -> dict[str, Tensor]:
        """Eq. 9. The images of the cross-entropy run through the whole network, the others only as far as needed."""
        if self.learns_from_start():
            raise InputError("clat.teacher needs the network that the run began with; call begin(start) first.")
        return self.terms(model, x, x_adv, y)[0]

    def terms(
        self, model: nn.Module, x: Images, x_adv: Images, y: Labels
    ) -> tuple[dict[str, Tensor], list[tuple[Images, Tensor]]]:
        """The terms without the teacher's; and the images of the cross-entropy with their class scores."""
        selected = self._selected(model)
        adversarial = self.cross_entropy == "adversarial"
        first, second = (x_adv, x) if adversarial else (x, x_adv)
        between: Between = (lambda attacked, clean: self._distance(clean, attacked)) if adversarial else self._distance
        scores, features = record(model, first, selected, at=self.at)
        assert scores is not None  # it ran to the end
        cross_entropy = F.cross_entropy(scores, y)
        both = self.cross_entropy == "both"
        other, distance = compare(model, second, selected, features, between, at=self.at, whole=both)
        scored = [(first, scores)]
        if other is not None:
            cross_entropy = (cross_entropy + F.cross_entropy(other, y)) / 2
            scored.append((second, other))
        return {"cross_entropy": cross_entropy, "criticality": self.weight * distance.mean()}, scored

    def _selected(self, model: nn.Module) -> dict[str, nn.Module]:
        selected = trained_layers(model)
        if not selected:
            raise InputError("No layer of the network trains; select the critical layers first.")
        return selected

    def _distance(self, clean: Tensor, adversarial: Tensor) -> Tensor:
        distance = l2(clean, adversarial)
        if self.distance == "mean":
            return distance / clean[0].numel()
        if self.distance == "relative":
            return distance / lengths(clean).clamp_min(torch.finfo(torch.float32).tiny)
        return distance
