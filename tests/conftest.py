"""Small networks and data that every test file shares."""

import pytest
import torch
from torch import Tensor, nn

from clat.data import Dataset
from clat.models import Normalized, build_model

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


@pytest.fixture(autouse=True)
def _seeded() -> None:
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
