"""Warm starts: perturbations go through crop and flip and back, help the next attack, and survive a kill."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from clat.data.crops import Crops
from clat.errors import InputError
from clat.objectives import Clat, Clean, FreeAt, PgdAt
from clat.threat import Threat, attack_output
from clat.training.method import Method
from clat.training.recipe import Recipe
from clat.training.train import train
from clat.training.warm import Perturbations
from clat.tuners import Whole
from conftest import dies_before, same_tensors
from test_teacher import RECIPE, network

CPU = torch.device("cpu")


def test_what_a_crop_shows_goes_back_to_where_it_was():
    images, before = torch.rand(200, 2, 9, 7), torch.full((200, 2, 9, 7), -1.0)
    crops = Crops.draw(200)
    back = crops.undo(crops.apply(images), before)
    shown = crops.undo(crops.apply(torch.ones_like(images)), before) == 1
    assert torch.equal(back[shown], images[shown])
    assert (back[~shown] == -1).all()
    rows, columns = 9 - (crops.top - 4).abs(), 7 - (crops.left - 4).abs()
    assert torch.equal(shown[:, 0].flatten(1).sum(1), (rows * columns).flatten())
    assert (
        len(set(zip(*(part.flatten().tolist() for part in (crops.top, crops.left, crops.flipped)), strict=True))) > 90
    )


def test_an_attack_starts_where_the_last_one_on_the_image_ended():
    threat, store = Threat(eps=0.1, steps=0), Perturbations(10, (1, 8, 8), CPU)
    x, order = torch.full((4, 1, 8, 8), 0.5), torch.tensor([7, 2, 5, 0])
    crops, delta = Crops.draw(4), 0.1 * torch.randn(4, 1, 8, 8).sign()
    store.keep(delta, order, crops)
    unchanged = store.threat(threat, order, crops).first(x) - x
    inside = crops.apply(torch.ones_like(x)) == 1  # all else is padding
    torch.testing.assert_close(unchanged[inside], delta[inside], rtol=1e-3, atol=1e-4)
    assert (unchanged[~inside] == 0).all()
    turned = store.threat(threat, order.flip(0), crops).first(x) - x
    assert not torch.allclose(turned, unchanged)
    fresh = store.threat(threat, torch.tensor([1, 2, 3, 4]), None).first(x) - x
    assert (fresh[1].abs() > 0.099).any()
    assert (fresh[[0, 2, 3]].abs().amax((1, 2, 3)) < 0.1).all()
    assert fresh[0].abs().max() > 0.05  # as the threat model starts


def test_one_warm_step_an_epoch_comes_near_many_steps(tiny):
    x, y, order = torch.rand(24, 1, 16, 16), torch.arange(24) % 3, torch.arange(24)
    one, store = Threat(eps=0.03, step=0.01, steps=1), Perturbations(24, (1, 16, 16), CPU)

    def loss(x_adv):
        with torch.no_grad():
            return F.cross_entropy(tiny.eval()(x_adv), y).item()

    def warm():
        x_adv = attack_output(tiny, x, y, store.threat(one, order, None))
        store.keep(x_adv - x, order, None)
        return loss(x_adv)

    losses = [warm() for _ in range(10)]
    many = loss(attack_output(tiny, x, y, replace(one, steps=10)))
    assert losses[0] - loss(x) < 0.5 * (many - loss(x))
    assert losses[-1] - loss(x) > 0.9 * (many - loss(x))


PGD = replace(RECIPE, objective=PgdAt(), tuner=Whole(), warm_start=True)


def test_the_loop_carries_perturbations_from_epoch_to_epoch(blobs, tmp_path, monkeypatch):
    """Attacks of no steps stay where they start: in the second epoch, where the first one left them."""
    found = []
    attack = Method.attack

    def spy(self, x, y, **keys):
        x_adv = attack(self, x, y, **keys)
        found.append((x, x_adv - x))
        return x_adv

    monkeypatch.setattr(Method, "attack", spy)
    grey = replace_pixels(blobs)
    recipe = replace(PGD, epochs=2, threat=Threat(eps=0.1, steps=0), augment=False, lr=0.01)
    train(recipe, network(), grey, out=tmp_path / "run")
    steps = len(found) // 2
    first, second = ({image_key(x): d for xs, ds in part for x, d in zip(xs, ds, strict=True)}
                     for part in (found[:steps], found[steps:]))  # fmt: skip
    both = first.keys() & second.keys()
    assert len(both) > 100
    for key in both:
        torch.testing.assert_close(second[key], first[key], rtol=0, atol=1e-4)


def replace_pixels(data):
    """Every image its own, so that it can be known again, and away from black and white."""
    pixels = torch.randint(60, 190, data.pixels.shape, dtype=torch.uint8)
    return type(data)(pixels, data.labels, data.classes, "grey", "train")


def image_key(x):
    return x.numpy().tobytes()


def test_a_resumed_run_ends_bit_identical(blobs, tmp_path):
    whole = train(PGD, network(), blobs, out=tmp_path / "whole")
    cold = train(replace(PGD, warm_start=False), network(), blobs, out=tmp_path / "cold")
    with dies_before("last", time=3):
        train(PGD, network(), blobs, out=tmp_path / "killed")
    killed = train(PGD, network(), blobs, out=tmp_path / "killed", resume=True)
    assert same_tensors(whole.last, killed.last)
    assert not same_tensors(whole.last, cold.last)


@pytest.mark.parametrize("objective", [Clean(), FreeAt(), Clat(attack="latent")])
def test_what_has_no_pixel_attack_is_refused(objective):
    with pytest.raises(InputError, match="warm_start needs an objective"):
        Recipe(warm_start=True, objective=objective)
