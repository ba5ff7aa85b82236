"""Image files as uint8 tensors: grey or colour, 16 bits scaled to 8, resized and cropped where a size is given."""

from collections.abc import Iterator, Sequence
from copy import copy
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from clat.data.varying import Policy, Varied, check_size, varied
from clat.errors import InputError
from clat.text import plain

GREY = ("1", "L", "LA", "La", "I", "F")  # and I;16 in either byte order
RESIDENT_BYTES = 2 * 2**30  # sets up to this size are kept as uint8 tensors on the device
SAMPLE = 1000  # images looked at before a set that is decoded later is read: the first ones, and this many at random


class UnreadableError(ValueError):
    """Why an image could not be decoded."""


def opened(entry: Any) -> PIL.Image.Image:
    """The image of a table's entry, its header read; {bytes, path} or bytes. Only files on this machine are opened."""
    entry = {"bytes": entry, "path": None} if isinstance(entry, bytes) else entry
    if not isinstance(entry, dict) or (entry.get("bytes") is None and not entry.get("path")):
        raise UnreadableError("there is no image")
    try:
        content = entry.get("bytes")
        if content is None and "://" in entry["path"]:
            raise UnreadableError("it is an address, not an image")
        return PIL.Image.open(BytesIO(Path(entry["path"]).read_bytes() if content is None else content))
    except UnreadableError:
        raise
    except Exception as error:  # the decoders raise anything
        raise UnreadableError(_reason(error)) from error


def is_grey(image: PIL.Image.Image) -> bool:
    return image.mode in GREY or image.mode.startswith("I;16")


def remark(image: PIL.Image.Image) -> str | None:
    """What is lost when the image becomes 8 bits in grey or RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return "of more than 8 bits, scaled to 8"
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        return "with transparency, which is dropped"
    return None if image.mode in ("1", "L", "P", "RGB") else f"in {plain(image.mode)}, converted to RGB"


def decoded(image: PIL.Image.Image, channels: int | None = None) -> Tensor:
    """An image as uint8 (channel, height, width): one channel if grey, else three, unless ``channels`` is given."""
    try:
        image.load()
        if image.getexif().get(PIL.ExifTags.Base.Orientation) is not None:
            image = PIL.ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            pixels = _scaled(np.asarray(image))
        else:
            mode = "L" if channels == 1 or (channels is None and is_grey(image)) else "RGB"
            pixels = np.array(image.convert(mode))
    except UnreadableError:
        raise
    except Exception as error:
        raise UnreadableError(_reason(error)) from error
    tensor = torch.from_numpy(pixels).view(image.height, image.width, -1).permute(2, 0, 1)
    return tensor.expand(channels or tensor.shape[0], -1, -1)


def fitted(pixels: Tensor, size: Sequence[int], resize: int | None) -> Tensor:
    """(channel, height, width) with height and width as in ``size``, by resizing the shorter edge and cropping.

    Args:
        resize: what the shorter edge is resized to; None if images of another size are refused
    """
    if tuple(pixels.shape[1:]) == tuple(size) and (resize is None or resize == min(size)):
        return pixels
    if resize is None:
        raise InputError(
            f"The images have several sizes ({size[0]}x{size[1]} and {pixels.shape[1]}x{pixels.shape[2]}, for "
            "example); give one, e.g. size=64."
        )
    return TF.center_crop(TF.resize(pixels, [resize], antialias=True), list(size))


def _scaled(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Numbers of 16 bits, or floats in [0, 1], as 8 bits."""
    least, most = pixels.min(), pixels.max()
    if pixels.dtype.kind == "f":
        if not (least >= 0 and most <= 1):
            raise UnreadableError(f"its floats run from {least:g} to {most:g}, but must lie in [0, 1]")
        return (pixels * 255).round().astype(np.uint8)
    if least < 0 or most > 65535:
        raise UnreadableError(f"its numbers run from {least} to {most}, which is more than 16 bits")
    return ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _reason(error: BaseException) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return "it is no image of a known kind"
    return plain(" ".join(str(error).split()))[:150] or type(error).__name__


class DecodedLater(torch.utils.data.Dataset[Any]):
    """Images of a set too large for memory, decoded and resized by worker processes as they are needed.

    size: (channel, height, width); resize: edge that images are resized to before they are cropped, or None to refuse
    those of another size; recolour: whether images in colour are made grey where that is wanted; workers: how many
    processes decode, unless ``read`` is given a number; policy: a random transform that is applied to the image as it
    is decoded, before it is made to fit
    """

    def __init__(
        self,
        table: Any,
        column: str,
        size: tuple[int, ...],
        *,
        resize: int | None,
        recolour: bool = True,
        workers: int = 2,
    ):
        self.table, self.column, self.size, self.workers = table, column, size, workers
        self.resize, self.recolour = resize, recolour
        self.policy: Policy | None = None

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: tuple[int, int]) -> "Tensor | InputError":
        """The image at a position, its policy's random numbers drawn from a seed.

        Returns:
            the image, or the error as a value: raised in a worker, it would reach the user as a long traceback
        """
        index, seed = key
        try:
            pixels = self.decoded(index)
            if self.policy is None:
                return fitted(pixels, self.size[1:], self.resize)
            pixels = varied(self.policy, pixels, seed)
            if self.resize is None:
                check_size(pixels, self.size[1:])
            return fitted(pixels, self.size[1:], min(self.size[1:]))
        except UnreadableError as error:
            return InputError(f"An image, at place {index}, cannot be read: {error}{self.where(index)}.")
        except InputError as error:
            return error

    def decoded(self, index: int) -> Tensor:
        """The image at a position, uint8 (channel, height, width) of its own height and width."""
        image = opened(self.table[index][self.column])
        if self.size[0] == 1 and not (self.recolour or is_grey(image)):
            raise InputError(
                f"An image, at place {index}, cannot be read: it is in colour, and those looked at first were grey; "
                "give channels=1 or 3."
            )
        return decoded(image, self.size[0])

    def where(self, index: int) -> str:
        """The image's file, if it is known, and what to do about an image that cannot be read, for a message."""
        entry = self.table[index][self.column]
        path = entry.get("path") if isinstance(entry, dict) else None
        return f"{f' ({plain(path)})' if path else ''}; remove it, or leave such images out with unreadable=skip"

    @property
    def fingerprint(self) -> str:
        return str(self.table._fingerprint)

    def subset(self, indices: Tensor) -> "DecodedLater":
        chosen = copy(self)
        chosen.table = self.table.select(indices.tolist())
        return chosen

    def read(
        self, order: Tensor, size: int, workers: int | None = None, vary: Varied | None = None
    ) -> Iterator[Tensor]:
        """uint8 tensors of ``size`` images, in the order given. Raises InputError at an image that cannot be read."""
        shown = copy(self)
        shown.policy = None if vary is None else vary.policy
        seeds = torch.zeros_like(order) if vary is None else vary.seeds
        keys = list(zip(order.tolist(), seeds.tolist(), strict=True))
        loader: Any = torch.utils.data.DataLoader(
            shown,
            batch_sampler=[keys[start : start + size] for start in range(0, len(keys), size)],
            num_workers=self.workers if workers is None else workers,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_stacked,
            generator=torch.Generator(),  # its seed for the workers is not to be drawn from those of the training
        )
        for batch in loader:
            if isinstance(batch, InputError):
                raise batch
            yield batch


def _stacked(images: list[Any]) -> Any:
    return next((image for image in images if isinstance(image, InputError)), None) or torch.stack(images)
