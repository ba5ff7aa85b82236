"""Measures to rank layers by: the paper's criticality, and other measures of one attacked batch."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clat.criticality import LayerScore, MeanOfAll, Norm, layer_criticality
from clat.errors import InputError
from clat.features import At
from clat.layers import trace
from clat.network import Images, Labels, by_image, eager, first_tensor, held, hooked, logits

Ranking = Literal["criticality", "relative", "loss", "alignment", "gradient"]
Order = Literal[Ranking, "random", "lowest"]  # with the controls, which rank by nothing and by the least criticality


@dataclass(frozen=True)
class Attacked:
    """A batch and its attacked images."""

    x: Images
    x_adv: Images
    y: Labels


def rank_layers(
    model: nn.Module,
    batch: Attacked,
    ranking: Order = "criticality",
    *,
    unseen: Attacked | None = None,
    norm: Norm = "paper",
    at: At = "output",
    mean: MeanOfAll | None = None,
) -> list[LayerScore]:
    """Every layer in execution order, in eval mode; the ranking's measure stands in the place of the criticality.

    The layers of the highest measure come first in a ranking:

    - criticality: C of Eq. 6
    - relative: E_x ||dF|| / ||F||, how far the attack moves a layer's features, as a share of their length
    - loss: by how much the cross-entropy on clean images rises when this layer's output alone is what it is for the
      attacked images, and all later layers compute from it
    - alignment: <g, g'> / ||g||^2, where g is the gradient of the cross-entropy on the attacked batch with respect to
      the layer's parameters and g' that on ``unseen``: the share of a step's gain in training that images which were
      not trained on have too, to first order
    - gradient: ||g|| / sqrt(n), with n parameters in the layer

    Args:
        batch: training images
        unseen: images that were not trained on, for alignment
        norm, at: as for ``criticality``, which also gives the weakness
        mean: averages criticality, relative and loss over processes that have other images of the same batch
    Raises:
        InputError: as ``criticality``; alignment without ``unseen``; a measure that is not finite
    """
    scores = layer_criticality(model, batch.x, batch.x_adv, norm=norm, at=at, mean=mean)
    if ranking in ("criticality", "random", "lowest"):  # the controls show it too
        return scores
    if ranking == "relative":
        shares = layer_criticality(model, batch.x, batch.x_adv, norm="relative", at=at, mean=mean)
        values = [share.weakness for share in shares]
    elif ranking == "loss":
        values = _rises(model, batch)
        if mean is not None:
            values = mean(torch.tensor(values, device=batch.x.device), len(batch.x)).tolist()
    elif ranking == "gradient":
        gradients = _gradients(model, batch)
        values = [math.sqrt(_product(gradients, gradients, model, score.name) / score.parameters) for score in scores]
    elif unseen is None:
        raise InputError(
            "The ranking alignment compares training images with images that were not trained on; give some as unseen."
        )
    else:
        values = _alignments(model, batch, unseen, scores)
    for score, value in zip(scores, values, strict=True):
        if not math.isfinite(value):
            raise InputError(f"The {ranking} of layer {score.name} is not finite; check the weights and the images.")
    return [replace(score, criticality=value) for score, value in zip(scores, values, strict=True)]


def _rises(model: nn.Module, batch: Attacked) -> list[float]:
    """The rise of the cross-entropy with each call's output replaced, one forward pass for each."""
    calls = trace(model, batch.x[:1])
    modules = {call.name: call.module for call in calls}
    with held(model), torch.no_grad():
        clean = F.cross_entropy(logits(eager(model, batch.x)), batch.y)
        replaced = [_spliced(model, batch.x, batch.x_adv, modules, number) for number in range(len(calls))]
        return [(F.cross_entropy(scores, batch.y) - clean).item() for scores in replaced]


def _spliced(model: nn.Module, x: Images, x_adv: Images, modules: Mapping[str, nn.Module], number: int) -> Tensor:
    """The class scores (batch, classes) of x if one call of the modules gave for x what it gives for x_adv.

    Both run as one batch, so a layer must not mix images: run the network in eval mode.

    Args:
        number: the call, counted from 0 in execution order over all modules
    """
    seen = 0

    def hook(module: nn.Module, _inputs: Any, output: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen != number + 1:
            return output
        feature = first_tensor(output)
        changed = feature.clone()
        rows = by_image(changed, images=2 * len(x), module=module)
        rows[: len(x)] = rows[len(x) :]
        return changed if output is feature else (changed, *output[1:])  # attention returns its weights too

    with hooked([module.register_forward_hook(hook) for module in modules.values()]):
        return logits(eager(model, torch.cat([x, x_adv])))[: len(x)]


def _alignments(model: nn.Module, batch: Attacked, unseen: Attacked, scores: list[LayerScore]) -> list[float]:
    seen, other = _gradients(model, batch), _gradients(model, unseen)
    values = []
    for score in scores:
        length = _product(seen, seen, model, score.name)
        values.append(_product(seen, other, model, score.name) / length if length else 0.0)
    return values


def _gradients(model: nn.Module, batch: Attacked) -> dict[nn.Parameter, Tensor]:
    """The gradient of the cross-entropy on the attacked images for each parameter, those that are frozen too."""
    with held(model), _asking(model) as parameters, torch.enable_grad():
        loss = F.cross_entropy(logits(eager(model, batch.x_adv)), batch.y)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        parameter: torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(parameters, found, strict=True)
    }


@contextmanager
def _asking(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The network's parameters, with gradients on inside the block; used inside ``held``, which restores them."""
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield parameters
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _product(
    first: Mapping[nn.Parameter, Tensor], second: Mapping[nn.Parameter, Tensor], model: nn.Module, layer: str
) -> float:
    """The scalar product of two gradients over the parameters of a layer."""
    own = list(model.get_submodule(layer).parameters())
    return sum(float((first[parameter] * second[parameter]).sum(dtype=torch.float64)) for parameter in own)
