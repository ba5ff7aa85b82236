"""Which images a comparison measures its arms on: the same for all of them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from clat.compare.plan import Comparison, Evaluation
from clat.compare.recipes import resolved
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.training.batches import split

Load = Callable[[str], Dataset]  # a split of the data by its name

DRAWN_BY = 0  # the seed that draws the images, and the one of every attack's start


def measured_on(comparison: Comparison, evaluation: Evaluation, load: Load) -> Dataset:
    """The images of an evaluation.

    Unused are the training images that no arm of the comparison trains on or holds out, so that they are the same for
    all arms.

    Raises:
        InputError: there are too few, or the arms hold out different ones
    """
    if evaluation.of == "test":
        found = load("test")
    else:
        training = load("train")
        arms = [resolved(arm.keys) for arm in comparison.arms]
        found = training.subset(_places(evaluation.of, arms, len(training)))
    if evaluation.images is not None and len(found) < evaluation.images:
        few = f"there are {len(found):,} {evaluation.of} images"
        remedy = "lower images there" if evaluation.of != "unused" else "lower it, or the images that the arms train on"
        raise InputError(f"The evaluation asks for {evaluation.images:,} images, but {few}; {remedy}.")
    return found.sample(evaluation.images, DRAWN_BY)


def _places(of: str, arms: Iterable[Mapping[str, Any]], total: int) -> Tensor:
    """The places of held-out or unused images among all training images."""
    splits = {(keys["holdout"], keys["holdout_seed"], keys["images"]) for keys in arms}
    if of == "held-out":
        if len({split[:2] for split in splits}) > 1:
            raise InputError(
                "The arms hold out different images for validation; give all the same holdout and holdout_seed, or "
                "evaluate on unused images."
            )
        return split(total, *splits.pop())[1]
    unused = torch.ones(total, dtype=torch.bool)
    for each in splits:
        for places in split(total, *each):
            unused[places] = False
    return unused.nonzero().squeeze(1)
