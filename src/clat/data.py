"""Images by name: the embedded set, any Hugging Face data set, image folder or parquet file."""

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from clat.errors import InputError
from clat.threat import Images, Labels

EMBEDDED = "fashion-mnist-mini"
RESIDENT_BYTES = 2 * 2**30  # sets up to this size are kept as uint8 tensors on the device
PADDING = 4  # pixels around an image before it is cropped at random, the field's usual for 32x32

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_IMAGE_COLUMNS = ("image", "img", "pixel_values", "jpg", "png")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "cls", "y")


@dataclass(frozen=True)
class Dataset:
    """Labelled images of one size.

    pixels: uint8 (n, channel, height, width), or a sequence of images that is decoded as it is read; labels: int64
    (n,); classes: their names; source, split: where they come from.
    """

    pixels: "Tensor | DecodedLater"
    labels: Tensor
    classes: tuple[str, ...]
    source: str
    split: str

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
        return replace(self, pixels=pixels, labels=self.labels.to(device))

    def subset(self, indices: Tensor) -> "Dataset":
        """The images at these positions, in this order."""
        pixels = self.pixels
        chosen = pixels[indices.to(pixels.device)] if isinstance(pixels, Tensor) else pixels.subset(indices)
        return replace(self, pixels=chosen, labels=self.labels[indices.to(self.labels.device)])

    def hold_out(self, count: int, seed: int = 0) -> tuple["Dataset", "Dataset"]:
        """The set without ``count`` images drawn at random, and these images."""
        if not 0 < count <= len(self) // 2:
            raise InputError(
                f"{count} images cannot be held out of {len(self)} for validation; set holdout between 1 and "
                f"{len(self) // 2}."
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.subset(order[count:].sort().values), self.subset(order[:count].sort().values)

    def batches(self, size: int, *, order: Tensor | None = None, workers: int = 2) -> Iterator[tuple[Tensor, Labels]]:
        """uint8 images (batch, channel, height, width) and labels (batch,), in the given order, all of it."""
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


class DecodedLater(torch.utils.data.Dataset[Tensor]):
    """Images of a set too large for memory, decoded and resized by worker processes as they are needed."""

    def __init__(self, table: Any, column: str, size: tuple[int, ...]):
        self.table, self.column, self.size = table, column, size

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Tensor:
        return _decode(self.table[int(index)][self.column], self.size)

    @property
    def fingerprint(self) -> str:
        return str(self.table._fingerprint)

    def subset(self, indices: Tensor) -> "DecodedLater":
        return DecodedLater(self.table.select(indices.tolist()), self.column, self.size)

    def read(self, chunks: Sequence[Tensor], workers: int) -> Iterator[Tensor]:
        """One uint8 tensor for each chunk of positions, in order."""
        return iter(
            torch.utils.data.DataLoader(
                self,
                batch_sampler=[chunk.tolist() for chunk in chunks],
                num_workers=workers,
                pin_memory=torch.cuda.is_available(),
            )
        )


def to_unit(pixels: Tensor) -> Images:
    """uint8 pixels as float32 in [0, 1]."""
    return pixels.float() / 255


def augment(pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pads by 4 pixels, crops at random and flips half of the images, each by itself, the whole batch in one gather.

    Args:
        pixels: (batch, channel, height, width), any type, on any device
        generator: source of the random numbers, on the CPU; default the global one
    """
    count, channels, height, width = pixels.shape
    top, left = torch.randint(0, 2 * PADDING + 1, (2, count, 1), generator=generator)
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    rows = top + torch.arange(height)
    columns = left + torch.where(flipped, torch.arange(width).flip(0), torch.arange(width))
    padded = F.pad(pixels, (PADDING,) * 4)
    device = pixels.device
    return padded[
        torch.arange(count, device=device).view(-1, 1, 1, 1),
        torch.arange(channels, device=device).view(1, -1, 1, 1),
        rows.to(device).view(count, 1, height, 1),
        columns.to(device).view(count, 1, 1, width),
    ]


def load_data(
    source: str = EMBEDDED,
    split: str = "train",
    *,
    size: int | None = None,
    image: str | None = None,
    label: str | None = None,
    labelled: bool = True,
) -> Dataset:
    """Labelled images from anywhere.

    Args:
        source: ``fashion-mnist-mini`` (in the package), a folder of images with one subfolder a class, a folder with
            parquet files or a saved data set, a parquet file, or the name of a data set on the Hugging Face hub
        split: ``train`` or ``test``; where there is no ``test``, ``validation`` is read for it
        size: edge in pixels that every image is resized and centre-cropped to; needed if the sizes differ
        image, label: names of the columns; default the image column and the label column found by type and name
        labelled: if not, labels are not looked for, and all images are of class 0
    Raises:
        InputError: nothing at the source, no such split or column, images of several sizes, labels out of range
    """
    table = _table(source, split)
    image = image or _find(table, _IMAGE_COLUMNS, "image", source)
    label = (label or _find(table, _LABEL_COLUMNS, "label", source)) if labelled else None
    for column in filter(None, (image, label)):
        if column not in table.column_names:
            raise InputError(f"{source} has no column {column!r}; its columns are {', '.join(table.column_names)}.")
    if not len(table):
        raise InputError(f"The split {split} of {source} has no images.")
    unlabelled = torch.zeros(len(table), dtype=torch.int64), ("unlabelled",)
    labels, classes = _labels(table, label, source) if label else unlabelled
    first = _open_image(table[0][image], source)
    shape = (3 if first.mode not in ("1", "L") else 1, size or first.height, size or first.width)
    table = table.select_columns([image])
    if len(table) * int(np.prod(shape)) > RESIDENT_BYTES:
        return Dataset(DecodedLater(table, image, shape), labels, classes, source, split)
    pixels = torch.empty(len(table), *shape, dtype=torch.uint8)
    for start in range(0, len(table), 1000):
        for offset, entry in enumerate(table[start : start + 1000][image]):
            pixels[start + offset] = _decode(entry, shape, resize=size is not None)
    return Dataset(pixels, labels, classes, source, split)


def _table(source: str, split: str) -> Any:
    """The split as a ``datasets.Dataset``."""
    import datasets

    datasets.disable_progress_bars()
    path = Path(__file__).parent / "embedded" if source == EMBEDDED else Path(source).expanduser()
    if not path.exists() and not _HUB_NAME.fullmatch(source):
        raise InputError(f"There is no file or folder {source!r}.")
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:  # what they would print is in the error below
        logger.setLevel(logging.CRITICAL)
    try:
        if path.is_file():
            splits: Any = datasets.load_dataset("parquet", data_files={split: str(path)})
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            splits = datasets.load_from_disk(str(path))
        elif path.is_dir() and not any(path.iterdir()):
            raise InputError(f"The folder {source} is empty.")
        else:
            splits = datasets.load_dataset(str(path) if path.is_dir() else source)
    except InputError:
        raise
    except Exception as error:  # the readers raise anything from OSError to pyarrow's own
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"No images could be read from {source!r}: give a folder of images, a parquet file or the name of a "
            f"Hugging Face data set ({reason})."
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    if isinstance(splits, datasets.Dataset):
        splits = {split: splits}
    if split == "test" and split not in splits:
        split = next((name for name in ("validation", "valid", "val") if name in splits), split)
    if split not in splits:
        raise InputError(f"{source} has no split {split!r}; it has {', '.join(splits)}.")
    return splits[split]


def _find(table: Any, usual: Sequence[str], kind: str, source: str) -> str:
    """The one column of the right type, by preference with a usual name."""
    import datasets

    def fits(feature: Any) -> bool:
        if kind == "image":
            return isinstance(feature, datasets.Image)
        return isinstance(feature, datasets.ClassLabel) or str(getattr(feature, "dtype", "")).startswith(
            ("int", "uint")
        )

    fitting = [name for name, feature in table.features.items() if fits(feature)]
    named = [name for name in usual if name in fitting]
    if named or len(fitting) == 1:
        return (named or fitting)[0]
    raise InputError(
        f"{source} has {len(fitting)} columns that could hold the {kind}; name one of {', '.join(table.column_names)} "
        f"as {kind}=COLUMN."
    )


def _labels(table: Any, column: str, source: str) -> tuple[Tensor, tuple[str, ...]]:
    import datasets

    values = table[column][:]
    if any(value is None for value in values):
        raise InputError(f"Some entries of column {column!r} of {source} have no label; remove them first.")
    labels = torch.tensor(values, dtype=torch.int64)
    feature = table.features[column]
    named = isinstance(feature, datasets.ClassLabel)
    classes = tuple(feature.names) if named else tuple(str(i) for i in range(int(labels.max()) + 1))
    if labels.min() < 0 or labels.max() >= len(classes):
        raise InputError(
            f"Labels in {source} run from {int(labels.min())} to {int(labels.max())}, but must lie in 0..."
            f"{len(classes) - 1}; remove unlabelled images or number the classes from 0."
        )
    return labels, classes


def _open_image(entry: Any, source: str) -> Any:
    if not hasattr(entry, "mode"):
        raise InputError(
            f"The image column of {source} holds {type(entry).__name__}, not images; name one as image=COLUMN."
        )
    return entry


def _decode(entry: Any, shape: tuple[int, ...], resize: bool = True) -> Tensor:
    """One image as uint8 (channel, height, width) = shape."""
    entry = entry.convert("L" if shape[0] == 1 else "RGB")
    pixels = torch.from_numpy(np.array(entry)).view(entry.height, entry.width, shape[0]).permute(2, 0, 1)
    if tuple(pixels.shape) == tuple(shape):
        return pixels
    if not resize:
        raise InputError(
            f"The images have several sizes ({shape[1]}x{shape[2]} and {entry.height}x{entry.width}, for example); "
            "give one, e.g. size=64."
        )
    edge = min(shape[1:])
    return TF.center_crop(TF.resize(pixels, [edge], antialias=True), list(shape[1:]))
