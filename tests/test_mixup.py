"""Mixup: what is mixed, what is attacked, and what sees the images as they are."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from clat.errors import InputError
from clat.network import logits, same_bits
from clat.objectives import Clat, Clean, FastAt, FreeAt, Mart, PgdAt, Trades
from clat.threat import Threat, attack_output
from clat.training import loop
from clat.training.batches import TrainingBatch
from clat.training.method import Method
from clat.training.own_loop import CLAT, OwnLoop
from clat.training.recipe import Recipe
from clat.training.train import train
from clat.tuners import Critical, Whole
from conftest import dies_before, network, same_tensors
from test_length import SHORT

ONE_STEP = replace(SHORT, epochs=1, augment=False, precision="fp32", layout="contiguous", mixup=1.0)


@pytest.fixture
def seen(monkeypatch):
    """What each batch was as it was drawn, and as it was mixed."""
    found = []
    real = TrainingBatch.mixed

    def mixed(self, alpha, classes):
        found.append((self, real(self, alpha, classes)))
        return found[-1][1]

    monkeypatch.setattr(TrainingBatch, "mixed", mixed)
    return found


def test_each_image_is_mixed_with_one_other_and_its_label_in_the_same_share():
    x, y = torch.eye(6).view(6, 1, 2, 3), torch.tensor([0, 1, 2, 3, 4, 5])
    shares = set()
    for _ in range(20):
        mixed = TrainingBatch(x, y, torch.arange(6), None).mixed(0.7, 6)
        torch.testing.assert_close(mixed.x.view(6, 6), mixed.y)  # one pixel and one class stand for each image
        torch.testing.assert_close(mixed.y.sum(1), torch.ones(6))
        torch.testing.assert_close(mixed.y.sum(0), torch.ones(6))  # each image is once the other
        share = mixed.y.diagonal()[mixed.y.diagonal() < 1]
        assert len(share) == 0 or share.max() - share.min() < 1e-6  # one share a batch
        shares |= {round(value, 4) for value in share.tolist()}
        assert mixed.places.tolist() == list(range(6))
    assert len(shares) > 10


def test_shares_are_of_the_beta_distribution():
    """Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1))."""
    x, y = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), torch.tensor([0, 1])
    batch = TrainingBatch(x, y, torch.arange(2), None)
    drawn = [value for value in (batch.mixed(2.0, 2).y[0, 0].item() for _ in range(4000)) if value < 1]
    assert torch.tensor(drawn).mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.tensor(drawn).var().item() == pytest.approx(1 / 20, abs=0.006)


def test_the_loss_of_an_epoch_is_that_of_both_labels(blobs, tmp_path, seen):
    model = network().train()
    run = train(replace(ONE_STEP, objective=Clean()), network(), blobs, out=tmp_path / "run")
    ((drawn, mixed),) = seen
    found = torch.cdist(mixed.x.flatten(1), drawn.x.flatten(1))
    assert not (found.min(1).values < 1e-4).all()  # they are others than those drawn
    wanted = -(mixed.y * logits(model(mixed.x)).log_softmax(1)).sum(1).mean()
    assert run.metrics[0]["loss"] == pytest.approx(wanted.item(), rel=1e-5)


def test_mixed_labels_are_smoothed(blobs, tmp_path, seen):
    recipe = replace(ONE_STEP, objective=Clean(), label_smoothing=0.3)
    run = train(recipe, network(), blobs, out=tmp_path / "run")
    ((_, mixed),) = seen
    wanted = F.cross_entropy(logits(network().train()(mixed.x)), 0.7 * mixed.y + 0.1)
    assert run.metrics[0]["loss"] == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize(
    "objective",
    [
        PgdAt(),
        Trades(),
        FastAt(),
        FreeAt(replays=2),
        Clat(weight=0.1),
        Clat(weight=0.1, attack="feature", cross_entropy="both"),
        Clat(weight=0.1, attack="latent"),
    ],
    ids=["pgd-at", "trades", "fast-at", "free-at", "clat", "feature", "latent"],
)
def test_every_objective_attacks_the_mixed_images(objective, blobs, tmp_path, seen, monkeypatch):
    attacked, real = [], Method.update

    def update(self, optimizer, x, x_adv, y, **more):
        attacked.append((x, x_adv))
        return real(self, optimizer, x, x_adv, y, **more)

    monkeypatch.setattr(Method, "update", update)
    tuner = Critical(k=2) if objective.name == "clat" else Whole()
    threat = replace(SHORT.threat, start="gaussian" if objective.name == "trades" else "uniform")
    recipe = replace(ONE_STEP, objective=objective, tuner=tuner, threat=threat)
    train(recipe, network(), blobs, out=tmp_path / "run")
    ((_, mixed),) = seen
    for x, x_adv in attacked:
        assert same_bits(x, mixed.x)
        distance = recipe.threat.distance(x_adv, mixed.x)
        assert (distance <= recipe.threat.radius + 1e-6).all()
        assert (distance > 0).all() or (not objective.attacks_pixels() and objective.name != "free-at")


def test_the_watch_for_overfitting_sees_unmixed_images(blobs, tmp_path, seen, monkeypatch):
    given, real = [], loop.validate

    def validate(job, epoch, losses, first_batch, *rest):
        given.append(first_batch)
        return real(job, epoch, losses, first_batch, *rest)

    monkeypatch.setattr(loop, "validate", validate)
    train(replace(ONE_STEP, objective=FastAt(), epochs=2), network(), blobs, out=tmp_path / "run")
    for (x, y), (drawn, _) in zip(given, seen, strict=True):
        assert same_bits(x, drawn.x)
        assert same_bits(y, drawn.y)


def test_a_killed_run_goes_on_as_if_it_had_not_been(blobs, tmp_path):
    recipe = replace(SHORT, mixup=0.4, accumulate=2, epochs=3)
    whole = train(recipe, network(), blobs, out=tmp_path / "whole")
    with dies_before("metrics.jsonl", 3):
        train(recipe, network(), blobs, out=tmp_path / "killed")
    killed = train(recipe, network(), blobs, out=tmp_path / "killed", resume=True)
    assert same_tensors(whole.last, killed.last)
    plain = train(replace(recipe, mixup=0.0), network(), blobs, out=tmp_path / "plain")
    assert not same_tensors(whole.last, plain.last)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"mixup": -0.1}, r"mixup is -0\.1; it must be 0 or more"),
        ({"mixup": float("inf")}, "mixup"),
        ({"mixup": "0.2"}, "mixup"),
        ({"mixup": 0.2, "warm_start": True}, "warm_start works without mixup"),
    ],
)
def test_what_is_refused(keys, says):
    with pytest.raises(InputError, match=says):
        Recipe(**keys)


def test_an_attack_on_shares_is_one_on_labels_where_they_are_whole():
    model, x, y = network(), torch.rand(4, 1, 12, 12), torch.tensor([0, 1, 2, 1])
    threat = Threat(eps=0.1, step=0.05, steps=3, start="zero")
    hard = attack_output(model, x, y, threat)
    assert torch.equal(attack_output(model, x, F.one_hot(y, 3).float(), threat), hard)
    other = F.one_hot((y + 1) % 3, 3).float()
    assert not torch.equal(attack_output(model, x, other, threat), hard)


@pytest.mark.parametrize(
    ("y", "says"),
    [
        (torch.full((3, 3), 1 / 3), r"must have shape \(4, (3|classes)\); got \(3, 3\)"),
        (torch.full((4, 3), -1.0), "numbers from 0 on"),
        (torch.full((4, 3), torch.nan), "numbers from 0 on"),
        (torch.ones(4), "whole numbers"),
    ],
)
def test_shares_that_are_none(y, says):
    model, x, threat = network(), torch.rand(4, 1, 12, 12), Threat(steps=1)
    with pytest.raises(InputError, match=says):
        attack_output(model, x, y, threat)
    own = CLAT(model, k=2, steps=1)
    own.select(x, torch.tensor([0, 1, 2, 1]))
    with pytest.raises(InputError, match=says):
        own.loss(x, y)


def test_an_own_loop_takes_shares_where_the_objective_does():
    x, y = torch.rand(4, 1, 12, 12), torch.tensor([0, 1, 2, 1])
    shares = 0.6 * F.one_hot(y, 3) + 0.4 * F.one_hot(y.flip(0), 3)
    own = CLAT(network(), k=2, steps=1)
    own.select(x, y)
    assert own.loss(x, shares).isfinite()
    with pytest.raises(InputError, match=r"shape \(4, 3\); got \(4, 2\)"):
        own.loss(x, shares[:, :2])
    with pytest.raises(InputError, match="whole numbers"):
        own.select(x, shares)
    mart = OwnLoop(network(), Mart(), Whole(), Threat(steps=1))
    mart.select(x, y)
    with pytest.raises(InputError, match="whole numbers"):
        mart.loss(x, shares)
