"""Random crops of training images: small ones in memory, large ones decoded by workers, and a user's own function."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import clat
from clat import Recipe, train
from clat.data.dataset import Dataset
from clat.data.loading import load_data
from clat.data.varying import Varied, all_varied, resized_crop, varied
from clat.errors import InputError
from clat.objectives import Clean
from clat.training.batches import run_images
from clat.training.processes import started
from conftest import dies_before, network, same_tensors

RECIPE = Recipe(objective=Clean(), epochs=1, batch_size=8, holdout=4, validation_steps=0, health=False, lr=0.01)


@pytest.fixture
def photos(tmp_path) -> str:
    """24 grey JPEGs of two classes and several sizes, and a truncated one that is not among them."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "photos/train" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 255, (60 + 7 * i, 90 - 3 * i), dtype=np.uint8) // 2 + 100 * label
            Image.fromarray(pixels).save(tmp_path / f"photos/train/{name}/{i}.jpg")
    return str(tmp_path / "photos")


def read(recipe: Recipe, data: Dataset, epoch: int = 1, workers: int = 0) -> torch.Tensor:
    images = run_images(recipe, data, started("cpu"), workers)
    torch.manual_seed(0)
    return torch.cat([batch.x for batch in images.batches(epoch)])


def test_large_images_are_cropped_and_resized_in_training_and_resized_in_evaluation(photos):
    data = load_data(photos, size=70, stream=True)
    assert data.shape == (1, 70, 70)
    first = read(RECIPE, data)
    assert first.shape == (16, 1, 70, 70)
    assert torch.equal(first, read(RECIPE, data))
    assert not torch.equal(first, read(RECIPE, data, epoch=2))
    assert torch.equal(first, read(replace(RECIPE, augment="resized-crop"), data))
    whole, _ = next(data.batches(20, workers=0))
    resident = load_data(photos, size=70)
    assert resident.resident
    assert torch.equal(whole, resident.pixels[:20])
    shown = read(replace(RECIPE, augment=False), data)
    assert torch.equal(shown, read(replace(RECIPE, augment=False), resident))
    assert not torch.equal(first, shown)


def test_the_crop_is_made_of_the_image_as_it_is_decoded(tmp_path):
    (tmp_path / "photos/train/cat").mkdir(parents=True)
    lines = np.zeros((200, 200), np.uint8)
    lines[::2] = 250  # lines that a crop shows only if the image was not made small first
    for i in range(8):
        Image.fromarray(lines).save(tmp_path / f"photos/train/cat/{i}.png")
    data = load_data(str(tmp_path / "photos"), size=66, stream=True)
    small = v2.RandomCrop(66)
    recipe = replace(RECIPE, holdout=1, batch_size=7)
    assert read(replace(recipe, augment=small), data).std() > 0.4
    assert read(replace(recipe, augment=False), data).std() < 0.2


def test_workers_do_not_change_what_is_drawn(photos):
    data = load_data(photos, size=70, stream=True)
    assert torch.equal(read(RECIPE, data), read(RECIPE, data, workers=2))


def test_processes_share_the_crops_of_one(photos):
    data = load_data(photos, size=70, stream=True)
    whole = run_images(RECIPE, data, started("cpu"))
    parts = [replace(whole, rank=rank, ranks=2) for rank in range(2)]
    for one, *both in zip(whole.batches(1), *(part.batches(1) for part in parts), strict=True):
        for rank, own in enumerate(both):
            assert torch.equal(one.x[rank::2], own.x)


def test_small_images_have_the_padded_crop_by_default(blobs):
    for augment in (True, "padded-crop"):
        assert torch.equal(read(replace(RECIPE, augment=augment), blobs), read(RECIPE, blobs))
    assert not torch.equal(read(replace(RECIPE, augment="resized-crop"), blobs), read(RECIPE, blobs))
    assert Recipe().augmentation((3, 64, 64)) == "padded-crop"
    assert Recipe().augmentation((3, 64, 65)) == "resized-crop"
    assert Recipe(warm_start=True).augmentation((3, 224, 224)) == "padded-crop"
    assert Recipe(augment=False).augmentation((3, 224, 224)) is False


def test_a_resized_crop_shows_a_part_of_the_image_and_leaves_the_random_numbers_alone():
    image = torch.arange(70, dtype=torch.uint8).expand(3, 70, 70)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    before = torch.rand(1)
    shown = [varied(resized_crop((3, 66, 66)), image, seed) for seed in range(20)]
    assert torch.equal(torch.cat([before, torch.rand(1)]), expected)
    spans = [int(x.max()) - int(x.min()) for x in shown]
    assert all(x.shape == (3, 66, 66) for x in shown)
    assert min(spans) < 40 < max(spans)
    flipped = [bool(x[0, 0, 0] > x[0, 0, -1]) for x in shown]
    assert 4 < sum(flipped) < 16


def test_a_function_of_ones_own_is_applied_recorded_and_resumed(blobs, tmp_path):
    def darker(image):
        return (image * torch.rand(1)).to(torch.uint8)

    recipe = replace(RECIPE, augment=darker, epochs=2, batch_size=180, holdout=60)
    assert read(recipe, blobs).mean() < 0.7 * read(replace(recipe, augment=False), blobs).mean()
    whole = train(recipe, network(), blobs, out=tmp_path / "whole")
    assert whole.recipe["augment"].endswith("darker")
    with dies_before("last", 2):
        train(recipe, network(), blobs, out=tmp_path / "run")
    with pytest.raises(InputError, match="started with another augment"):
        train(replace(recipe, augment=False), network(), blobs, out=tmp_path / "run", resume=True)
    resumed = train(recipe, network(), blobs, out=tmp_path / "run", resume=True)
    assert same_tensors(whole.last, resumed.last)


def test_a_transform_with_other_settings_is_another_one(blobs, tmp_path):
    recipe = replace(RECIPE, augment=v2.RandomHorizontalFlip(0.25), batch_size=180, holdout=60)
    train(recipe, network(), blobs, out=tmp_path / "run")
    train(recipe, network(), blobs, out=tmp_path / "run", resume=True)
    other = replace(recipe, augment=v2.RandomHorizontalFlip(0.5))
    with pytest.raises(InputError, match="another augment"):
        train(other, network(), blobs, out=tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (lambda image: image / 255, "it returned float32"),
        (lambda image: image[0], "uint8 image .1, height, width.*it returned uint8 .12, 12"),
        (lambda _: None, "it returned NoneType"),
        (lambda image: image[:, :8], "must return images of 12x12; it returned one of 8x12"),
    ],
)
def test_a_function_that_returns_something_else_is_refused(policy, says, blobs):
    with pytest.raises(InputError, match=says):
        all_varied(blobs.pixels[:2], policy, torch.arange(2))


def test_a_function_at_fault_is_named_in_one_sentence_also_from_a_worker(tmp_path):
    (tmp_path / "photos/train/cat").mkdir(parents=True)
    for i in range(4):
        Image.new("L", (12, 12), i).save(tmp_path / f"photos/train/cat/{i}.png")
    data = load_data(str(tmp_path / "photos"), stream=True)
    vary = Varied(lambda image: image[:, :8], torch.arange(4))
    for workers in (0, 1):
        with pytest.raises(InputError, match=r"^augment must return images of 12x12"):
            list(data.batches(2, workers=workers, vary=vary))


def test_the_code_in_the_docs_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs/data.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/data.md", "exec"), {})
    assert "%" in capsys.readouterr().out


def test_what_cannot_be_undone_is_refused_with_a_warm_start():
    with pytest.raises(InputError, match="warm_start works with augment padded-crop or false"):
        Recipe(warm_start=True, augment="resized-crop")


@pytest.mark.parametrize(("text", "value"), [("false", False), ("true", True), ("no", False), ("resized-crop", None)])
def test_the_command_line_takes_a_policy_or_a_truth_value(text, value):
    from clat.cli.arguments import parse
    from clat.cli.commands import COMMANDS

    given = ["train", "pgd-at", "--model", "rn18", "--data", "d", "--out", "o", "--augment", text]
    assert parse(given, COMMANDS)[1]["recipe"].augment == (text if value is None else value)
    with pytest.raises(InputError, match="choose one of padded-crop, resized-crop, true, false"):
        parse([*given[:-1], "cropped"], COMMANDS)


def test_an_unreadable_image_stops_training_with_its_place_or_is_left_out(photos, tmp_path):
    whole = (tmp_path / "photos/train/cat/3.jpg").read_bytes()
    (tmp_path / "photos/train/cat/3.jpg").write_bytes(whole[: len(whole) // 2])
    model = clat.build_model("rn18", 2, channels=1, width=4)
    with pytest.raises(InputError, match=r"^An image, at place \d+, cannot be read: .*cat/3.jpg.*unreadable=skip"):
        train(RECIPE, model, load_data(photos, size=32, stream=True), out=tmp_path / "run", workers=1)
    data = load_data(photos, size=32, stream=True, unreadable="skip")
    assert "left out: 1 (" in data.notes[0]
    assert train(replace(RECIPE, batch_size=19), model, data, out=tmp_path / "other", workers=1).result["epochs"] == 1


def test_the_shorter_edge_may_be_resized_to_more_than_the_crop(photos):
    data = load_data(photos, size=56, resize=64)
    assert data.shape == (1, 56, 56)
    usual = load_data(photos, size=64).pixels
    assert torch.equal(data.pixels, v2.functional.center_crop(usual, [56, 56]))
    streamed = load_data(photos, size=56, resize=64, stream=True)
    assert torch.equal(next(streamed.batches(24, workers=0))[0], data.pixels)
    for keys in ({"resize": 64}, {"size": 56, "resize": 32}):
        with pytest.raises(InputError, match="give a size, the edge that is then cropped"):
            load_data(photos, **keys)
    with pytest.raises(InputError, match="stream is 'yes'"):
        load_data(photos, stream="yes")
