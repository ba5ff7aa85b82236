"""Random crops and flips of a batch, and the way back from what they show to the image."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = 4  # pixels around an image before it is cropped at random, the field's usual for 32x32


@dataclass(frozen=True)
class Crops:
    """Where each image of a batch is cropped, after padding, and whether it is flipped; each of shape (batch, 1)."""

    top: Tensor
    left: Tensor
    flipped: Tensor

    @classmethod
    def draw(cls, count: int, generator: torch.Generator | None = None) -> "Crops":
        """At random; half of the images flipped. ``generator`` is on the CPU, by default the global one."""
        top, left = torch.randint(0, 2 * PADDING + 1, (2, count, 1), generator=generator)
        return cls(top, left, torch.rand(count, 1, generator=generator) < 0.5)

    def of(self, images: Tensor) -> "Crops":
        """Those of some of the batch's images."""
        return Crops(self.top[images], self.left[images], self.flipped[images])

    def apply(self, images: Tensor) -> Tensor:
        """Pads each image with zeros, crops and flips it, the whole batch in one gather; any type, on any device."""
        height, width = images.shape[2:]
        rows = self.top + torch.arange(height)
        columns = self.left + torch.where(self.flipped, torch.arange(width).flip(0), torch.arange(width))
        return _gathered(F.pad(images, (PADDING,) * 4), rows, columns)

    def undo(self, shown: Tensor, before: Tensor) -> Tensor:
        """What ``apply`` shows, moved back to where it lies in the images; ``before`` where the crop did not reach."""
        count, _, height, width = shown.shape
        rows, columns = (PADDING - self.top + torch.arange(height)), (PADDING - self.left + torch.arange(width))
        columns = torch.where(self.flipped, width - 1 - columns, columns)
        inside = _inside(rows, height).view(count, 1, height, 1) & _inside(columns, width).view(count, 1, 1, width)
        back = _gathered(shown, rows.clamp(0, height - 1), columns.clamp(0, width - 1))
        return torch.where(inside.to(shown.device), back, before)


def _gathered(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The pixels in these rows (batch, height) and columns (batch, width) of each image."""
    count, channels, device = len(images), images.shape[1], images.device
    return images[
        torch.arange(count, device=device).view(-1, 1, 1, 1),
        torch.arange(channels, device=device).view(1, -1, 1, 1),
        rows.to(device).view(count, 1, -1, 1),
        columns.to(device).view(count, 1, 1, -1),
    ]


def _inside(places: Tensor, size: int) -> Tensor:
    return (places >= 0) & (places < size)
