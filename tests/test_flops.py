"""Floating-point operations of training: counted by hand on three layers, and over a run."""

from dataclasses import replace

import pytest
import torch

from clat.objectives import Clat, Clean, FreeAt, PgdAt
from clat.threat import Threat
from clat.training.awp import Awp
from clat.training.flops import batch_flops, training_flops
from clat.training.method import Method
from clat.training.train import train
from clat.tuners import Critical, Whole
from small_runs import RECIPE, noise, small

FIRST, SECOND, HEAD = 2 * 4 * 36 * 9, 2 * 4 * 16 * 36, 2 * 64 * 3  # of an image forward through each layer of small()
FORWARD = FIRST + SECOND + HEAD
CLEAN = 3 * FORWARD - FIRST  # nothing asks for the gradient of clean images


def counted(recipe, images: int = 8) -> float:
    """Operations of an image."""
    data, model = noise(), small()
    x, y = data.pixels[:images] / 255, data.labels[:images]
    chosen = Method(model, recipe.objective, recipe.tuner, recipe.threat).choose(x, y, 1)
    return batch_flops(recipe, model, chosen, x, y) / images


@pytest.mark.parametrize("steps", [0, 3])
def test_training_the_whole_network(steps):
    recipe = replace(RECIPE, objective=PgdAt(), threat=Threat(eps=0.1, step=0.05, steps=steps))
    assert counted(recipe) == CLEAN + steps * 2 * FORWARD
    assert counted(replace(recipe, awp=Awp())) == 2 * CLEAN + steps * 2 * FORWARD
    assert counted(replace(recipe, objective=Clean())) == CLEAN


def test_a_batch_that_is_trained_on_several_times():
    four, two = (counted(replace(RECIPE, objective=FreeAt(replays=replays))) for replays in (4, 2))
    assert four == 2 * two > 0


def test_what_is_frozen_costs_no_gradient():
    recipe = replace(RECIPE, objective=PgdAt(), tuner=Critical(layers=["3"]))
    assert counted(recipe) == 2 * FORWARD + FORWARD + SECOND + HEAD


@pytest.mark.parametrize(("attack", "layer"), [("feature", "0"), ("latent", "3")])
def test_attacks_that_run_a_part_of_the_network_cost_less(attack, layer):
    tuner, threat = Critical(layers=[layer]), Threat(eps=0.1, step=0.05, steps=5)
    label, other = (
        counted(replace(RECIPE, objective=Clat(attack=each), tuner=tuner, threat=threat)) for each in ("label", attack)
    )
    assert other < label


def test_attention_is_counted():
    model = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.rand(4, 5, 8)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = model, torch.nn.Linear(8, 3)

        def forward(self, images):
            tokens = images.flatten(2).transpose(1, 2)
            return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))

    images, y = x.transpose(1, 2).unflatten(2, (5, 1)), torch.tensor([0, 1, 2, 0])
    network = Net().eval()
    recipe = replace(RECIPE, objective=Clean(), tuner=Whole())
    chosen = Method(network, recipe.objective, recipe.tuner, recipe.threat).choose(images, y, 1)
    forward = 2 * 5 * 8 * 24 + 2 * (2 * 5 * 5 * 8) + 2 * 5 * 8 * 8 + 2 * 8 * 3  # in, scores and their sum, out, head
    assert batch_flops(recipe, network, chosen, images, y) / 4 == 3 * forward - 2 * 5 * 8 * 24


@pytest.mark.parametrize(("size", "batches"), [(32, 2), (6, 10)])  # of 64 images
def test_a_run_counts_each_epoch_as_it_trained(size, batches, tmp_path):
    data, awp = noise(), Awp(warmup=1)
    recipe = replace(RECIPE, objective=PgdAt(), awp=awp, tuner=Critical(every=2), batch_size=size)
    run = train(recipe, small(), data, out=tmp_path / "run")
    x, y = data.pixels[:size] / 255, data.labels[:size]
    first, second = run.selections
    assert (first.epoch, second.epoch) == (1, 3)
    without = replace(recipe, awp=None)
    each = [
        batch_flops(ran, small(), selection, x, y)
        for ran, selection in ((without, first), (recipe, first), (recipe, second))
    ]
    assert training_flops(run, data, small) == batches * sum(each)
