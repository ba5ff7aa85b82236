"""Images from every kind of source, and every kind of source that is refused."""

import hashlib
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import clat
from clat.data import loading
from clat.data.dataset import Dataset, augment, to_unit
from clat.data.loading import load_data
from clat.data.sources import EMBEDDED
from clat.errors import InputError

LABEL = datasets.Value("int64")
RNG = np.random.default_rng(0)


def picture(height=8, width=8, mode="RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(RNG.integers(0, 255, shape, dtype=np.uint8), mode=None)


def parquet(folder: Path, rows: dict, features: dict | None = None, split: str = "train") -> Path:
    usual = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    table = datasets.Dataset.from_dict(rows, datasets.Features(features or usual))
    folder.mkdir(exist_ok=True, parents=True)
    table.to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for i in range(3):
                picture().save(tmp_path / "pictures" / split / name / f"{i}.png")
    return tmp_path / "pictures"


def test_the_embedded_data_is_balanced_small_and_unchanged():
    train, test = load_data(), load_data(split="test")
    assert train.labels.bincount().tolist() == [500] * 10
    assert test.labels.bincount().tolist() == [100] * 10
    assert train.shape == (1, 28, 28)
    assert train.classes[9] == "Ankle boot"
    embedded = Path(clat.__file__).parent / "embedded"
    for line in (embedded / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((embedded / name).read_bytes()).hexdigest() == digest
    assert sum(path.stat().st_size for path in embedded.iterdir()) < 4_000_000
    assert not {x.numpy().tobytes() for x in train.pixels} & {x.numpy().tobytes() for x in test.pixels}


def test_an_image_folder(folder):
    data = load_data(str(folder), "test")
    assert len(data) == 6
    assert data.classes == ("cat", "dog")
    assert data.shape == (3, 8, 8)
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_parquet_files_keep_their_pixels(tmp_path):
    pictures = [picture(), picture()]
    for source in (parquet(tmp_path / "set", {"image": pictures, "label": [1, 0]}), tmp_path / "set/train.parquet"):
        data = load_data(str(source))
        assert data.labels.tolist() == [1, 0]
        for stored, original in zip(data.pixels, pictures, strict=True):
            assert np.array_equal(stored.permute(1, 2, 0).numpy(), np.array(original))


def test_a_saved_data_set(tmp_path):
    table = datasets.Dataset.from_dict(
        {"img": [picture()], "label": [0]},
        datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a"])}),
    )
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "saved")
    assert len(load_data(str(tmp_path / "saved"))) == 1


def test_columns_are_found_by_type_and_name_or_given(tmp_path):
    rows = {"photo": [picture()] * 2, "coarse_label": [0, 0], "fine_label": [1, 3]}
    names = {"coarse_label": datasets.ClassLabel(num_classes=2), "fine_label": datasets.ClassLabel(num_classes=4)}
    source = str(parquet(tmp_path / "set", rows, {"photo": datasets.Image(), **names}))
    assert load_data(source).labels.tolist() == [1, 3]
    assert load_data(source, label="coarse_label").labels.tolist() == [0, 0]
    with pytest.raises(InputError, match="no column 'x'"):
        load_data(source, label="x")


def test_grey_and_coloured_images_of_several_sizes(tmp_path):
    rows = {"image": [picture(8, 8), picture(12, 20, "L")], "label": [0, 1]}
    source = str(parquet(tmp_path / "set", rows))
    with pytest.raises(InputError, match="several sizes"):
        load_data(source)
    assert load_data(source, size=6).pixels.shape == (2, 3, 6, 6)


@pytest.mark.parametrize(
    ("rows", "features", "says"),
    [
        ({"image": [], "label": []}, None, "no data"),
        ({"image": [picture()], "label": [-1]}, {"image": datasets.Image(), "label": LABEL}, "-1"),
        ({"image": [picture()], "label": [None]}, None, "no label"),
        (
            {"image": ["a"], "label": [0]},
            {"image": datasets.Value("string"), "label": datasets.Value("int64")},
            "image",
        ),
        ({"image": [picture()]}, {"image": datasets.Image()}, "label"),
    ],
)
def test_unusable_tables_are_refused(tmp_path, rows, features, says):
    with pytest.raises(InputError, match=says):
        load_data(str(parquet(tmp_path / "set", rows, features)))


def test_sources_and_splits_that_do_not_exist_are_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match="no file or folder"):
        load_data("./nowhere")
    with pytest.raises(InputError, match="empty"):
        load_data(str(tmp_path / "empty"))
    with pytest.raises(InputError, match="could be read"):
        load_data(str(tmp_path / "broken.parquet"))
    with pytest.raises(InputError, match="it has train, test"):
        load_data(str(folder), "extra")


def test_test_is_read_from_validation_where_there_is_no_test(tmp_path):
    rows = {"image": [picture()], "label": [0]}
    parquet(tmp_path / "set", rows)
    parquet(tmp_path / "set", rows, split="validation")
    assert len(load_data(str(tmp_path / "set"), "test")) == 1


def test_large_sets_stream_through_workers_with_the_same_result(folder, monkeypatch):
    resident = load_data(str(folder))
    monkeypatch.setattr(loading, "RESIDENT_BYTES", 0)
    streamed = load_data(str(folder))
    assert not streamed.resident
    order = torch.tensor([5, 0, 3, 2])
    for workers in (0, 2):
        pairs = zip(streamed.batches(3, order=order, workers=workers), resident.batches(3, order=order), strict=True)
        for (x, y), (x2, y2) in pairs:
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)
    kept, held = streamed.hold_out(2)
    kept2, held2 = resident.hold_out(2)
    assert torch.equal(next(held.batches(9, workers=0))[0], held2.pixels)
    assert torch.equal(kept.labels, kept2.labels)


def test_the_first_images_are_those_that_stand_first(blobs):
    few = blobs.first(3)
    assert torch.equal(few.pixels, blobs.pixels[:3])
    assert torch.equal(few.labels, blobs.labels[:3])
    assert len(blobs.first(10**9)) == len(blobs)


def test_a_sample_is_seeded_in_order_and_never_larger_than_the_set(blobs):
    numbered = replace(blobs, labels=torch.arange(len(blobs)), classes=tuple(map(str, range(len(blobs)))))
    drawn = numbered.sample(20, 1).labels.tolist()
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 20
    assert drawn == numbered.sample(20, 1).labels.tolist() != numbered.sample(20, 2).labels.tolist()
    assert drawn == torch.randperm(len(blobs), generator=torch.Generator().manual_seed(1))[:20].sort().values.tolist()
    assert numbered.sample(None) is numbered
    assert numbered.sample(len(blobs)) is numbered


@pytest.mark.parametrize("limit", [0, -1, True, 2.0, "2"])
def test_a_sample_of_nothing_is_refused(blobs, limit):
    with pytest.raises(InputError, match="1 or more"):
        blobs.sample(limit)


def test_the_held_out_part_is_seeded_and_disjoint(blobs):
    tagged = Dataset(blobs.pixels, torch.arange(len(blobs)), tuple(map(str, range(len(blobs)))), "", "")
    training, held = tagged.hold_out(50, seed=1)
    assert len(held) == 50
    assert sorted([*training.labels.tolist(), *held.labels.tolist()]) == list(range(240))
    assert torch.equal(tagged.hold_out(50, seed=1)[1].labels, held.labels)
    assert not torch.equal(tagged.hold_out(50, seed=2)[1].labels, held.labels)


@pytest.mark.parametrize("count", [0, -1, 121])
def test_holding_out_too_much_or_nothing_is_refused(blobs, count):
    with pytest.raises(InputError, match="held out"):
        blobs.hold_out(count)


def test_augmentation_crops_and_flips_each_image_by_itself():
    pixels = torch.arange(1, 65).view(1, 1, 8, 8).expand(300, 1, 8, 8)
    changed = augment(pixels)
    padded = torch.nn.functional.pad(pixels[0], (4,) * 4)
    crops = {
        view.numpy().tobytes()
        for top in range(9)
        for left in range(9)
        for view in (padded[:, top : top + 8, left : left + 8], padded[:, top : top + 8, left : left + 8].flip(2))
    }
    found = {image.contiguous().numpy().tobytes() for image in changed}
    assert found <= crops
    assert len(found) > 100  # of 162


def test_statistics_and_units():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    data = Dataset(pixels, torch.tensor([0, 1]), ("a", "b"), "", "")
    assert to_unit(pixels).flatten().tolist() == [0.0, 1.0]
    mean, std = data.statistics()
    assert mean == [0.5]
    assert std == [pytest.approx(0.7071)]


def test_the_digest_depends_on_pixels_and_labels(blobs):
    other = blobs.pixels.clone()
    other[0, 0, 0, 0] += 1
    assert blobs.digest() != Dataset(other, blobs.labels, blobs.classes, "", "").digest()
    assert blobs.digest() == Dataset(blobs.pixels, blobs.labels, ("a", "b", "c"), EMBEDDED, "").digest()
