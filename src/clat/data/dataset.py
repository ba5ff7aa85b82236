"""Images by name: the embedded set, any Hugging Face data set, image folder or parquet file."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clat.data.crops import Crops
from clat.data.decoding import SAMPLE, DecodedLater, UnreadableError, decoded, fitted, is_grey, opened, remark
from clat.data.labels import Classes, default, numbered, shortened
from clat.data.sources import EMBEDDED, Holds, find_columns, read_splits, set_aside
from clat.errors import InputError
from clat.network import Images, Labels
from clat.text import plain

RESIDENT_BYTES = 2 * 2**30  # sets up to this size are kept as uint8 tensors on the device
LARGEST_EDGE = 4096  # pixels that images may be resized to
SKETCH = 256  # hashes that stand for the images a network was trained on

# The options of data named on the command line, after commas.
OPTIONS = ("size", "image", "label", "holds", "classes", "channels", "unreadable", "config", "workers")


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
        """The same with parts of it, which need no check again."""
        new = copy(self)
        for name, value in changes.items():
            object.__setattr__(new, name, value)
        return new

    def hold_out(self, count: int, seed: int = 0) -> tuple["Dataset", "Dataset"]:
        """The set without ``count`` images drawn at random, and these images."""
        if not 0 < count <= len(self) // 2:
            raise InputError(
                f"{count} images cannot be held out of {len(self)} for validation; set holdout between 1 and "
                f"{len(self) // 2}."
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.subset(order[count:].sort().values), self.subset(order[:count].sort().values)

    def batches(
        self, size: int, *, order: Tensor | None = None, workers: int | None = None
    ) -> Iterator[tuple[Tensor, Labels]]:
        """uint8 images (batch, channel, height, width) and labels (batch,), in the given order, all of it.

        Args:
            workers: processes that decode images which are not in memory; default as many as ``load_data`` was told
        """
        order = torch.arange(len(self)) if order is None else order
        chunks = list(order.split(size))
        if isinstance(self.pixels, Tensor):
            for chunk in chunks:
                at = chunk.to(self.pixels.device)
                yield self.pixels[at], self.labels[at]
        else:
            for chunk, pixels in zip(chunks, self.pixels.read(chunks, workers), strict=True):
                at = chunk.to(self.labels.device)
                yield pixels.to(self.labels.device, non_blocking=True), self.labels[at]

    def statistics(self, most: int = 10_000) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over the first ``most`` images, pixels in [0, 1]."""
        pixels = torch.cat([to_unit(x).cpu() for x, _ in self.subset(torch.arange(min(most, len(self)))).batches(1000)])
        std, mean = torch.std_mean(pixels.double(), dim=(0, 2, 3))
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
        """What a checkpoint keeps of its training images, so that they are known again: a digest and a sketch.

        The sketch is the smallest 256 of the images' hashes, which for any other set gives an estimate of how many
        images are in both. It is empty for images that are decoded later.
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

        Classes without names (0, 1, 2 ... as text) fit any names, if they are as many. What was done is in ``notes``.

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
    """What a checkpoint's facts say of its training images, ``identity`` and ``classes``, as far as it makes sense."""
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
    """Some of the names, first those that the others lack."""
    lacking = [name for name in names if name not in others]
    return shortened([*lacking, *(name for name in names if name in others)])


def to_unit(pixels: Tensor) -> Images:
    """uint8 pixels as float32 in [0, 1]."""
    return pixels.float() / 255


def augment(pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pads by 4 pixels, crops at random and flips half of the images, each by itself, the whole batch in one gather.

    Args:
        pixels: (batch, channel, height, width), any type, on any device
        generator: source of the random numbers, on the CPU; default the global one
    """
    return Crops.draw(len(pixels), generator).apply(pixels)


def load_data(
    source: str = EMBEDDED,
    split: str = "train",
    *,
    size: int | None = None,
    image: str | None = None,
    label: str | None = None,
    labelled: bool = True,
    holds: Holds | None = None,
    classes: Classes = None,
    channels: int | None = None,
    unreadable: Literal["refuse", "skip"] = "refuse",
    config: str | None = None,
    workers: int = 2,
) -> Dataset:
    """Labelled images from anywhere. What was assumed about them is in the ``notes`` of the result.

    Args:
        source: ``fashion-mnist-mini`` (in the package), a folder of images with one subfolder a class, a folder with
            parquet files or a saved data set, a parquet file, or the name of a data set on the Hugging Face hub
        split: ``train`` or ``test``; where there is no ``test``, ``validation`` is read for it
        size: edge in pixels that every image is resized and centre-cropped to; needed if the sizes differ
        image, label: names of the columns; default the image column and the label column found by type and name
        labelled: if not, labels are not looked for, and all images are of class 0
        holds: what a source with one table holds: ``train`` images, ``test`` images or ``both``, of which a fifth,
            drawn by a fixed seed, is set aside for testing. Default ``both`` for class folders and for a hub set with
            one split; a parquet file or saved set that does not say is read as ``train`` only
        classes: for labels without names, how they are numbered: see ``clat.data.labels.numbered``
        channels: 1 for grey or 3 for colour; default 3 if any image is in colour
        unreadable: what happens at an image that cannot be decoded: ``refuse`` names it, ``skip`` leaves it out
        config: the configuration of a data set on the hub that has several
        workers: processes that decode a set larger than memory
    Raises:
        InputError: nothing at the source, no such split or column, images of several sizes, labels out of range, an
            image that cannot be decoded
    """
    _check_options(size=size, channels=channels, workers=workers, image=image, label=label, config=config)
    for key, value, known in (
        ("holds", holds, (None, "train", "test", "both")),
        ("unreadable", unreadable, ("refuse", "skip")),
    ):
        if value not in known:
            raise InputError(f"{key} is {value!r}; it can be {', '.join(filter(None, known))}.")
    source = str(source)
    splits = read_splits(source, config)
    table, divide, said = splits.choose(split, holds)
    notes = [said] if said else []
    if not len(table):
        raise InputError(f"The split {split} of {source} has no images.")
    image, label = find_columns(table, source, image, label, labelled)
    labels = torch.zeros(len(table), dtype=torch.int64)
    names: tuple[str, ...] = ("unlabelled",)
    if label:
        others = [other for other in splits.tables.values() if other is not table and label in other.column_names]
        labels, names, numbering = _labels(table, label, source, classes, others)
        notes += numbering
    rows = torch.arange(len(table))
    if divide:
        rows, said = set_aside(labels, split, source)
        notes.append(said)
        table, labels = table.select(rows.tolist()), labels[rows]
    read = _Reading(source, table.select_columns([image]), image, rows, size, channels, unreadable == "skip")
    pixels, kept = read.pixels(workers)
    labels = labels if len(kept) == len(labels) else labels[kept]
    return Dataset(pixels, labels, names, source, split, (*notes, *read.notes))


def _check_options(size: Any, channels: Any, workers: Any, **texts: Any) -> None:
    for key, value, least, most in (
        ("size", size, 1, LARGEST_EDGE),
        ("channels", channels, 1, 3),
        ("workers", workers, 0, 256),
    ):
        if value is None and key != "workers":
            continue
        if type(value) is not int or not least <= value <= most or (key == "channels" and value == 2):
            wanted = "1 or 3" if key == "channels" else f"a whole number from {least} to {most}"
            raise InputError(f"{key} is {value!r}; it must be {wanted}.")
    for key, value in texts.items():
        if value is not None and not (isinstance(value, str) and value):
            raise InputError(f"{key} is {value!r}; it must be a name.")


def _labels(
    table: Any, column: str, source: str, classes: Classes, others: Sequence[Any]
) -> tuple[Tensor, tuple[str, ...], tuple[str, ...]]:
    import datasets

    feature = table.features[column]
    values = table[column][:]
    if not isinstance(feature, datasets.ClassLabel):
        more = {value for other in others for value in other[column][:] if isinstance(value, (str, int, float))}
        return numbered(values, classes, source=source, others=more)
    if classes is not None:
        raise InputError(f"{source} names its {feature.num_classes} classes; leave classes= out.")
    return numbered(values, tuple(feature.names), source=source)


class _Reading:
    """The images of one table on their way to a Dataset."""

    def __init__(
        self,
        source: str,
        table: Any,
        column: str,
        rows: Tensor,
        size: int | None,
        channels: int | None,
        skip: bool,
    ):
        import datasets

        self.source, self.column, self.rows = plain(source), column, rows.tolist()
        self.size, self.channels, self.skip = size, channels, skip
        self.table = table.cast_column(column, datasets.Image(decode=False))
        self.skipped: list[str] = []
        self.remarks: Counter[str] = Counter()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out of the images and of their pixels."""
        said = [f"Images of {self.source} {what}: {count:,}." for what, count in self.remarks.items()]
        if self.skipped:
            count, names = len(self.skipped), shortened(self.skipped)
            said.insert(0, f"Images of {self.source} that cannot be read and are left out: {count:,} ({names}).")
        return tuple(said)

    def pixels(self, workers: int) -> "tuple[Tensor | DecodedLater, Tensor]":
        """The images, in memory or decoded as they are read, and their places in the table."""
        first = next((found for place in range(len(self.table)) if (found := self._decoded(place)) is not None), None)
        if first is None:
            raise InputError(f"No image of {self.source} can be read.")
        height, width = (self.size or first.shape[1], self.size or first.shape[2])
        self.skipped, self.remarks = [], Counter()
        if len(self.table) * 3 * height * width > RESIDENT_BYTES:
            channels = self.channels or (3 if self._some_in_colour() else 1)
            if len(self.table) * channels * height * width > RESIDENT_BYTES:
                return self._later((channels, height, width), workers)
        return self._resident(height, width, self.channels or first.shape[0])

    def _resident(self, height: int, width: int, channels: int) -> tuple[Tensor, Tensor]:
        pixels = torch.empty(len(self.table), channels, height, width, dtype=torch.uint8)
        kept: list[int] = []
        for place, entry in enumerate(self._entries()):
            found = self._decoded(place, entry)
            if found is None:
                continue
            if len(found) > pixels.shape[1]:  # the first one in colour
                pixels = pixels.expand(-1, 3, -1, -1).clone()
            pixels[len(kept)] = fitted(found, (height, width), self.size is not None)
            kept.append(place)
        return pixels[: len(kept)], torch.tensor(kept)

    def _later(self, shape: tuple[int, ...], workers: int) -> tuple[DecodedLater, Tensor]:
        kept = torch.arange(len(self.table))
        if self.skip:
            readable = [self._decoded(place) is not None for place in range(len(self.table))]
            kept = torch.tensor(readable).nonzero().flatten()
            self.remarks.clear()
        later = DecodedLater(
            self.table,
            self.column,
            shape,
            resize=self.size is not None,
            recolour=self.channels is not None,
            workers=workers,
        )
        return (later if len(kept) == len(self.table) else later.subset(kept)), kept

    def _some_in_colour(self) -> bool:
        """Whether one of the first images, or of as many at random, is in colour."""
        order = torch.randperm(len(self.table), generator=torch.Generator().manual_seed(0))
        places = {*range(min(SAMPLE, len(self.table))), *order[:SAMPLE].tolist()}
        for place in sorted(places):
            with suppress(UnreadableError):
                if not is_grey(opened(self._entry(place))):
                    return True
        return False

    def _entries(self) -> Iterator[Any]:
        """What the table holds at each place, read many at once; None where it is damaged."""
        for start in range(0, len(self.table), 1000):
            stop = min(start + 1000, len(self.table))
            try:
                yield from self.table[start:stop][self.column]
            except Exception:  # pyarrow's own, of a damaged file; each row is then read by itself
                yield from [None] * (stop - start)

    def _entry(self, place: int) -> Any:
        try:
            return self.table[place][self.column]
        except Exception as error:  # pyarrow's own, of a damaged file
            raise UnreadableError("its row is damaged") from error

    def _decoded(self, place: int, entry: Any = None) -> Tensor | None:
        """The image at a place of the table, or None if it cannot be read and is to be skipped."""
        name = f"row {self.rows[place]}"
        try:
            entry = self._entry(place) if entry is None else entry
            if isinstance(entry, dict) and entry.get("path"):
                name = plain(entry["path"]) if entry.get("bytes") is None else f"{name} ({plain(entry['path'])})"
            image = opened(entry)
            what = remark(image)
            pixels = decoded(image, self.channels)
        except UnreadableError as error:
            if not self.skip:
                raise InputError(
                    f"An image of {self.source} cannot be read, {name} ({error}); remove it, or leave such images out "
                    "with unreadable=skip."
                ) from error
            self.skipped.append(name)
            return None
        if what:
            self.remarks[what] += 1
        return pixels
