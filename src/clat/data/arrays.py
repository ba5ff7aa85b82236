"""Images that are in memory already, or in a torch data set or loader, as a Dataset."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from clat.data.dataset import Dataset
from clat.data.decoding import RESIDENT_BYTES, DecodedLater, UnreadableError, decoded
from clat.data.labels import Classes, numbered, uneven
from clat.errors import InputError
from clat.text import plain

EXACT = 1e-3  # floats that times 255 are this close to whole numbers came from 8-bit images


def as_dataset(source: Any, classes: Classes = None) -> Dataset:
    """Images and labels in the forms that other code uses, as a ``Dataset``.

    They are read once, into memory. A torch data set of more than 2 GiB is read item by item whenever images are
    needed, by worker processes; its labels are its ``targets``, or come from one reading of all items.

    Args:
        source: a ``Dataset``, returned as it is; a pair (images, labels) of tensors or arrays; a torch data set of
            (image, label); or a ``DataLoader``, of which the chosen images are read in the order of its data set.
            Images are Pillow's, or uint8, or floats in [0, 1], (n, channel, height, width) with 1 or 3 channels;
            channels last and grey images without a channel are recognised. Transforms must neither normalise nor
            augment: networks take pixels in [0, 1], and ``augment`` is a recipe's key
        classes: their names, their number, or ``auto``; default the data set's own names, else 0, 1, 2 ...
    Returns:
        the images as uint8. Floats that are not multiples of 1/255 are rounded to these, and ``notes`` says so
    Raises:
        InputError: anything else, with what to do
    """
    if isinstance(source, Dataset):
        return source
    if isinstance(source, (tuple, list)) and len(source) == 2:
        (images, labels), name = source, "the arrays"
    elif isinstance(source, DataLoader):
        images, labels, name = _from_loader(source)
        source = source.dataset
    elif isinstance(source, torch.utils.data.Dataset):
        images, labels = _read(source, None, name := _name(source))
    else:
        raise InputError(
            f"A {type(source).__name__} is no data; give a clat.Dataset, (images, labels), a torch data set or a "
            "DataLoader, or load a file, folder or hub name with clat.load_data."
        )
    names = classes if classes is not None else _class_names(source)
    pixels, said = _pixels(images, name)
    values = _values(labels, len(pixels), name)
    numbers, named, numbering = numbered(values, names, source=name)
    return Dataset(pixels, numbers, named, name, "given", (*said, *numbering, *uneven(numbers, named, name)))


def _from_loader(loader: DataLoader[Any]) -> tuple[Any, Any, str]:
    data, name = loader.dataset, _name(loader.dataset)
    if isinstance(data, torch.utils.data.IterableDataset):
        batches = list(iter(loader))
        if not all(isinstance(batch, (tuple, list)) and len(batch) >= 2 for batch in batches) or not batches:
            raise InputError(f"The loader of {name} gives no batches of (images, labels).")
        return torch.cat([batch[0] for batch in batches]), torch.cat([torch.as_tensor(b[1]) for b in batches]), name
    batched = loader.batch_sampler if loader.batch_size is None and loader.batch_sampler is not None else None
    with torch.random.fork_rng(devices=[]):  # a sampler that shuffles draws a seed
        places = sorted(chain.from_iterable(batched) if batched is not None else map(int, loader.sampler))
    return *_read(data, places, name), name


class ReadLater(DecodedLater):
    """Images of a torch data set too large for memory, read item by item as they are needed."""

    def __init__(self, data: Any, name: str, size: tuple[int, ...]):
        super().__init__(data, name, size, resize=None)

    def decoded(self, index: int) -> Tensor:
        try:
            item = self.table[index]
        except Exception as error:  # the data set may raise anything
            raise UnreadableError(plain(f"{type(error).__name__}: {error}")) from error
        x, _ = _channels_first(_unzipped([item], self.column)[0], self.column)
        pixels = x if x.dtype == torch.uint8 else _pixels(x, self.column)[0]
        if pixels.shape[2:] != self.size[1:] or (pixels.shape[1], self.size[0]) == (3, 1):
            first, other = ("x".join(map(str, shape)) for shape in (self.size, pixels.shape[1:]))
            raise InputError(f"The images of {self.column} have several sizes ({first} and {other}, for example).")
        return pixels[0].expand(self.size[0], -1, -1)

    def where(self, index: int) -> str:
        return ""

    @property
    def fingerprint(self) -> str:
        """Of the number of images and some of them: reading all takes too long."""
        content = hashlib.sha256(f"{self.column} {len(self)}".encode())
        for place in range(0, len(self), max(1, len(self) // 32)):
            content.update(self.decoded(place).numpy().tobytes())
        return content.hexdigest()

    def subset(self, indices: Tensor) -> "ReadLater":
        return ReadLater(torch.utils.data.Subset(self.table, indices.tolist()), self.column, self.size)


def _read(data: Any, places: Sequence[int] | None, name: str) -> tuple[Any, Any]:
    """The images, in memory or read as they are needed, and the labels of a torch data set at these places."""
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or not len(data):
        return _unzipped(_items(data, places), name)
    chosen = range(len(data)) if places is None else places
    first, _ = _unzipped(_items(data, chosen[:32]), name)
    shape = tuple(_pixels(first, name)[0].shape[1:])
    if len(chosen) * math.prod(shape) <= RESIDENT_BYTES:
        return _unzipped(_items(data, places), name)
    labels = _targets(data)
    labels = [data[place][1] for place in chosen] if labels is None else [labels[place] for place in chosen]
    return ReadLater(torch.utils.data.Subset(data, list(chosen)), name, shape), labels


def _targets(data: Any) -> Sequence[Any] | None:
    """The labels that torchvision's data sets hold beside their images."""
    if isinstance(data, torch.utils.data.Subset):
        labels = _targets(data.dataset)
        return None if labels is None else [labels[place] for place in data.indices]
    labels = getattr(data, "targets", None)
    changed = getattr(data, "target_transform", None) is not None
    fits = isinstance(labels, (list, Tensor, np.ndarray)) and len(labels) == len(data)
    return labels if fits and not changed else None


def _items(data: Any, places: Sequence[int] | None = None) -> list[Any]:
    """The items of a data set, each the same every time."""
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return list(data)
    places = range(len(data)) if places is None else places
    for place in places[:32]:
        if not _same(data[place], data[place]):
            raise InputError(
                f"{_name(data)} gives another image each time it is read; leave random transforms out, a recipe's "
                "augment: true crops and flips the training images."
            )
    return [data[place] for place in places]


def _same(first: Any, second: Any) -> bool:
    if not (isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)) and first and second):
        return True
    return np.array_equal(np.asarray(first[0]), np.asarray(second[0]))


def _unzipped(items: list[Any], name: str) -> tuple[Any, list[Any]]:
    if not items:
        raise InputError(f"{name} is empty; give at least one image.")
    if not all(isinstance(item, (tuple, list)) and len(item) >= 2 for item in items):
        raise InputError(f"{name} gives {type(items[0]).__name__}, and not pairs of an image and a label.")
    images = [item[0] for item in items]
    if all(isinstance(image, PIL.Image.Image) for image in images):
        images = _of_pictures(images, name)
    if not all(isinstance(image, (Tensor, np.ndarray)) for image in images):
        raise InputError(
            f"{name} gives images of type {type(images[0]).__name__}, and not tensors, arrays or pictures."
        )
    tensors = [torch.as_tensor(image) for image in images]
    if len(shapes := {tuple(tensor.shape) for tensor in tensors}) > 1:
        shown = " and ".join("x".join(map(str, shape)) for shape in sorted(shapes)[:2])
        raise InputError(f"The images of {name} have several sizes ({shown}, for example); resize them to one.")
    return torch.stack(tensors), [item[1] for item in items]


def _of_pictures(pictures: Sequence[PIL.Image.Image], name: str) -> list[Tensor]:
    try:
        found = [decoded(picture) for picture in pictures]
    except UnreadableError as error:
        raise InputError(f"An image of {name} cannot be read ({error}).") from error
    channels = max(len(pixels) for pixels in found)
    return [pixels.expand(channels, -1, -1) for pixels in found]


def _pixels(images: Any, name: str) -> tuple[Any, tuple[str, ...]]:
    """uint8 (n, channel, height, width), and what was assumed."""
    if isinstance(images, ReadLater):
        return images, ()
    x, said = _channels_first(images, name)
    if x.dtype == torch.uint8:
        if x.max() == 1:
            raise InputError(
                f"The uint8 pixels of {name} are all 0 or 1; give floats in [0, 1], or multiply by 255 if these are "
                "black and white."
            )
        return x.contiguous(), tuple(said)
    if x.is_floating_point():
        pixels, most = _rounded(x, name)
        if most > EXACT:
            said.append(f"The floats of {name} are rounded to multiples of 1/255, by {most / 255:.1g} at most.")
        return pixels.contiguous(), tuple(said)
    if x.dtype == torch.bool or x.is_complex() or x.min() < 0 or x.max() > 255:
        kind = str(x.dtype).removeprefix("torch.")
        span = "" if x.dtype == torch.bool or x.is_complex() else f" from {int(x.min())} to {int(x.max())}"
        raise InputError(
            f"The pixels of {name} are {kind}{span}; scale them to uint8 in 0...255 or to floats in [0, 1]."
        )
    return x.to(torch.uint8).contiguous(), tuple(said)


def _channels_first(images: Any, name: str) -> tuple[Tensor, list[str]]:
    """(n, channel, height, width) of any type, and what was assumed."""
    if not isinstance(images, (Tensor, np.ndarray)):
        raise InputError(f"The images of {name} are of type {type(images).__name__}; give a tensor or an array.")
    try:
        x = torch.as_tensor(images).detach()
    except TypeError as error:
        raise InputError(f"The images of {name} are no numbers ({plain(error)}).") from error
    said = []
    if x.ndim == 3:
        x = x.unsqueeze(1)
    if x.ndim != 4 or not x.numel():
        raise InputError(
            f"The images of {name} have the shape {tuple(x.shape)}, but must be (n, channel, height, width)."
        )
    if x.shape[1] not in (1, 3):
        if x.shape[3] not in (1, 3):
            raise InputError(
                f"The images of {name} have the shape {tuple(x.shape)}, but must be (n, channel, height, width) with "
                "1 or 3 channels; for others build a clat.Dataset."
            )
        x = x.permute(0, 3, 1, 2)
        said.append(f"The images of {name} have their channels last; they are put first.")
    return x, said


def _rounded(x: Tensor, name: str) -> tuple[Tensor, float]:
    """Floats in [0, 1] as uint8, and the largest difference in units of 1/255."""
    least, most = float(x.min()), float(x.max())
    if not (torch.isfinite(x).all() and least >= 0 and most <= 1):
        span = f"The pixels of {name} run from {least:.3g} to {most:.3g}, but must lie in [0, 1]"
        if least >= 0 and 1 < most <= 255:
            raise InputError(f"{span}; divide them by 255.")
        raise InputError(
            f"{span}; leave normalising transforms out, networks take pixels in [0, 1] and normalise them themselves."
        )
    levels = x.double() * 255
    pixels = levels.round()
    return pixels.to(torch.uint8), float((levels - pixels).abs().max())


def _values(labels: Any, count: int, name: str) -> list[Any]:
    shape = np.shape(labels) if isinstance(labels, np.ndarray) else tuple(getattr(labels, "shape", ()) or ())
    if len(shape) > 1 and shape[-1] > 1:
        raise InputError(f"The labels of {name} have the shape {shape}; give one number an image, e.g. argmax(1).")
    if isinstance(labels, (Tensor, np.ndarray)):
        labels = labels.reshape(-1).tolist()
    if isinstance(labels, (str, bytes)) or not isinstance(labels, Iterable):
        raise InputError(f"The labels of {name} are of type {type(labels).__name__}; give one for each image.")
    values = list(labels)
    if len(values) != count:
        raise InputError(f"There are {count} images and {len(values)} labels in {name}; give one label for each image.")
    return values


def _name(data: Any) -> str:
    while isinstance(data, torch.utils.data.Subset):
        data = data.dataset
    return plain(type(data).__name__)


def _class_names(data: Any) -> tuple[str, ...] | None:
    """The class names that torchvision's data sets have."""
    while isinstance(data, torch.utils.data.Subset):
        data = data.dataset
    names = getattr(data, "classes", None)
    if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None
