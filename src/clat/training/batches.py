"""The images of a run: those held out for validation, and the training images of each epoch, batch by batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clat.data.dataset import Dataset, augment, to_unit
from clat.errors import InputError
from clat.network import Images, Labels
from clat.training.processes import Processes, seed_of
from clat.training.recipe import Recipe


@dataclass(frozen=True)
class RunImages:
    """What a run trains and validates on, on the device of this process.

    Args:
        training: the images that are neither held out nor left out
        validation: this process's part of the held-out images
        extra: the second data set, if there is one
        steps: batches of an epoch
        size: images of a batch, over all processes
        extra_size: how many of them are extra ones
        identity: of the whole training split, for the checkpoints
        rank, ranks: this process and their number
        workers: processes that decode images which are not in memory
    """

    training: Dataset
    validation: Dataset
    extra: Dataset | None
    steps: int
    size: int
    extra_size: int
    identity: dict[str, Any]
    recipe: Recipe
    rank: int = 0
    ranks: int = 1
    workers: int = 0

    def for_selection(self, epoch: int, count: int) -> tuple[Images, Labels]:
        """Training images that a selection before this epoch is made on, the same in every process."""
        order = torch.randperm(len(self.training), generator=self._generator(epoch))[:count]
        pixels, y = next(self.training.subset(order).batches(count, workers=0))
        return to_unit(pixels), y

    def batches(self, epoch: int) -> Iterator[tuple[Images, Labels]]:
        """This process's part of each batch, augmented; a rest smaller than a batch waits for another epoch's order."""
        for pixels, y in self.pixels(epoch):
            yield to_unit(augment(pixels) if self.recipe.augment else pixels), y

    def pixels(self, epoch: int) -> Iterator[tuple[Tensor, Labels]]:
        """The same as stored: uint8 images without augmentation."""
        generator = self._generator(epoch)
        order = torch.randperm(len(self.training), generator=generator)[: self.steps * (self.size - self.extra_size)]
        own = self._in_batches(self.training, order)
        if self.extra is None:
            return own
        picked = torch.randint(len(self.extra), (self.steps * self.extra_size,), generator=generator)
        both = zip(own, self._in_batches(self.extra, picked), strict=True)
        return ((torch.cat([x, more_x]), torch.cat([y, more_y])) for (x, y), (more_x, more_y) in both)

    def _in_batches(self, data: Dataset, order: Tensor) -> Iterator[tuple[Tensor, Labels]]:
        """This process's part of the order, cut into the epoch's steps."""
        part = order.view(self.steps, -1)[:, self.rank :: self.ranks]
        return data.batches(part.shape[1], order=part.reshape(-1), workers=self.workers)

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.recipe.seed, epoch))


def run_images(recipe: Recipe, data: Dataset, processes: Processes, workers: int = 0) -> RunImages:
    """Holds images out of the training split, and loads the extra ones.

    Raises:
        InputError: a batch that cannot be shared out, too few images, or extra ones that do not fit
    """
    if recipe.batch_size % processes.count:
        raise InputError(f"batch_size {recipe.batch_size} is not a multiple of the {processes.count} processes.")
    training, validation = data.hold_out(recipe.holdout, recipe.holdout_seed)
    if recipe.images is not None and recipe.images < len(training):
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(recipe.holdout_seed))
        training = training.subset(order[: recipe.images].sort().values)
    device, rank, count = processes.device, processes.rank, processes.count
    size = min(recipe.batch_size, len(training))
    return RunImages(
        training=training.to(device),
        validation=validation.subset(torch.arange(rank, len(validation), count)).to(device),
        extra=recipe.extra.load(training, device) if recipe.extra else None,
        steps=max(1, len(training) // recipe.batch_size),
        size=size,
        extra_size=recipe.extra.count(size, count) if recipe.extra else 0,
        identity=data.identity(),
        recipe=recipe,
        rank=rank,
        ranks=count,
        workers=workers,
    )
