"""Whether a network and a data set fit each other."""

from collections.abc import Mapping

import torch
from torch import nn

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


def check_fits(model: nn.Module, data: Dataset, device: torch.device | str) -> None:
    """Raises InputError unless the network takes these images and has one output for each class."""
    pixels, _ = next(data.first(2).batches(2, workers=0))
    x = to_unit(pixels).to(device)
    check_images(x)
    outputs = class_scores(model, x).shape[1]
    if outputs != len(data.classes):
        raise InputError(
            f"The network has {outputs} outputs, but {plain(data.source)} has {len(data.classes)} classes; build it "
            "for as many."
        )
