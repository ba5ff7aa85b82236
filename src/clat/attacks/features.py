"""Attacks through features: the one that adapts to CLAT, and the activation attack, which transfers."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clat.attacks.attack import Attack, finite_scores
from clat.attacks.pgd import pgd_threat
from clat.data.dataset import Dataset, to_unit
from clat.errors import InputError
from clat.features import At, feature_distance
from clat.layer_names import named_layers
from clat.network import Images, Labels, per_image
from clat.threat import Lp, Threat, ascend


def through_layers(
    layers: Sequence[str],
    eps: float | str,
    norm: Lp = "linf",
    *,
    steps: int = 20,
    at: At = "output",
    seed: int = 0,
) -> Attack:
    """The attack that adapts to CLAT: through the very features whose distance CLAT has minimised.

    From a random start it ascends the sum over the layers of ||F_i(x + delta) - F_i(x)|| (Eq. 8), then from that
    point the cross-entropy, and from the same point once more the margin. Of these images each keeps the one with the
    largest margin, which is positive if it is misclassified.

    Args:
        layers: dotted names, e.g. the critical layers that CLAT selected
        steps: of each of the three ascents, eps / 4 long
        at: features at the layer's output or after its normalisation and activation
    Raises:
        InputError: no layer, or when it runs one that the network has not

    Source: Section 3 of the paper; the advice of Tramer et al. 2020 to attack what the defence relies on.
    """
    if not layers:
        raise InputError("Name at least one layer to attack through.")
    threat = pgd_threat(eps, steps, norm)

    def perturb(model: nn.Module, x: Images, y: Labels) -> Images:
        start = ascend(feature_distance(model, x, named_layers(model, x, layers), at=at), x, threat, model=model)
        with finite_scores(model) as scores:

            def climbed(cost: Callable[[Tensor, Labels], Tensor]) -> Images:
                return ascend(lambda z: cost(scores(z), y), x, threat, model=model, keep="best", start=start)

            best, highest = start, margin(scores(start), y)
            for x_adv in (climbed(cross_entropy), climbed(margin)):
                found = margin(scores(x_adv), y)
                best = torch.where(per_image(found > highest, x), x_adv, best)
                highest = torch.maximum(found, highest)
        return best

    return Attack(
        name=f"Feature-PGD-{steps}",
        perturb=torch.no_grad()(perturb),
        threat=threat,
        passes=3 * (steps + 1),
        seed=seed,
        settings={"layers": list(layers), "at": at, "steps": steps, "step": float(threat.step)},
    )


def activation(
    layer: str,
    guides: Dataset,
    eps: float | str,
    norm: Lp = "linf",
    *,
    steps: int = 10,
    momentum: float = 1.0,
    at: At = "output",
    seed: int = 0,
) -> Attack:
    """The activation attack, made to transfer: moves one layer's feature towards that of an image of another class.

    From the image itself it descends ||F(x + delta) - F(guide)|| by momentum-sign steps of eps / steps. Each image's
    guide is drawn at random from those of another class.

    Args:
        layer: dotted name; layers in the middle or later transfer best
        guides: images to draw from, e.g. the very set that is attacked; their labels must be the classes of the images
        momentum: share of the earlier direction that each step keeps
        at: the feature at the layer's output or after its normalisation and activation
    Raises:
        InputError: when it runs a layer that the network has not, or no guide of another class

    Source: Inkawhich et al. 2019, "Feature space perturbations yield more transferable adversarial examples".
    """
    if steps < 1:
        raise InputError(f"The activation attack has {steps} steps; it must be 1 or more.")
    radius = Threat(eps=eps, norm=norm).radius
    threat = Threat(eps=radius, step=radius / steps, steps=steps, norm=norm, start="zero")

    def perturb(model: nn.Module, x: Images, y: Labels) -> Images:
        pixels, _ = next(guides.subset(_of_another_class(guides.labels.cpu(), y.cpu())).batches(len(y), workers=0))
        distance = feature_distance(model, to_unit(pixels).to(x.device), named_layers(model, x, [layer]), at=at)
        return ascend(lambda z: -distance(z), x, threat, model=model, momentum=momentum)

    settings = {"layer": layer, "at": at, "steps": steps, "step": float(threat.step), "momentum": momentum}
    return Attack(
        name=f"Activation-{steps}",
        perturb=perturb,
        threat=threat,
        passes=steps + 1,
        seed=seed,
        settings={**settings, "guides": f"{guides.source} sha256:{guides.digest()[:16]}"},
    )


def margin(scores: Tensor, y: Labels) -> Tensor:
    """The highest score of another class minus that of the label, image by image (batch,): positive if misclassified.

    Args:
        scores: class scores (batch, classes)
    """
    right = F.one_hot(y, scores.shape[1]).bool()
    return scores.masked_fill(right, -torch.inf).amax(1) - scores[right]


def cross_entropy(scores: Tensor, y: Labels) -> Tensor:
    """The cross-entropy, image by image (batch,), of class scores (batch, classes)."""
    return F.cross_entropy(scores, y, reduction="none")


def _of_another_class(labels: Labels, y: Labels) -> Tensor:
    """For each label of y a place in ``labels``, drawn at random from those with another label, shape of y."""
    other = labels != y[:, None]
    if not other.any(1).all():
        raise InputError("The activation attack needs guides of another class for every image; give it more of them.")
    return torch.where(other, torch.rand(other.shape), -1).argmax(1)
