"""A second data set: its share of each batch, its labels, and what it may not be."""

import os
from dataclasses import replace

import pytest
import torch
from PIL import Image

from clat.checkpoint import load_checkpoint
from clat.data.dataset import to_unit
from clat.errors import InputError
from clat.network import predict
from clat.objectives import Clean
from clat.threat import Threat
from clat.training.batches import run_images
from clat.training.extra import Extra
from clat.training.processes import started
from clat.training.recipe import Recipe
from clat.training.train import train
from conftest import dies_before, network, same_tensors

BASE = Recipe(
    objective=Clean(), threat=Threat(eps=0.1, step=0.05, steps=2), validation_steps=2, epochs=3, batch_size=60,
    holdout=60, lr=0.05, health=False,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """30 grey images in three classes, of brightness 252 less their label among those of blobs."""
    for label, name in enumerate(("bottom", "middle", "top")):
        (tmp_path / "extra/train" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("L", (12, 12), 250 + label).save(tmp_path / f"extra/train/{name}/{i}.png")
    return str(tmp_path / "extra")


def batches(recipe, data):
    images = run_images(recipe, data, started("cpu"))
    return list(images.pixels(1)), list(images.pixels(2)), images.steps


@pytest.mark.parametrize(("share", "count"), [(0.5, 30), (0.7, 42), (0.05, 3)])
def test_each_batch_has_its_share_with_its_labels(share, count, folder, blobs):
    first, second, steps = batches(replace(BASE, extra=Extra(source=folder, share=share)), blobs)
    assert len(first) == steps == 3  # as many as without
    for pixels, y in first:
        extra = pixels[:, 0, 0, 0] >= 250
        assert len(y) == 60
        assert int(extra.sum()) == count
        assert torch.equal(y[extra], 252 - pixels[extra][:, 0, 0, 0].long())
    own = torch.cat([pixels[pixels[:, 0, 0, 0] < 250] for pixels, _ in first])
    assert len({bytes(image.numpy()) for image in own}) == len(own)  # none twice in an epoch
    assert not torch.equal(first[0][0], second[0][0])


def test_pseudo_labels_are_a_checkpoints_predictions(folder, blobs, tmp_path):
    teacher = train(BASE, network(), blobs, out=tmp_path / "teacher")
    for path in list((tmp_path / "extra/train").glob("*/*.png")):  # no labels: one folder for all
        path.rename(tmp_path / "extra/train" / f"{path.parent.name}{path.name}")
    for name in ("bottom", "middle", "top"):
        (tmp_path / "extra/train" / name).rmdir()
    found = Extra(source=folder, labels=str(teacher.best)).load(blobs, torch.device("cpu"))
    assert torch.equal(found.labels, predict(load_checkpoint(teacher.best)[0], to_unit(found.pixels)))
    assert found.classes == blobs.classes
    with pytest.raises(InputError, match="hold the label"):
        Extra(source=folder).load(blobs, torch.device("cpu"))


def test_a_killed_run_ends_bit_identical_and_only_with_the_same_extra_images(folder, blobs, tmp_path):
    recipe = replace(BASE, extra=Extra(source=folder))
    whole = train(recipe, network(), blobs, out=tmp_path / "whole")
    assert whole.environment["extra"]["images"] == 30
    with dies_before("optimizer-2"):
        train(recipe, network(), blobs, out=tmp_path / "killed")
    killed = train(recipe, network(), blobs, out=tmp_path / "killed", resume=True)
    assert same_tensors(whole.last, killed.last)
    os.remove(tmp_path / "extra/train/top/0.png")
    with pytest.raises(InputError, match="extra images"):
        train(recipe, network(), blobs, out=tmp_path / "killed", resume=True)


def test_what_does_not_fit_is_refused(folder, blobs):
    for share in (0, 1):
        with pytest.raises(InputError, match=r"extra\.share"):
            Extra(source=folder, share=share)
    with pytest.raises(InputError, match="leaves one of the two"):
        Extra(source=folder, share=0.001).count(60)
    with pytest.raises(InputError, match=r"1x8x8.*extra\.size"):
        Extra(source=folder, size=8).load(blobs, torch.device("cpu"))
    renamed = replace(blobs, classes=("up", "middle", "down"))
    with pytest.raises(InputError, match=r"classes of .* are bottom, top, middle, those of blobs up, down, middle"):
        Extra(source=folder).load(renamed, torch.device("cpu"))
    for source in ("", "./nowhere", "a\0b"):
        with pytest.raises(InputError, match=r"no file or folder|No data"):
            Extra(source=source).load(blobs, torch.device("cpu"))
    two = replace(blobs, labels=blobs.labels % 2, classes=("even", "odd"))
    with pytest.raises(InputError, match=r"3 classes.*2; set extra\.labels"):
        Extra(source=folder).load(two, torch.device("cpu"))
