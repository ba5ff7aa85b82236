"""Labelled images of one size: what training, evaluation and the checks work on."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clat.data.crops import Crops
from clat.data.decoding import DecodedLater
from clat.data.labels import default, shortened
from clat.data.varying import Varied, all_varied
from clat.errors import InputError
from clat.inputs import shown
from clat.network import Images, Labels
from clat.text import plain

SKETCH = 256  # hashes that represent the images a network was trained on


@dataclass(frozen=True)
class Dataset:
    """Labelled images of one size.

    pixels: uint8 (n, channel, height, width), or a sequence of images that is decoded as it is read; labels: int64 (n,)
    in 0 ... classes - 1; classes: their names; source, split: where they come from; notes: sentences about what was
    assumed when they were read.

    Raises:
        InputError: pixels or labels of another type, shape or range; ``as_dataset`` takes what is used elsewhere
    """

    pixels: "Tensor | DecodedLater"
    labels: Tensor
    classes: tuple[str, ...]
    source: str
    split: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(map(str, self.classes)))
        _check(self.pixels, self.labels, self.classes)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """(channel, height, width) of an image."""
        return tuple(self.pixels.shape[1:]) if isinstance(self.pixels, Tensor) else self.pixels.size

    @property
    def resident(self) -> bool:
        return isinstance(self.pixels, Tensor)

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data on a device; images that are decoded later stay where they are."""
        pixels = self.pixels.to(device) if isinstance(self.pixels, Tensor) else self.pixels
        return self._with(pixels=pixels, labels=self.labels.to(device))

    def subset(self, indices: Tensor) -> "Dataset":
        """The images at these positions, in this order."""
        pixels = self.pixels
        chosen = pixels[indices.to(pixels.device)] if isinstance(pixels, Tensor) else pixels.subset(indices)
        return self._with(pixels=chosen, labels=self.labels[indices.to(self.labels.device)])

    def _with(self, **changes: Any) -> "Dataset":
        """The same data with some fields replaced; they are not checked again."""
        new = copy(self)
        for name, value in changes.items():
            object.__setattr__(new, name, value)
        return new

    def first(self, count: int) -> "Dataset":
        """The first ``count`` images, or all if there are no more."""
        return self.subset(torch.arange(min(count, len(self))))

    def sample(self, limit: int | None, seed: int = 0) -> "Dataset":
        """``limit`` images drawn at random by ``seed``, in their order; all if that is None or there are no more.

        Raises:
            InputError: limit is not a whole number of 1 or more
        """
        if limit is None:
            return self
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise InputError(f"limit is {shown(limit)}; give a whole number of images, 1 or more.")
        if limit >= len(self):
            return self
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.subset(order[:limit].sort().values)

    def hold_out(self, count: int, seed: int = 0) -> tuple["Dataset", "Dataset"]:
        """The set without ``count`` images drawn at random, and these images."""
        rest, held = held_out(len(self), count, seed)
        return self.subset(rest), self.subset(held)

    def batches(
        self, size: int, *, order: Tensor | None = None, workers: int | None = None, vary: Varied | None = None
    ) -> Iterator[tuple[Tensor, Labels]]:
        """uint8 images (batch, channel, height, width) and labels (batch,), in the given order, all of it.

        Args:
            workers: processes that decode images which are not in memory; default the number given to ``load_data``
            vary: a random transform of each image
        """
        order = torch.arange(len(self)) if order is None else order
        if isinstance(self.pixels, Tensor):
            for number, chunk in enumerate(order.split(size)):
                at = chunk.to(self.pixels.device)
                pixels = self.pixels[at]
                if vary is not None:
                    pixels = all_varied(pixels, vary.policy, vary.seeds[number * size : number * size + len(chunk)])
                yield pixels, self.labels[at]
        else:
            for chunk, pixels in zip(order.split(size), self.pixels.read(order, size, workers, vary), strict=True):
                at = chunk.to(self.labels.device)
                yield pixels.to(self.labels.device, non_blocking=True), self.labels[at]

    def statistics(self, most: int = 10_000) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over the first ``most`` images, pixels in [0, 1]."""
        counts = torch.zeros(self.shape[0], 256, dtype=torch.int64)  # of each of the 256 values, channel by channel
        for x, _ in self.first(most).batches(100):
            counts += torch.stack([channel.flatten().bincount(minlength=256) for channel in x.unbind(1)]).cpu()
        values, n = to_unit(torch.arange(256)).double(), counts[0].sum()
        mean = counts.double() @ values / n
        std = ((counts * (values - mean[:, None]) ** 2).sum(1) / (n - 1)).sqrt()
        return [round(v, 4) for v in mean.tolist()], [max(round(v, 4), 1e-4) for v in std.tolist()]

    def digest(self) -> str:
        """SHA-256 over labels and pixels, if the pixels are in memory, else over the labels and the image files."""
        content = hashlib.sha256(self.labels.cpu().numpy().tobytes())
        if isinstance(self.pixels, Tensor):
            content.update(self.pixels.cpu().contiguous().numpy().tobytes())
        else:
            content.update(self.pixels.fingerprint.encode())
        return content.hexdigest()

    def identity(self) -> dict[str, Any]:
        """What a checkpoint keeps of its training images, so that they can be recognised: a digest and a sketch.

        The sketch is the smallest 256 of the images' hashes. From it ``share_seen`` estimates how many images of
        another set are among them. It is empty for images that are decoded later.
        """
        return {
            "source": self.source,
            "split": self.split,
            "images": len(self),
            "sha256": self.digest(),
            "sketch": sorted(self._hashes())[:SKETCH],
        }

    def share_seen(self, identity: Mapping[str, Any]) -> float:
        """An estimate of the share of these images that are among those of an ``identity``, exact for small sets."""
        if identity.get("sha256") == self.digest():
            return 1.0
        sketch, images = identity.get("sketch"), identity.get("images")
        if not isinstance(sketch, list) or not isinstance(images, int) or not (own := self._hashes()):
            return 0.0
        known = {entry for entry in sketch if isinstance(entry, str)}
        whole = len(known) < SKETCH  # then it holds every image
        return min(1.0, len(known & own) / max(1, len(known)) * (len(known) if whole else images) / len(own))

    def _hashes(self) -> set[str]:
        if not isinstance(self.pixels, Tensor):
            return set()
        images = self.pixels.cpu().numpy()
        return {hashlib.blake2b(image.tobytes(), digest_size=8).hexdigest() for image in images}

    def with_classes(self, names: Sequence[str], where: str) -> "Dataset":
        """The same images with classes numbered as in ``names``, matched by name.

        Classes without names (0, 1, 2 ... as text) match any names of the same number; ``notes`` says what was done.

        Args:
            names: the classes of ``where``, a network for example, in its order
        Raises:
            InputError: other classes
        """
        names = tuple(names)
        if names == self.classes:
            return self
        ours, theirs = plain(self.source), plain(where)
        nameless = default(len(names))
        if len(names) == len(self.classes) == len(set(names)) and set(names) == set(self.classes):
            number = torch.tensor([names.index(name) for name in self.classes], device=self.labels.device)
            said = f"The classes of {ours} stand in another order than those of {theirs} and are matched by name."
            return self._with(labels=number[self.labels], classes=names, notes=(*self.notes, said))
        if len(names) == len(self.classes) and nameless in (names, self.classes):
            without, other = (theirs, ours) if names == nameless else (ours, theirs)
            said = f"The classes of {without} have no names; they are taken to be numbered as those of {other}."
            return self._with(classes=names, notes=(*self.notes, said))
        raise InputError(
            f"The classes of {ours} are {_listed(self.classes, names)}, those of {theirs} "
            f"{_listed(names, self.classes)}; rename the classes, or choose data with the same ones."
        )


def _check(pixels: Any, labels: Any, classes: Sequence[str]) -> None:
    """Raises InputError unless pixels and labels are what a Dataset holds."""
    as_dataset = "clat.as_dataset((pixels, labels)) takes floats in [0, 1], channels last and other types of labels"
    if isinstance(pixels, Tensor):
        if pixels.dtype != torch.uint8:
            raise InputError(f"pixels are {_dtype(pixels)}, but must be uint8 from 0 to 255; {as_dataset}.")
        if pixels.ndim != 4 or 0 in pixels.shape[1:]:
            raise InputError(
                f"pixels have the shape {tuple(pixels.shape)}, but must be (n, channel, height, width); {as_dataset}."
            )
    elif not isinstance(pixels, DecodedLater):
        raise InputError(f"pixels are of type {type(pixels).__name__}, but must be a uint8 tensor; {as_dataset}.")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
        kind = f"{_dtype(labels)} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise InputError(f"labels are {kind}, but must be an int64 tensor (n,); {as_dataset}.")
    if len(pixels) != len(labels):
        raise InputError(f"There are {len(pixels)} images and {len(labels)} labels; give one label for each image.")
    if not len(labels):
        raise InputError("There are no images; give at least one.")
    if labels.device.type != "meta" and not (labels.min() >= 0 and labels.max() < len(classes)):
        found = sorted(set(labels.tolist()))
        raise InputError(
            f"Labels are {shortened(found)}, but must lie in 0...{len(classes) - 1}, with {len(classes)} classes; "
            f"number them {shortened(f'{value} -> {place}' for place, value in enumerate(found))}, or name every class."
        )


def trained_on(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's facts on its training images (``identity`` and ``classes``), if of the right types."""
    stored = facts.get("data")
    kinds = {"source": str, "split": str, "images": int, "sha256": str, "sketch": list, "classes": list}
    found: dict[str, Any] = {}
    for key, kind in kinds.items():
        if isinstance(stored, dict) and isinstance(stored.get(key), kind):
            found[key] = stored[key]
    if "classes" in found:
        found["classes"] = tuple(map(str, found["classes"]))
    return found


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _listed(names: Sequence[str], others: Sequence[str]) -> str:
    """Some of the names, the ones missing from the other list first."""
    lacking = [name for name in names if name not in others]
    return shortened([*lacking, *(name for name in names if name in others)])


def to_unit(pixels: Tensor) -> Images:
    """uint8 pixels as float32 in [0, 1]."""
    return pixels.float() / 255


def held_out(total: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The places of the images that stay and of the ``count`` that are held out, each in order.

    Raises:
        InputError: none, or more than half of them, are to be held out
    """
    if not 0 < count <= total // 2:
        raise InputError(
            f"{count} images cannot be held out of {total} for validation; set holdout between 1 and {total // 2}."
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return order[count:].sort().values, order[:count].sort().values


def augment(pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pads by 4 pixels, crops at random and flips half of the images, each on its own, the whole batch in one gather.

    Args:
        pixels: (batch, channel, height, width), any type, on any device
        generator: source of the random numbers, on the CPU; default the global one
    """
    return Crops.draw(len(pixels), generator).apply(pixels)
