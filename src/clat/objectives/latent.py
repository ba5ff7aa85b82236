"""The attack of Clat that starts inside the network: on the input of the first layer that trains."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clat.behind import Front, behind, front_of, watched
from clat.errors import InputError
from clat.features import At, compare, lengths, record
from clat.layers import trace, trained_layers
from clat.network import Images, Labels, eager, held, logits, per_image
from clat.objectives.base import Objective
from clat.threat import Threat, ascend, attack_output


@dataclass(frozen=True, kw_only=True)
class FeatureBall(Threat):
    """An l2 ball around features, which have no box."""

    def project(self, x_adv: Images, x: Images) -> Images:
        length = self.distance(x_adv, x).clamp_min(self.radius)
        return x + (x_adv - x) * per_image(self.radius / length, x)


@dataclass
class _Perturbation:
    """The result of the last attack: of which images, at which layer's input, and by how much."""

    x: Images
    layer: nn.Module
    delta: Tensor


class Latent(Objective):
    """Clat in one epoch of the latent attack.

    The label loss is maximised over h + delta, where h is the input of the first layer that trains, in the order in
    which layers run, and |delta|_2 <= r for each image. r is found once an epoch: on its first batch the pixel attack
    of the threat model runs too, and r is the mean over these images of the l2 distance that it reaches at h. It takes
    the threat model's number of steps, each the same share of the radius. What precedes the layer runs once a batch.

    Args:
        weight, cross_entropy, at: as of ``Clat``
        between: its feature distance, of the clean features and the others
    """

    def __init__(
        self,
        *,
        weight: float,
        cross_entropy: Literal["clean", "adversarial", "both"],
        between: Callable[[Tensor, Tensor], Tensor],
        at: At,
    ) -> None:
        self.weight, self.cross_entropy, self.between, self.at = weight, cross_entropy, between, at
        self.radius: float | None = None
        self.found: _Perturbation | None = None

    def perturb(self, model: nn.Module, x: Images, y: Labels, threat: Threat) -> Images:
        """Attacks the features and keeps the perturbation for ``loss``; the images stay as they are."""
        layer = _first_trained(model, x)
        with held(model, threat.mode), torch.no_grad():
            front = front_of(model, x, layer)
            feature = front.feature.float()
            if len(feature) != len(x):
                raise InputError(
                    f"A {type(layer).__name__} takes shape {tuple(feature.shape)} for {len(x)} images, which "
                    "clat.attack latent cannot tell apart by image; set it to label, or select other layers."
                )
        if self.radius is None:
            self.radius = self._reached(model, x, y, threat, layer, feature)
        ball = FeatureBall(
            eps=self.radius,
            step=self.radius * float(threat.step) / threat.radius,
            steps=threat.steps,
            norm="l2",
            start="zero" if threat.start == "zero" else "uniform",
            mode=threat.mode,
        )
        perturbed = ascend(lambda z: _losses(model, x, y, front, z), feature, ball, model=model)
        self.found = _Perturbation(x, layer, perturbed - feature)
        return x

    def loss(self, model: nn.Module, x: Images, x_adv: Images, y: Labels) -> dict[str, Tensor]:
        """Eq. 9, where the features under attack are those behind the perturbed input."""
        if self.found is None or self.found.x is not x:
            raise InputError("The latent attack was not made on these images; call perturb on them first.")
        selected, layer = trained_layers(model), self.found.layer
        with watched(model, layer) as front:
            scores, features = record(model, x, selected, at=self.at)
        clean = self.cross_entropy == "clean"
        with behind(model, front, front.feature + self.found.delta):
            other, distance = compare(model, x, selected, features, self.between, at=self.at, whole=not clean)
        scored = {"clean": [scores], "adversarial": [other], "both": [scores, other]}[self.cross_entropy]
        losses = torch.stack([F.cross_entropy(values, y) for values in scored if values is not None])
        return {"cross_entropy": losses.mean(), "criticality": self.weight * distance.mean()}

    def _reached(
        self, model: nn.Module, x: Images, y: Labels, threat: Threat, layer: nn.Module, feature: Tensor
    ) -> float:
        """The mean l2 distance that the pixel attack reaches at the layer's input."""
        x_adv = attack_output(model, x, y, threat)
        with held(model, threat.mode), torch.no_grad():
            radius = lengths(front_of(model, x_adv, layer).feature.float() - feature).mean().item()
        if not radius > 0:
            raise InputError("The pixel attack does not move the first selected layer's input; set clat.attack: label.")
        return radius


def _first_trained(model: nn.Module, x: Images) -> nn.Module:
    selected = trained_layers(model)
    for call in trace(model, x[:1]):
        if call.name in selected:
            return call.module
    raise InputError("No layer of the network trains; select the critical layers first.")


def _losses(model: nn.Module, x: Images, y: Labels, front: Front, feature: Tensor) -> Tensor:
    with behind(model, front, feature):
        return F.cross_entropy(logits(eager(model, x)), y, reduction="none")
