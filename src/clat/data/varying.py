"""Random transforms of single training images: the policies that a recipe names, and a user's own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import v2

from clat.errors import InputError

Policy = Callable[[Tensor], Tensor]  # of a uint8 image (channel, height, width)
PolicyName = Literal["padded-crop", "resized-crop"]  # the padded crop is one of whole batches: see crops.py

SMALL = 64  # pixels; larger images are by default cropped and resized instead of padded and cropped


def resized_crop(shape: tuple[int, ...]) -> Policy:
    """ImageNet's: 8 to 100 % of the area, resized to the shape's height and width; half of the images flipped."""
    return v2.Compose([v2.RandomResizedCrop(list(shape[1:]), antialias=True), v2.RandomHorizontalFlip()])


@dataclass(frozen=True)
class Varied:
    """A policy, and the seed of each image that it is applied to.

    So neither the number of worker processes nor that of training processes decides what is drawn.

    Args:
        seeds: int64 (n,), in the order in which the images are read
    """

    policy: Policy
    seeds: Tensor


def varied(policy: Policy, image: Tensor, seed: int) -> Tensor:
    """The image as a policy shows it. The global random numbers continue afterwards from where they were.

    Raises:
        InputError: the policy returns something else than a uint8 image with as many channels
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not that of a GPU, which attacks draw from
        found = policy(image)
    if not isinstance(found, Tensor) or found.dtype != torch.uint8 or found.shape[:-2] != image.shape[:1]:
        what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise InputError(
            f"augment must return a uint8 image ({image.shape[0]}, height, width), as it is given one; it returned "
            f"{what.removeprefix('torch.')}."
        )
    return found


def all_varied(images: Tensor, policy: Policy, seeds: Tensor) -> Tensor:
    """The same for images in memory, (batch, channel, height, width). They keep their size, or InputError is raised."""
    found = [varied(policy, image, seed) for image, seed in zip(images, seeds.tolist(), strict=True)]
    for image in found:
        check_size(image, images.shape[2:])
    return torch.stack(found)


def check_size(image: Tensor, size: Sequence[int]) -> None:
    """Raises InputError if a policy changed an image's height or width."""
    if tuple(image.shape[1:]) != tuple(size):
        raise InputError(
            f"augment must return images of {size[0]}x{size[1]}; it returned one of {image.shape[1]}x{image.shape[2]}."
        )
