"""A batch attacked and trained on in parts gives the step of the whole batch, unless BatchNorm sees the parts."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from clat import Recipe, train
from clat.errors import InputError
from clat.network import tensors
from clat.objectives import Clat, FreeAt, Mart, PgdAt, Trades
from clat.threat import Threat
from clat.training.awp import Awp
from clat.tuners import Critical
from conftest import network

RECIPE = Recipe(
    threat=Threat(eps=0.1, step=0.05, steps=2), epochs=1, batch_size=48, holdout=48, images=96, validation_steps=1,
    health=False, lr=0.05, precision="fp32", layout="contiguous",
)  # fmt: skip


class Bare(nn.Module):
    """Two convolutions and a linear layer without BatchNorm; notes how many images it is given at once."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 3)
        self.given: list[int] = []

    def forward(self, x):
        self.given.append(len(x))
        return self.last(self.second(self.first(x).relu()).relu().mean((2, 3)))


def trained(recipe, model, blobs, out, console=None):
    torch.manual_seed(0)
    train(recipe, model, blobs, out=out, device="cpu", console=console)
    return tensors(model)


@pytest.mark.parametrize("parts", [4, 5])
@pytest.mark.parametrize(
    ("keys", "start"),
    [
        ({"objective": PgdAt()}, "uniform"),
        ({"objective": Trades()}, "gaussian"),
        ({"objective": Mart()}, "gaussian"),
        ({"objective": Clat(weight=0.1), "tuner": Critical(batch=8)}, "uniform"),
        ({"objective": PgdAt(), "awp": Awp(), "clip": 0.5}, "uniform"),
        ({"objective": PgdAt(), "warm_start": True, "epochs": 2}, "uniform"),
    ],
    ids=["pgd-at", "trades", "mart", "clat", "awp", "warm start"],
)
def test_parts_make_the_step_of_the_whole_batch(keys, start, parts, blobs, tmp_path):
    recipe = replace(RECIPE, threat=replace(RECIPE.threat, start=start), **keys)
    whole = trained(recipe, Bare(), blobs, tmp_path / "whole")
    divided = trained(replace(recipe, accumulate=parts), Bare(), blobs, tmp_path / "divided")
    before = tensors(Bare())
    for name, tensor in whole.items():
        torch.testing.assert_close(divided[name], tensor, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(before[name], tensor) for name, tensor in whole.items())


def test_no_more_images_than_a_part_run_at_once(blobs, tmp_path):
    model = Bare()
    trained(replace(RECIPE, accumulate=4), model, blobs, tmp_path / "run")
    assert max(model.given) == 12


def test_batch_norm_sees_the_parts_and_this_is_said(blobs, tmp_path):
    said = io.StringIO()
    console = Console(file=said, width=200)
    whole = trained(RECIPE, network(), blobs, tmp_path / "whole", console)
    assert "parts" not in said.getvalue()
    divided = trained(replace(RECIPE, accumulate=4), network(), blobs, tmp_path / "divided", console)
    assert "gradients are made in parts of 12 images" in said.getvalue()
    assert "BatchNorm in training mode has the statistics of these parts" in said.getvalue()
    name = next(name for name in whole if name.endswith("running_mean"))
    assert not torch.allclose(whole[name], divided[name])


@pytest.mark.parametrize("objective", [FreeAt(), Clat(attack="latent")])
def test_what_carries_a_perturbation_to_its_loss_is_not_divided(objective):
    with pytest.raises(InputError, match="accumulate works without"):
        Recipe(objective=objective, accumulate=2)


@pytest.mark.parametrize(("parts", "says"), [(0, "must be 1 or more"), (49, "more than the 48 images of a batch")])
def test_more_parts_than_images_or_none_are_refused(parts, says, blobs, tmp_path):
    with pytest.raises(InputError, match=says):
        train(replace(RECIPE, accumulate=parts), Bare(), blobs, out=tmp_path / "run")
