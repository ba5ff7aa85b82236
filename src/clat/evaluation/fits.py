"""Whether a network and a data set fit each other."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from clat.data.dataset import Dataset, to_unit
from clat.errors import InputError
from clat.network import check_images, class_scores
from clat.text import plain


def check_all_fit(models: Mapping[str, nn.Module], data: Dataset, device: torch.device | str) -> None:
    """Raises InputError, with a network's name, unless each takes these images and has one output for each class."""
    for name, model in models.items():
        try:
            check_fits(model, data, device)
        except InputError as error:
            raise InputError(f"{plain(name)}: {error}") from error


def check_fits(model: nn.Module, data: Dataset, device: torch.device | str, *, warn: bool = True) -> None:
    """Raises InputError unless the network takes these images and has one output for each class.

    Args:
        warn: of probabilities in place of logits
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


def are_probabilities(scores: Tensor, within: float = 1e-5) -> bool:
    """Whether all scores (batch, classes) lie in [0, 1] and those of each image sum to 1."""
    off = (scores.sum(1) - 1).abs().max()
    return bool(scores.max() < 1 + within and scores.min() > -within and off < within)
