"""The outputs of layers, observed, recorded and compared inside a forward pass."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clat.activations import Follow, Stop
from clat.network import Cost, Images, by_image, eager, first_tensor, held, hooked, logits

At = Literal["output", "activation"]
Between = Callable[[Tensor, Tensor], Tensor]  # two features (batch, ...) -> how far apart they are (batch,)


def lengths(feature: Tensor) -> Tensor:
    """The l2 norm of each row of a tensor (batch, ...), shape (batch,); its gradient at zero is zero."""
    return torch.linalg.vector_norm(feature, dim=tuple(range(1, feature.dim())))


def l2(first: Tensor, second: Tensor) -> Tensor:
    """The l2 distance of two features (batch, ...), image by image (batch,): Eq. 7."""
    return lengths(second - first)


def observe(
    model: nn.Module,
    x: Images,
    modules: Mapping[str, nn.Module],
    visit: Callable[[int, Tensor], None],
    *,
    at: At = "output",
    stop_after: int | None = None,
) -> Tensor | None:
    """Runs ``model(x)`` and calls ``visit(number, feature)`` with each output of ``modules`` as it is computed.

    Features come with the images along the first dimension. Calls are numbered from 0 in execution order, over all
    modules. With ``at="activation"`` a number may be visited up to three times, as the feature passes its
    normalisation and its activation: the last visit counts.

    Args:
        stop_after: leave the network once this many calls were observed
    Returns:
        the network's class scores (batch, classes), or None if it was left early
    """
    seen = 0
    follow = Follow(visit, stop_after) if at == "activation" else None

    def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal seen
        feature = first_tensor(output)
        rows = partial(by_image, images=len(x), module=module)
        visit(seen, rows(feature))
        if follow is not None:
            follow.add(seen, feature, rows)
        seen += 1
        if follow is None and seen == stop_after:
            raise Stop

    with hooked([module.register_forward_hook(hook) for module in modules.values()]), follow or nullcontext():
        try:
            return logits(eager(model, x))
        except Stop:
            return None


def record(
    model: nn.Module,
    x: Images,
    modules: Mapping[str, nn.Module],
    *,
    at: At = "output",
    stop_after: int | None = None,
) -> tuple[Tensor | None, dict[int, Tensor]]:
    """Class scores and the modules' features by call number; cloned, since a later module may change them in place.

    ``stop_after`` is the number of calls after which the pass ends; there are then no scores.
    """
    features: dict[int, Tensor] = {}

    def visit(number: int, feature: Tensor) -> None:
        features[number] = feature.clone()

    return observe(model, x, modules, visit, at=at, stop_after=stop_after), features


def compare(
    model: nn.Module,
    x: Images,
    modules: Mapping[str, nn.Module],
    recorded: Mapping[int, Tensor],
    between: Between = l2,
    *,
    at: At = "output",
    whole: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """Sum over the modules' calls of ``between(recorded feature, feature of x)``, image by image (batch,).

    The network is left after its last module, unless the ``whole`` of it is to run: then its class scores come too.
    """
    distances: dict[int, Tensor] = {}

    def visit(number: int, feature: Tensor) -> None:
        distances[number] = between(recorded[number].float(), feature.float())

    scores = observe(model, x, modules, visit, at=at, stop_after=None if whole else len(recorded))
    return scores if whole else None, torch.stack(list(distances.values())).sum(0)


def feature_distance(
    model: nn.Module,
    x: Images,
    modules: Mapping[str, nn.Module],
    between: Between = l2,
    *,
    at: At = "output",
    mode: Literal["eval", "batch", "train"] = "eval",
    calls: int | None = None,
) -> Cost:
    """What an attack on features ascends: images z -> how far the modules' features of z are from those of x (batch,).

    Args:
        x: images whose features are taken now, without gradients
        mode: how the network runs during the pass
        calls: how often the modules run in a forward pass, if that is known; else the network runs to its end once
    """
    with held(model, mode), torch.no_grad():
        _, recorded = record(model, x, modules, at=at, stop_after=calls)
    return lambda z: compare(model, z, modules, recorded, between, at=at)[1]
