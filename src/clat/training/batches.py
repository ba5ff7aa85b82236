"""The images of a run: those held out for validation, and the training images of each epoch, batch by batch."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clat.data.crops import Crops
from clat.data.dataset import Dataset, held_out, to_unit
from clat.data.varying import Policy, PolicyName, Varied, resized_crop
from clat.errors import InputError
from clat.network import Images, Labels
from clat.threat import Threat
from clat.training.processes import Processes, seed_of
from clat.training.recipe import Recipe
from clat.training.warm import Perturbations
from clat.tuners.base import Batch


@dataclass(frozen=True)
class TrainingBatch:
    """This process's part of a batch.

    Args:
        y: labels; after ``mixed`` the share of each class, float (batch, classes)
        places: of the training images among all of them, (batch,)
        crops: how each image was cropped and flipped, if it was
    """

    x: Images
    y: Labels
    places: Tensor
    crops: Crops | None

    def parts(self, count: int) -> "list[TrainingBatch]":
        """The batch in so many parts of about the same size, in order; the batch itself if it is one."""
        if count == 1:
            return [self]
        found = zip(
            self.x.tensor_split(count),
            self.y.tensor_split(count),
            torch.arange(len(self.x)).tensor_split(count),
            strict=True,
        )
        return [TrainingBatch(x, y, self.places[at], self.crops and self.crops.of(at)) for x, y, at in found]

    def mixed(self, alpha: float, classes: int) -> "TrainingBatch":
        """Each image mixed with another one; y becomes the share of each class, float (batch, classes).

        Source: mixup, Zhang et al. 2018.
        """
        share = torch.distributions.Beta(alpha, alpha).sample().item()
        other = torch.randperm(len(self.x)).to(self.x.device)
        hot = F.one_hot(self.y, classes).to(self.x.dtype)
        return replace(self, x=self.x[other].lerp(self.x, share), y=hot[other].lerp(hot, share))


@dataclass(frozen=True)
class RunImages:
    """What a run trains and validates on, on the device of this process.

    Args:
        training: the images that are neither held out nor left out
        validation: this process's part of the held-out images
        fitted: its part of the training images that are measured as well, if any are
        held_out: all of the held-out images, on which a selection may be made as well
        extra: the second data set, if there is one
        warm: the last perturbation of every training image, if attacks start there
        steps: batches of an epoch
        size: images of a batch, over all processes
        extra_size: how many of them are extra ones
        identity: of the whole training split, for the checkpoints
        rank, ranks: this process and their number
        augment: what the recipe's ``augment`` means for these images
        workers: processes that decode images which are not in memory
    """

    training: Dataset
    validation: Dataset
    fitted: Dataset
    held_out: Dataset
    extra: Dataset | None
    warm: Perturbations | None
    steps: int
    size: int
    extra_size: int
    identity: dict[str, Any]
    recipe: Recipe
    augment: bool | PolicyName | Policy
    rank: int = 0
    ranks: int = 1
    workers: int = 0

    @property
    def part_size(self) -> int:
        """Images that this process attacks together."""
        return self.size // self.ranks // self.recipe.accumulate

    def for_selection(self, epoch: int, count: int, unseen: int = 0) -> tuple[Batch, Batch | None]:
        """Images that a selection before this epoch is made on, the same in every process.

        Returns:
            ``count`` training images, and ``unseen`` held-out ones (None if 0), each with labels
        """
        generator = self._generator(epoch)
        seen = self._drawn(self.training, count, generator)
        return seen, self._drawn(self.held_out, unseen, generator) if unseen else None

    def _drawn(self, data: Dataset, count: int, generator: torch.Generator) -> Batch:
        chosen = data.subset(torch.randperm(len(data), generator=generator)[:count])
        pixels, y = next(chosen.batches(count, workers=0))
        return to_unit(pixels), y

    def batches(self, epoch: int) -> Iterator[TrainingBatch]:
        """This process's part of each batch, augmented; images that do not fill a batch are left out of this epoch."""
        places = self._own(self._order(self._generator(epoch)))
        for own, (pixels, y) in zip(places, self.pixels(epoch), strict=True):
            crops = Crops.draw(len(pixels)) if self.augment == "padded-crop" else None
            yield TrainingBatch(to_unit(pixels if crops is None else crops.apply(pixels)), y, own, crops)

    def pixels(self, epoch: int) -> Iterator[tuple[Tensor, Labels]]:
        """The same as uint8 images before the padded crop."""
        generator = self._generator(epoch)
        order = self._order(generator)
        if self.extra is None:
            return self._in_batches(self.training, order, generator)
        picked = torch.randint(len(self.extra), (self.steps * self.extra_size,), generator=generator)
        own = self._in_batches(self.training, order, generator)
        both = zip(own, self._in_batches(self.extra, picked, generator), strict=True)
        return ((torch.cat([x, more_x]), torch.cat([y, more_y])) for (x, y), (more_x, more_y) in both)

    def threat(self, batch: TrainingBatch) -> Threat:
        """The recipe's threat model; with a warm start, its attacks on these images start where the last ones ended."""
        return self.warm.threat(self.recipe.threat, batch.places, batch.crops) if self.warm else self.recipe.threat

    def keep(self, batch: TrainingBatch, x_adv: Images) -> None:
        """Remembers where the attack on a batch ended, for a warm start."""
        if self.warm:
            self.warm.keep(x_adv - batch.x, batch.places, batch.crops)

    def _order(self, generator: torch.Generator) -> Tensor:
        """The places of an epoch's training images, batch after batch."""
        return torch.randperm(len(self.training), generator=generator)[: self.steps * (self.size - self.extra_size)]

    def _in_batches(self, data: Dataset, order: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Labels]]:
        """This process's part of the order, cut into the epoch's steps."""
        own, vary = self._own(order), None
        policy = resized_crop(data.shape) if self.augment == "resized-crop" else self.augment
        if callable(policy):
            seeds = torch.randint(2**63 - 1, order.shape, generator=generator)
            vary = Varied(policy, self._own(seeds).flatten())
        return data.batches(own.shape[1], order=own.flatten(), workers=self.workers, vary=vary)

    def _own(self, whole: Tensor) -> Tensor:
        """This process's part of each batch (steps, images) of what stands for the images of an epoch."""
        return whole.view(self.steps, -1)[:, self.rank :: self.ranks]

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.recipe.seed, epoch))


@dataclass(frozen=True, kw_only=True)
class PartThreat(Threat):
    """A threat model of one process's images of a batch: they start as they would in a process that has all of them.

    Args:
        images: of the whole batch
        rank, ranks: this process, which has every image of number rank, rank + ranks, ..., and the number of processes
    """

    images: int
    rank: int
    ranks: int

    @classmethod
    def of(cls, threat: Threat, images: int, processes: Processes) -> "PartThreat":
        usual = {field.name: getattr(threat, field.name) for field in fields(threat)}
        return cls(**usual, images=images, rank=processes.rank, ranks=processes.count)

    def own(self, of_all: Tensor) -> Tensor:
        """This process's rows."""
        return of_all[self.rank :: self.ranks]

    def first(self, x: Images) -> Images:
        every = x.new_zeros(self.images, *x.shape[1:])
        self.own(every).copy_(x)
        return self.own(super().first(every))


def run_images(recipe: Recipe, data: Dataset, processes: Processes, workers: int = 0) -> RunImages:
    """Holds images out of the training split, and loads the extra ones.

    Raises:
        InputError: a batch that cannot be shared out, too few images, or extra ones that do not fit
    """
    if recipe.batch_size % processes.count:
        raise InputError(f"batch_size {recipe.batch_size} is not a multiple of the {processes.count} processes.")
    places, held = split(len(data), recipe.holdout, recipe.holdout_seed, recipe.images)
    training, validation = data.subset(places), data.subset(held)
    if recipe.warm_start and processes.count > 1:
        raise InputError("warm_start works in one process, as images change processes from epoch to epoch.")
    device, rank, count = processes.device, processes.rank, processes.count
    size = min(recipe.batch_size, len(training))
    if recipe.accumulate > size // count:
        raise InputError(f"accumulate is {recipe.accumulate}, more than the {size // count} images of a batch.")
    few = min(recipe.train_sample, len(validation), len(training))
    few = few if few >= count else 0  # each process measures some
    fitted = torch.randperm(len(training), generator=torch.Generator().manual_seed(recipe.holdout_seed))[:few]
    return RunImages(
        training=training.to(device),
        validation=validation.subset(torch.arange(rank, len(validation), count)).to(device),
        fitted=training.subset(fitted[rank::count]).to(device),
        held_out=validation.to(device),
        extra=recipe.extra.load(training, device) if recipe.extra else None,
        warm=Perturbations(len(training), training.shape, device) if recipe.warm_start else None,
        steps=max(1, len(training) // recipe.batch_size),
        size=size,
        extra_size=recipe.extra.count(size, count) if recipe.extra else 0,
        identity=data.identity(),
        recipe=recipe,
        augment=recipe.augmentation(training.shape),
        rank=rank,
        ranks=count,
        workers=workers,
    )


def split(total: int, holdout: int, seed: int, images: int | None) -> tuple[Tensor, Tensor]:
    """The places of the images that a run trains on and of those that it holds out, among all training images.

    Args:
        holdout, seed, images: ``holdout``, ``holdout_seed`` and ``images`` of its recipe
    """
    rest, held = held_out(total, holdout, seed)
    if images is not None and images < len(rest):
        chosen = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:images]
        rest = rest[chosen.sort().values]
    return rest, held
