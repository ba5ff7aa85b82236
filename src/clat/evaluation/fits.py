"""Whether a network and a data set fit each other."""

import warnings
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn

from clat.compute import seeded
from clat.data.dataset import Dataset, to_unit
from clat.errors import InputError
from clat.network import Images, check_images, class_scores, held, logits
from clat.text import plain


def check_all_fit(
    models: Mapping[str, nn.Module], data: Dataset, device: torch.device | str, *, warn: bool = True
) -> None:
    """``check_fits`` of each, with a network's name in the message."""
    for name, model in models.items():
        try:
            check_fits(model, data, device, warn=warn)
        except InputError as error:
            raise InputError(f"{plain(name)}: {error}") from error


def check_fits(model: nn.Module, data: Dataset, device: torch.device | str, *, warn: bool = True) -> None:
    """Raises InputError unless the network takes these images and has one output for each class.

    Args:
        warn: of probabilities in place of logits, on which attacks are weak
    """
    pixels, _ = next(data.first(2).batches(2, workers=0))
    x = to_unit(pixels).to(device)
    check_images(x)
    scores = class_scores(model, x)
    outputs = scores.shape[1]
    if outputs != len(data.classes):
        raise InputError(
            f"The network has {outputs} outputs, but {plain(data.source)} has {len(data.classes)} classes; build it "
            "for as many."
        )
    if warn:
        warn_of_probabilities(scores)


def warn_of_probabilities(scores: Tensor) -> None:
    """Warns if class scores (batch, classes) are probabilities: attacks on such are weak, so they flatter."""
    one_hot = bool(((scores == 0) | (scores == 1)).all())  # no attack sees through that, and it is refused as such
    if are_probabilities(scores) and not one_hot:
        warnings.warn(
            "The network returns probabilities, not logits. Their cross-entropy has small gradients, so attacks are "
            "weak and robust accuracy can be overstated; return the scores before the softmax.",
            stacklevel=1,  # one place, so that it is said once
        )


def warn_of_zero_gradients(model: nn.Module, x: Images, most: int = 16) -> None:
    """Warns if the margin has no gradient to the pixels, as behind a rounding or a threshold.

    A network whose scores do not depend on the image has none either, and hides nothing.

    Args:
        x: images that are to be attacked, of which the first ``most`` are looked at
    """
    with held(model), seeded(0, x.device), torch.enable_grad(), suppress(RuntimeError):  # which the attacks report
        x = x[:most].detach().requires_grad_()
        scores = logits(model(x))
        if not scores.requires_grad or scores.shape[1] < 2 or torch.equal(scores, scores[:1].expand_as(scores)):
            return  # attacks refuse a network without a gradient
        first, second = scores.topk(2).values.unbind(1)
        (gradient,) = torch.autograd.grad((first - second).sum(), x, allow_unused=True)
        if gradient is None or not gradient.any():
            warnings.warn(
                f"The scores have a gradient of exactly zero to the pixels of the first {len(x)} attacked images, so "
                "gradient attacks find nothing there and robust accuracy can be overstated; see clat trust.",
                stacklevel=1,
            )


def are_probabilities(scores: Tensor, within: float = 1e-5) -> bool:
    """Whether all scores (batch, classes) lie in [0, 1] and those of each image sum to 1."""
    off = (scores.sum(1) - 1).abs().max()
    return bool(scores.max() < 1 + within and scores.min() > -within and off < within)
