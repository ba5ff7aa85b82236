"""Images by name: the embedded set, any Hugging Face data set, image folder, parquet or CSV file."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor

from clat.data.dataset import Dataset
from clat.data.decoding import (
    RESIDENT_BYTES,
    SAMPLE,
    DecodedLater,
    UnreadableError,
    decoded,
    fitted,
    is_grey,
    opened,
    remark,
)
from clat.data.labels import Classes, numbered, shortened, uneven
from clat.data.sources import EMBEDDED, Holds, find_columns, read_splits, set_aside
from clat.errors import InputError
from clat.text import plain

LARGEST_EDGE = 4096  # pixels that images may be resized to

# The options of data named on the command line, after commas.
OPTIONS = (
    "size",
    "resize",
    "image",
    "label",
    "holds",
    "classes",
    "channels",
    "unreadable",
    "config",
    "stream",
    "workers",
)


def load_data(
    source: str = EMBEDDED,
    split: str = "train",
    *,
    size: int | None = None,
    resize: int | None = None,
    image: str | None = None,
    label: str | None = None,
    labelled: bool = True,
    holds: Holds | None = None,
    classes: Classes = None,
    channels: int | None = None,
    unreadable: Literal["refuse", "skip"] = "refuse",
    config: str | None = None,
    stream: bool = False,
    workers: int = 2,
) -> Dataset:
    """Labelled images from anywhere. What was assumed about them is in the ``notes`` of the result.

    Args:
        source: ``fashion-mnist-mini`` (in the package), a folder of images with one subfolder a class, a folder with
            parquet files or a saved data set, a parquet file, a CSV file with the paths of images, or the name of a
            data set on the Hugging Face hub
        split: ``train`` or ``test``; where there is no ``test``, ``validation`` is read for it
        size: edge in pixels that every image is resized and centre-cropped to; needed if the sizes differ
        resize: edge that an image's shorter one is resized to before it is cropped to ``size``, e.g. 256 for 224;
            default ``size``. Random crops of training images are made of the image as it is decoded
        image, label: names of the columns; default the image column and the label column found by type and name
        labelled: if not, labels are not looked for, and all images are of class 0
        holds: what a source with one table holds: ``train`` images, ``test`` images or ``both``, of which a fifth,
            drawn by a fixed seed, is set aside for testing. Default ``both`` for class folders, for a CSV file and
            for a hub set with one split; a parquet file or saved set that does not say is read as ``train`` only
        classes: for labels without names, how they are numbered: see ``clat.data.labels.numbered``
        channels: 1 for grey or 3 for colour; default 3 if any image is in colour
        unreadable: what happens at an image that cannot be decoded: ``refuse`` names it, ``skip`` leaves it out
        config: the configuration of a data set on the hub that has several
        stream: decode images each time they are read, even if they would fit into memory
        workers: processes that decode a set which is not kept in memory
    Raises:
        InputError: nothing at the source, no such split or column, images of several sizes, labels out of range, an
            image that cannot be decoded
    """
    _check_options(size, resize, channels, workers, holds, unreadable, stream, image=image, label=label, config=config)
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
    table = table.select_columns([image])
    read = _Reading(source, table, image, rows, size, resize or size, channels, unreadable == "skip", stream)
    pixels, kept = read.pixels(workers)
    labels = labels if len(kept) == len(labels) else labels[kept]
    notes += [*read.notes, *(uneven(labels, names, source) if label else ())]
    return Dataset(pixels, labels, names, source, split, tuple(notes))


def _check_options(
    size: Any, resize: Any, channels: Any, workers: Any, holds: Any, unreadable: Any, stream: Any, **texts: Any
) -> None:
    """Raises InputError for the first option that is out of range, another word than the known ones, or no text."""
    for key, value, least, most in (
        ("size", size, 1, LARGEST_EDGE),
        ("resize", resize, 1, LARGEST_EDGE),
        ("channels", channels, 1, 3),
        ("workers", workers, 0, 256),
    ):
        if value is None and key != "workers":
            continue
        if type(value) is not int or not least <= value <= most or (key == "channels" and value == 2):
            wanted = "1 or 3" if key == "channels" else f"a whole number from {least} to {most}"
            raise InputError(f"{key} is {value!r}; it must be {wanted}.")
    if resize is not None and (size is None or resize < size):
        raise InputError(
            f"resize is {resize}, and size {size}; give a size, the edge that is then cropped, of at most resize."
        )
    if type(stream) is not bool:
        raise InputError(f"stream is {stream!r}; it must be true or false.")
    for key, value, known in (
        ("holds", holds, (None, "train", "test", "both")),
        ("unreadable", unreadable, ("refuse", "skip")),
    ):
        if value not in known:
            raise InputError(f"{key} is {value!r}; it can be {', '.join(filter(None, known))}.")
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
    """Reads one table of images into a Dataset."""

    def __init__(
        self,
        source: str,
        table: Any,
        column: str,
        rows: Tensor,
        size: int | None,
        resize: int | None,
        channels: int | None,
        skip: bool,
        stream: bool,
    ):
        import datasets

        self.source, self.column, self.rows = plain(source), column, rows.tolist()
        self.size, self.resize, self.channels, self.skip, self.stream = size, resize, channels, skip, stream
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
        if self.stream or len(self.table) * 3 * height * width > RESIDENT_BYTES:
            channels = self.channels or (3 if self._some_in_colour() else 1)
            if self.stream or len(self.table) * channels * height * width > RESIDENT_BYTES:
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
            pixels[len(kept)] = fitted(found, (height, width), self.resize)
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
            resize=self.resize,
            recolour=self.channels is not None,
            workers=workers,
        )
        return (later if len(kept) == len(self.table) else later.subset(kept)), kept

    def _some_in_colour(self) -> bool:
        """Whether any of a sample of images is in colour: the first ones, and the same number at random."""
        order = torch.randperm(len(self.table), generator=torch.Generator().manual_seed(0))
        places = {*range(min(SAMPLE, len(self.table))), *order[:SAMPLE].tolist()}
        for place in sorted(places):
            with suppress(UnreadableError):
                if not is_grey(opened(self._entry(place))):
                    return True
        return False

    def _entries(self) -> Iterator[Any]:
        """The table's entries in order, read many at once; None in a block with damage."""
        for start in range(0, len(self.table), 1000):
            stop = min(start + 1000, len(self.table))
            try:
                yield from self.table[start:stop][self.column]
            except Exception:  # pyarrow's own, of a damaged file; the rows of the block are then read one by one
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
