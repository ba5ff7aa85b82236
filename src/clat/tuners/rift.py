"""RiFT: trains the layer that matters least for robustness, then interpolates between its old and new weights."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from clat.criticality import LayerScore
from clat.errors import InputError
from clat.inputs import check_fields
from clat.layers import layer_modules, trace
from clat.network import Images, Labels, held, logits
from clat.threat import Threat, attack_output
from clat.tuners.base import Batch, Measure, Tuner
from clat.tuners.selection import Selection, moving_norms, selectable, with_tied

Batches = Sequence[tuple[Images, Labels]]
State = Mapping[str, Tensor]  # dotted name -> parameter or buffer


@dataclass(frozen=True, kw_only=True)
class Rift(Tuner):
    """Trains the weight with the lowest module robust criticality (MRC), then interpolates.

    The training itself is the recipe's: the authors use the objective clean. Candidates are the weights of all Conv2d
    and Linear layers that run, projection shortcuts and the head included. In the selection that ``select`` returns,
    a score's criticality is the layer's MRC and its weakness the loss that the MRC was reached at.

    Args:
        batch: training images that the MRC is measured on, attacked once by the recipe's threat
        radius: largest perturbation of a weight, as a share of its norm
        passes: passes of ascent over the attacked images
        step: learning rate of the ascent
        step_images: images of one ascent step
        norm_statistics: which BatchNorm layers use and update batch statistics while the weight trains: all (the
            authors train in train mode), selected (the one right after the weight's layer) or frozen (none)
        largest_drop: robust accuracy that the interpolation may lose, as a share of the images

    Source: Zhu et al. 2023, "Improving Generalization of Adversarial Training via Robust Critical Fine-Tuning";
    microsoft/robustlearn.
    """

    name = "rift"
    batch: int = 10_000
    radius: float = 0.1
    passes: int = 10
    step: float = 1.0
    step_images: int = 512
    norm_statistics: Literal["frozen", "selected", "all"] = "all"
    largest_drop: float = 0.001
    ends = True

    def __post_init__(self) -> None:
        check_fields(self, "rift.")
        for key in ("batch", "passes", "step_images"):
            if getattr(self, key) < 1:
                raise InputError(f"rift.{key} is {getattr(self, key)}; it must be 1 or more.")
        for key in ("radius", "step"):
            if not getattr(self, key) > 0:
                raise InputError(f"rift.{key} is {getattr(self, key)}; it must be above 0.")
        if not 0 <= self.largest_drop <= 1:
            raise InputError(f"rift.largest_drop is {self.largest_drop}; it is a share of the images, e.g. 0.001.")

    def select(
        self,
        model: nn.Module,
        x: Images,
        y: Labels,
        threat: Threat,
        *,
        epoch: int = 1,
        seed: int = 0,
        unseen: Batch | None = None,
    ) -> Selection:
        """The layer of the lowest MRC on images x (batch, channel, height, width) with labels y (batch,)."""
        calls = {call.name: call for call in trace(model, x[:1]) if isinstance(call.module, (nn.Conv2d, nn.Linear))}
        calls = {name: call for name, call in calls.items() if "weight" in dict(call.module.named_parameters())}
        if not calls:
            raise InputError("The network has no 2-d convolution or linear layer with a plain weight to fine-tune.")
        calls = {name: calls[name] for name in selectable(model, calls)}
        batches = [
            (attack_output(model, clean, labels, threat), labels)
            for clean, labels in zip(x.split(self.step_images), y.split(self.step_images), strict=True)
        ]
        start = risk(model, batches)
        scores = []
        for name, call in calls.items():
            worst = worst_risk(model, f"{name}.weight", batches, radius=self.radius, passes=self.passes, step=self.step)
            scores.append(LayerScore(name, call.index, worst, worst - start, call.parameters))
        chosen = min(scores, key=lambda score: score.criticality).name
        norm, weight = calls[chosen].norm, calls[chosen].module.weight
        return Selection(
            epoch=epoch,
            layers=tuple(with_tied(model, [chosen], layer_modules(model))),
            trainable=tuple(name for name, parameter in model.named_parameters() if parameter is weight),
            training=moving_norms(model, self.norm_statistics, {norm} if norm else set()),
            scores=tuple(scores),
        )

    def end(self, model: nn.Module, start: State, measure: Measure) -> dict[str, Any]:
        """Blends the fine-tuned network with its start and leaves it at the best blend; returns that and all others.

        theta_alpha = (1 - alpha) theta_start + alpha theta_tuned over parameters and buffers, alpha in 0, 0.1, ..., 1.
        """
        tuned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        points = []
        for tenth in range(11):
            blend(model, start, tuned, tenth / 10)
            points.append(Point(tenth / 10, *measure()))
        best = choose(points, self.largest_drop)
        blend(model, start, tuned, best.alpha)
        return {**asdict(best), "points": [asdict(point) for point in points]}


def risk(model: nn.Module, batches: Batches, weights: State | None = None) -> float:
    """R: the mean cross-entropy over all images, with the given weights in place of the network's own."""
    total, count = 0.0, 0
    with held(model), torch.no_grad():
        for x, y in batches:
            scores = logits(functional_call(model, dict(weights or {}), (x,)))
            total += F.cross_entropy(scores, y, reduction="sum").item()
            count += len(y)
    return total / count


def worst_risk(model: nn.Module, name: str, batches: Batches, *, radius: float, passes: int, step: float) -> float:
    """The highest R(theta + delta) found with |delta| <= radius |theta|, theta being the weight of that name.

    The MRC is this minus R(theta). After each pass of plain gradient ascent over the batches, delta is scaled back
    into the ball and R is measured there, in eval mode; the network itself is unchanged.

    Raises:
        InputError: the ascent gave numbers that are not finite
    """
    theta = model.get_parameter(name).detach()
    largest = radius * theta.norm()
    moved, worst = theta, risk(model, batches)
    for _ in range(passes):
        with held(model):
            for x, y in batches:
                moved = moved.detach().requires_grad_()
                loss = F.cross_entropy(logits(functional_call(model, {name: moved}, (x,))), y)
                (gradient,) = torch.autograd.grad(loss, moved)
                moved = moved.detach() + step * gradient
        delta = moved - theta
        moved = theta + delta * (largest / delta.norm()).clamp(max=1).nan_to_num(0)
        if not torch.isfinite(moved).all():
            raise InputError(f"The ascent on {name} left the finite numbers; lower rift.step.")
        worst = max(worst, risk(model, batches, {name: moved}))
    return worst


@dataclass(frozen=True)
class Point:
    """Held-out accuracy of the network a share ``alpha`` of the way from its start to its fine-tuned weights."""

    alpha: float
    clean: float
    robust: float


def choose(points: Sequence[Point], largest_drop: float) -> Point:
    """The highest clean accuracy whose robust accuracy is at most ``largest_drop`` below that of the first point.

    Of equals, the more robust one, then the one nearer to the start.
    """
    floor = points[0].robust - largest_drop - 1e-9  # accuracies are ratios of counts: a drop of exactly that is allowed
    return max((p for p in points if p.robust >= floor), key=lambda p: (p.clean, p.robust, -p.alpha))


@torch.no_grad()
def blend(model: nn.Module, start: State, tuned: State, alpha: float) -> None:
    """Sets every parameter and buffer to (1 - alpha) start + alpha tuned; counters come from the nearer of the two."""
    for name, tensor in model.state_dict().items():
        first = start[name].to(tensor.device)
        if tensor.is_floating_point():
            tensor.copy_(torch.lerp(first, tuned[name], alpha))
        else:
            tensor.copy_(first if alpha < 0.5 else tuned[name])
