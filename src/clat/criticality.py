"""How much each layer contributes to the network's weakness under attack: Eq. 5 and 6."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from clat.errors import InputError
from clat.features import At, lengths, observe
from clat.inputs import check_word
from clat.layers import Call, trace
from clat.network import Images, check_images, held

Norm = Literal["paper", "rms", "relative"]
MeanOfAll = Callable[[Tensor, int], Tensor]  # means over so many images here -> over those of all processes

SMALLEST_RATIO = 1e-6  # denominators of Eq. 6 below this share of the largest weakness count as this share


@dataclass(frozen=True)
class LayerScore:
    """One layer of the ranking; a layer that runs twice has two, with the same name.

    name: dotted name in the model; index: the paper's 1-based number, None for projection shortcuts;
    weakness: W of Eq. 5; criticality: C of Eq. 6, or what another ranking measures in its place
    (``clat.tuners.rankings``); parameters: weights and biases of the layer.
    """

    name: str
    index: int | None
    weakness: float
    criticality: float
    parameters: int


def layer_criticality(
    model: nn.Module,
    x: Images,
    x_adv: Images,
    *,
    norm: Norm = "paper",
    at: At = "output",
    mean: MeanOfAll | None = None,
) -> list[LayerScore]:
    """Weakness (Eq. 5) and criticality (Eq. 6) of every layer, in execution order, from one forward pass.

    Clean and attacked images run as one batch in eval mode and are compared inside the pass, so that memory does not
    grow with the number of layers. ``C_1 = W_1``; later ``C_i = W_i / W_{i-1}``, with i-1 the counted layer before.

    Args:
        x: images (batch, channel, height, width)
        x_adv: the same images under attack, e.g. from ``attack_output``
        norm: divide each feature distance by N ("paper", Eq. 5), by sqrt(N) ("rms") or, image by image, by the length
            of the clean feature ("relative")
        at: compare features at the layer's output or after its normalisation and activation
        mean: averages the weaknesses over processes that have other images of the same batch
    Raises:
        InputError: images of another shape or outside [0, 1]; another word; features that are not finite
    """
    check_word("norm", norm, get_args(Norm))
    check_word("at", at, get_args(At))
    check_images(x)
    check_images(x_adv)
    if x.shape != x_adv.shape:
        raise InputError(f"The clean images have shape {tuple(x.shape)}, the attacked ones {tuple(x_adv.shape)}.")
    calls = trace(model, x[:1])
    modules = {call.name: call.module for call in calls}
    weakness: dict[int, Tensor] = {}

    def compare(number: int, feature: Tensor) -> None:
        clean, attacked = feature.float().chunk(2)
        distance, size = lengths(attacked - clean), clean[0].numel()
        if norm == "relative":
            weakness[number] = (distance / lengths(clean).clamp_min(torch.finfo(torch.float32).tiny)).mean()
        else:
            weakness[number] = distance.mean() / (size if norm == "paper" else math.sqrt(size))

    with held(model), torch.no_grad():
        observe(model, torch.cat([x, x_adv]), modules, compare, at=at)
    if len(weakness) != len(calls):
        raise InputError("The network ran other layers on the whole batch than on one image; it must not depend on it.")
    found = torch.stack([weakness[number] for number in range(len(calls))])
    return _scores(calls, (found if mean is None else mean(found, len(x))).tolist())


def _scores(calls: list[Call], weakness: list[float]) -> list[LayerScore]:
    for call, value in zip(calls, weakness, strict=True):
        if not math.isfinite(value):
            raise InputError(f"Layer {call.name} gave features that are not finite; check the weights and the images.")
    smallest = max(SMALLEST_RATIO * max(weakness), torch.finfo(torch.float32).tiny)
    scores, before = [], None
    for call, value in zip(calls, weakness, strict=True):
        ratio = value if before is None else value / max(before, smallest)
        scores.append(LayerScore(call.name, call.index, value, ratio, call.parameters))
        if call.index is not None:
            before = value
    return scores
