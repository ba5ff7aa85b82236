"""Label smoothing, class weights and mixup: what the loss learns, checked against torch, and who refuses them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from clat.checkpoint import load_tensors
from clat.data.dataset import to_unit
from clat.errors import InputError
from clat.network import same_bits
from clat.objectives import OBJECTIVES, Clat, Clean, Trades
from clat.training.awp import Awp
from clat.training.batches import split
from clat.training.extra import Extra
from clat.training.recipe import Recipe
from clat.training.targets import targets
from clat.training.train import train
from clat.tuners import Critical
from conftest import network
from test_length import SHORT

LABELS = torch.tensor([0] * 6 + [1] * 3 + [2])
SCORES = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))


def loss(recipe):
    return F.cross_entropy(SCORES, targets(recipe, LABELS, 4)[LABELS])


def test_smoothing_is_torchs():
    found = loss(Recipe(label_smoothing=0.1))
    torch.testing.assert_close(found, F.cross_entropy(SCORES, LABELS, label_smoothing=0.1))


def test_balanced_classes_count_alike():
    """Each of the three classes that have images has a third of the loss; the weights' mean is 1."""
    own = [F.cross_entropy(SCORES[part], LABELS[part]) for part in (slice(6), slice(6, 9), slice(9, 10))]
    torch.testing.assert_close(loss(Recipe(class_weights="balanced")), torch.stack(own).mean())
    rows = targets(Recipe(class_weights="balanced", label_smoothing=0.3), LABELS, 4)
    assert rows[LABELS].sum(1).mean() == pytest.approx(1)
    assert rows.sum(1).tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3, 10 / 3])  # no label looks up the last


def test_plain_labels_stay_as_they_are():
    assert targets(Recipe(), LABELS, 4) is None


CHANGED = {"label_smoothing": 0.2, "class_weights": "balanced", "mixup": 0.2}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("key", CHANGED)
def test_an_objective_takes_them_or_says_so(name, key):
    objective = OBJECTIVES[name]()
    if objective.takes_soft_labels():
        model, x = network(), torch.rand(4, 1, 12, 12)
        y = torch.arange(4) % 3
        soft = F.one_hot(y, 3).float()
        model.eval()
        objective = objective.begin()
        hard, same = (sum(objective.loss(model, x, x, labels).values()) for labels in (y, soft))
        torch.testing.assert_close(hard, same)
    else:
        with pytest.raises(InputError, match=f"{key} does not go with {name}; it goes with clean, pgd-at, trades"):
            Recipe(objective=objective, **{key: CHANGED[key]})


def test_what_else_is_refused():
    with pytest.raises(InputError, match=r"label_smoothing is 1\.0"):
        Recipe(label_smoothing=1)
    with pytest.raises(InputError, match="works without extra"):
        Recipe(class_weights="balanced", extra=Extra(source="x"))


@pytest.mark.parametrize(
    "recipe",
    [
        replace(SHORT, objective=Clean()),
        replace(SHORT, objective=Trades(), awp=Awp(), threat=replace(SHORT.threat, start="gaussian")),
        replace(SHORT, objective=Clat(weight=0.1, attack="latent"), tuner=Critical()),
        replace(SHORT, objective=Clat(weight=0.1, teacher=0.5, cross_entropy="both"), tuner=Critical()),
    ],
    ids=["clean", "trades", "latent", "teacher"],
)
def test_training_learns_from_them(recipe, blobs, tmp_path):
    recipe = replace(recipe, epochs=1)
    plain = train(recipe, network(), blobs, out=tmp_path / "plain")
    smooth = train(replace(recipe, label_smoothing=0.3), network(), blobs, out=tmp_path / "smooth")
    first, second = (load_tensors(run.last)[0] for run in (plain, smooth))
    assert any(not same_bits(first[name], second[name]) for name in first)


def test_the_loss_of_an_epoch_is_that_of_the_changed_labels(blobs, tmp_path):
    """In an epoch of one step, the loss is that of the network as it began, in train mode."""
    recipe = replace(SHORT, epochs=1, objective=Clean(), augment=False, precision="fp32", layout="contiguous")
    places, _ = split(240, recipe.holdout, recipe.holdout_seed, recipe.images)
    x, y = to_unit(blobs.pixels[places]), blobs.labels[places]
    scores, count = network().train()(x), y.bincount()
    assert len(set(count.tolist())) > 1
    wanted = {
        "label_smoothing": F.cross_entropy(scores, y, label_smoothing=0.2),
        "class_weights": (F.cross_entropy(scores, y, reduction="none") * (32 / (3 * count))[y]).mean(),
    }
    for key in wanted:
        run = train(replace(recipe, **{key: CHANGED[key]}), network(), blobs, out=tmp_path / key)
        assert run.metrics[0]["loss"] == pytest.approx(wanted[key].item(), rel=1e-5)
