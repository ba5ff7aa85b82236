"""Small networks and data that every test file shares."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clat.checkpoint import load_tensors
from clat.data.dataset import Dataset
from clat.models import Normalized, build_model
from clat.network import same_bits

torch.set_num_threads(1)


class Plain(nn.Module):
    """Two convolutions with BatchNorm, functional activations, one linear layer: a network as users write them."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.first_norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.second_norm = nn.BatchNorm2d(6)
        self.last = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first_norm(self.first(x)))
        x = nn.functional.relu(self.second_norm(self.second(x)))
        return self.last(x.mean((2, 3)))


def network(classes: int = 3) -> Normalized:
    """A ResNet-18 of width 8 for grey images, the same weights at every call."""
    torch.manual_seed(0)
    return build_model("rn18", classes, channels=1, width=8, mean=[0.3], std=[0.2])


@contextmanager
def dies_before(name: str, time: int = 1) -> Iterator[None]:
    """What runs inside dies just before a file whose name starts so is renamed into place for that time."""
    real, seen = os.replace, []

    def dying(source, target):
        if os.path.basename(target).startswith(name):
            seen.append(target)
            if len(seen) == time:
                raise KeyboardInterrupt
        real(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            yield


def same_tensors(first: Path, second: Path) -> bool:
    """Two checkpoints hold the same names and bits."""
    a, b = load_tensors(first)[0], load_tensors(second)[0]
    return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


@pytest.fixture
def plain() -> Plain:
    """A Plain network whose BatchNorm buffers are not the initial ones."""
    model = Plain()
    model(torch.rand(16, 1, 8, 8))
    return model


@pytest.fixture
def tiny() -> Normalized:
    return build_model("rn18", 3, channels=1, width=8, mean=[0.3], std=[0.2])


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    return torch.rand(6, 1, 8, 8), torch.arange(6) % 3


@pytest.fixture
def blobs() -> Dataset:
    """240 images of three classes that a small network learns in an epoch: a bright bar in one of three places."""
    labels = torch.arange(240) % 3
    pixels = torch.randint(0, 60, (240, 1, 12, 12), dtype=torch.uint8)
    for i, label in enumerate(labels):
        pixels[i, :, 4 * label : 4 * label + 3] += 150
    return Dataset(pixels, labels, ("top", "middle", "bottom"), "blobs", "train")
