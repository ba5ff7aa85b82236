"""Runs of a second on noise, for the tests of run folders."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.models import build_model
from clat.objectives import Clean
from clat.threat import Threat
from clat.training.recipe import Recipe
from clat.training.train import train
from clat.tuners import Critical

RECIPE = Recipe(
    objective=Clean(), epochs=3, batch_size=32, lr=0.02, holdout=20, validation_steps=1, health=False, precision="fp32",
    threat=Threat(eps=0.1, step=0.05, steps=1), layout="contiguous",
)  # fmt: skip
CRITICAL = replace(RECIPE, tuner=Critical(every=2))


def noise() -> Dataset:
    torch.manual_seed(0)
    pixels = torch.randint(0, 255, (84, 1, 8, 8), dtype=torch.uint8)
    return Dataset(pixels, torch.arange(84) % 3, ("a", "b", "c"), "noise", "train")


def small() -> nn.Module:
    """A network that build_model did not make."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


def known() -> nn.Module:
    torch.manual_seed(0)
    return build_model("rn18", 3, channels=1, width=2, mean=[0.3], std=[0.2])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(message: str, *arguments, **keys) -> str:
    """Trains, which must end in one sentence that holds the message and change nothing in the folder."""
    before = contents(keys["out"])
    with pytest.raises(InputError, match=message) as caught:
        train(*arguments, **keys)
    assert contents(keys["out"]) == before
    said = str(caught.value)
    assert "\n" not in said
    assert said.endswith(".")
    return said
