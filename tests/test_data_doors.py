"""What is read by name is what it says it is: splits, channels, depth, labels, and every source at fault."""

import io
import os
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from clat.cli import shared
from clat.cli.main import main
from clat.cli.shared import data_named
from clat.data import loading
from clat.data.dataset import Dataset
from clat.data.loading import load_data
from clat.errors import InputError

RNG = np.random.default_rng(0)


def png(value=None, mode="L", size=(4, 4)) -> bytes:
    shape = (*size, len(mode)) if len(mode) > 1 else size
    pixels = RNG.integers(0, 255, shape, dtype=np.uint8) if value is None else np.full(shape, value, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path: Path, images, labels, **more) -> str:
    pandas.DataFrame({"image": images, "label": labels, **more}).to_parquet(path)
    return str(path)


def class_folders(folder: Path, names=("cat", "dog"), each=10) -> str:
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            (folder / name / f"{i}.png").write_bytes(png())
    return str(folder)


def images_of(data: Dataset) -> set[bytes]:
    return {image.numpy().tobytes() for image in data.pixels}


# Splits


def test_a_single_file_without_a_split_is_no_test_set_unless_the_user_says_so(tmp_path):
    file = parquet(tmp_path / "photos.parquet", [png() for _ in range(10)], [0, 1] * 5)
    assert len(load_data(file)) == 10
    with pytest.raises(InputError, match=r"does not say .* add holds=test .*, or holds=both"):
        load_data(file, "test")
    assert len(load_data(file, "test", holds="test")) == 10
    with pytest.raises(InputError, match="holds test images, as holds=test says, and train images"):
        load_data(file, holds="test")
    parts = [load_data(file, split, holds="both") for split in ("train", "test")]
    assert [len(part) for part in parts] == [8, 2]
    assert not images_of(parts[0]) & images_of(parts[1])
    with pytest.raises(InputError, match="it can be train, test, both"):
        load_data(file, holds="valid")


def test_the_word_in_a_files_name_counts(tmp_path):
    file = parquet(tmp_path / "photos-test-00000-of-00001.parquet", [png()] * 2, [0, 1])
    assert len(load_data(file, "test")) == 2
    with pytest.raises(InputError, match="has no split 'train'; it has test"):
        load_data(file)


def test_a_saved_single_set_without_a_split_is_no_test_set(tmp_path):
    file = parquet(tmp_path / "photos.parquet", [png(), png()], [0, 1])
    datasets.load_dataset("parquet", data_files={"train": file})["train"].save_to_disk(tmp_path / "saved")
    assert len(load_data(str(tmp_path / "saved"))) == 2
    with pytest.raises(InputError, match="holds=test"):
        load_data(str(tmp_path / "saved"), "test")


def test_class_folders_without_a_split_set_a_test_part_aside_and_say_so(tmp_path):
    source = class_folders(tmp_path / "photos", ("beaker", "test-tube"))  # the word in a class name is no split
    train, test, again = (load_data(source, split) for split in ("train", "test", "test"))
    assert train.labels.bincount().tolist() == [8, 8]
    assert test.labels.bincount().tolist() == [2, 2]
    assert train.classes == test.classes == ("beaker", "test-tube")
    assert not images_of(train) & images_of(test)
    assert torch.equal(test.pixels, again.pixels)
    assert any("4 of its 20 images, drawn by a fixed seed, are set aside" in note for note in test.notes)
    assert len(load_data(source, holds="train")) == 20
    with pytest.raises(InputError, match="divided into train and test"):
        load_data(source, "validation")


def test_class_folders_in_split_folders_share_their_classes(tmp_path):
    class_folders(tmp_path / "photos/training", ("cat", "dog", "emu"), 2)
    class_folders(tmp_path / "photos/val", ("emu", "dog"), 1)
    test = load_data(str(tmp_path / "photos"), "test")
    assert test.classes == ("cat", "dog", "emu")
    assert test.labels.tolist() == [1, 2]
    assert "no split test; its split validation is read" in test.notes[0]


def test_a_hub_set_with_one_split_is_divided_and_this_is_said(tmp_path, monkeypatch):
    file = parquet(tmp_path / "a.parquet", [png() for _ in range(10)], ["a", "b"] * 5)
    served = datasets.load_dataset("parquet", data_files={"train": file})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: served)
    train, test = load_data("someone/photos"), load_data("someone/photos", "test")
    assert (len(train), len(test)) == (8, 2)
    assert "someone/photos has no test split" in "".join(test.notes)


# Channels and depth


@pytest.mark.parametrize("resident", [True, False])
def test_a_grey_first_image_does_not_make_the_set_grey(tmp_path, monkeypatch, resident):
    file = parquet(tmp_path / "a.parquet", [png(7), png(9), png(mode="RGB")], [0, 1, 1])
    if not resident:
        monkeypatch.setattr(loading, "RESIDENT_BYTES", 0)
    data = load_data(file, workers=0)
    x = torch.cat([pixels for pixels, _ in data.batches(2)])
    assert data.shape == (3, 4, 4)
    assert data.resident == resident
    assert (x[0] == 7).all()
    assert (x[1] == 9).all()
    assert len(x[2].unique(dim=0)) == 3
    assert load_data(file, channels=1).shape == (1, 4, 4)


def test_a_colour_image_that_was_not_looked_at_stops_a_set_read_as_grey(tmp_path, monkeypatch):
    file = parquet(tmp_path / "a.parquet", [png() for _ in range(9)] + [png(mode="RGB")], [0, 1] * 5)
    monkeypatch.setattr(loading, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(loading, "SAMPLE", 1)
    for workers in (0, 1):
        with pytest.raises(
            InputError, match=r"^An image, at place 9, cannot be read: it is in colour.*channels=1 or 3"
        ):
            list(load_data(file).batches(5, order=torch.tensor([8, 9]), workers=workers))
    assert load_data(file, channels=3).shape == (3, 4, 4)


@pytest.mark.parametrize(("kind", "ending"), [(np.uint16, "png"), (np.int32, "tiff"), (np.float32, "tiff")])
def test_images_of_more_than_8_bits_are_scaled(tmp_path, kind, ending):
    class_folders(tmp_path / "photos/train", each=0)
    ramp = np.linspace(0, 1 if kind == np.float32 else 65535, 16).reshape(4, 4).astype(kind)
    Image.fromarray(ramp).save(tmp_path / f"photos/train/cat/1.{ending}")
    data = load_data(str(tmp_path / "photos"))
    assert data.shape == (1, 4, 4)
    assert data.pixels.flatten().tolist() == list(range(0, 256, 17))
    assert data.notes[0].endswith("of more than 8 bits, scaled to 8: 1.")


@pytest.mark.parametrize(("mode", "channels"), [("P", 3), ("RGBA", 3), ("CMYK", 3), ("LA", 1), ("1", 1)])
def test_every_usual_mode_is_read(tmp_path, mode, channels):
    class_folders(tmp_path / "photos/train", each=0)
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(tmp_path / "photos/train/dog/1.tiff")
    data = load_data(str(tmp_path / "photos"))
    assert data.shape == (channels, 4, 4)
    assert (data.pixels == 255).all()
    assert bool(data.notes[:-1]) == (mode in ("RGBA", "CMYK", "LA"))  # the last: there is one class


# Labels


def test_labels_with_gaps_are_refused_with_the_mapping_that_an_option_applies(tmp_path):
    for labels, says in (([0, 10, 20, 30, 40], "10 -> 1"), ([1, 2, 3, 4, 5], "1 -> 0")):
        file = parquet(tmp_path / "a.parquet", [png()] * 5, labels)
        with pytest.raises(InputError, match=rf"{says}.*classes=auto"):
            load_data(file)
        data = load_data(file, classes="auto")
        assert data.labels.tolist() == [0, 1, 2, 3, 4]
        assert data.classes == tuple(map(str, labels))
        assert says in data.notes[0]
    file = parquet(tmp_path / "a.parquet", [png()] * 2, [0, 7])
    assert len(load_data(file, classes=10).classes) == 10
    with pytest.raises(InputError, match=r"run from 0 to 7"):
        load_data(file, classes=5)


def test_a_class_without_test_images_keeps_its_number(tmp_path):
    (tmp_path / "photos").mkdir()
    parquet(tmp_path / "photos/train.parquet", [png()] * 3, [0, 1, 2])
    parquet(tmp_path / "photos/test.parquet", [png()] * 2, [0, 2])
    test = load_data(str(tmp_path / "photos"), "test")
    assert test.labels.tolist() == [0, 2]
    assert test.classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("labels", "numbers", "classes"),
    [
        (["dog", "cat", "dog"], [1, 0, 1], ("cat", "dog")),
        (["10", "9", "10"], [1, 0, 1], ("9", "10")),
        ([True, False, True], [1, 0, 1], ("False", "True")),
        ([1.0, 0.0, 1.0], [1, 0, 1], ("0", "1")),
    ],
)
def test_labels_of_other_types_are_numbered_in_sorted_order(tmp_path, labels, numbers, classes):
    data = load_data(parquet(tmp_path / "a.parquet", [png()] * 3, labels))
    assert data.labels.tolist() == numbers
    assert data.classes == classes
    assert bool(data.notes) == (classes != ("0", "1"))


def test_the_index_that_pandas_writes_is_no_label(tmp_path):
    frame = pandas.DataFrame({"image": [png()] * 3, "label": ["a", "b", "a"]}, index=[5, 6, 7])
    frame.to_parquet(tmp_path / "a.parquet")
    assert load_data(str(tmp_path / "a.parquet")).classes == ("a", "b")


# Unreadable and damaged


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("broken", "says"), [(None, "no image"), (png()[:40], "row 1"), (b"no image", "of a known kind")]
)
def test_unreadable_images_are_named_or_skipped(tmp_path, wrapped, broken, says):
    images = [png(1), broken, png(2)]
    file = parquet(
        tmp_path / "a.parquet", [{"bytes": i, "path": None} for i in images] if wrapped else images, [0, 1, 0]
    )
    with pytest.raises(InputError, match=rf"row 1.*{says}|{says}") as caught:
        load_data(file)
    assert "row 1" in str(caught.value)
    data = load_data(file, unreadable="skip")
    assert data.labels.tolist() == [0, 0]
    assert data.pixels[:, 0, 0, 0].tolist() == [1, 2]
    assert data.notes[0].endswith("that cannot be read and are left out: 1 (row 1).")


def test_an_unreadable_file_in_a_folder_is_named_also_when_decoded_later(tmp_path, monkeypatch):
    source = class_folders(tmp_path / "photos/train")
    (tmp_path / "photos/train/cat/3.png").write_bytes(png()[:45])
    with pytest.raises(InputError, match=r"cat/3\.png"):
        load_data(str(tmp_path / "photos"))
    monkeypatch.setattr(loading, "RESIDENT_BYTES", 0)
    data = load_data(str(tmp_path / "photos"), workers=1)
    with pytest.raises(InputError, match=r"^An image, at place 3, cannot be read"):
        list(data.batches(5))
    kept = load_data(str(tmp_path / "photos"), unreadable="skip", workers=0)
    assert sum(len(y) for _, y in kept.batches(5)) == 19
    assert source


def test_an_address_in_a_table_is_not_fetched(tmp_path):
    entries = [{"bytes": png(), "path": "a.png"}, {"bytes": None, "path": "https://example.com/a.png"}]
    with pytest.raises(InputError, match="it is an address"):
        load_data(parquet(tmp_path / "a.parquet", entries, [0, 1]))


def test_flipped_bytes_of_a_parquet_file_end_in_one_sentence_or_are_harmless(tmp_path):
    file = Path(parquet(tmp_path / "a.parquet", [png() for _ in range(4)], ["a", "b"] * 2))
    whole, refused = file.read_bytes(), 0
    for place in RNG.integers(0, len(whole), 25):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        file.write_bytes(damaged)
        try:
            load_data(str(file))
        except InputError:  # anything else fails here
            refused += 1
    assert refused > 3
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="could be read"):
        load_data(str(file))


def test_tables_without_what_is_needed(tmp_path):
    pandas.DataFrame({"image": [png()], "text": ["a"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"no columns that could hold the label.*label=COLUMN"):
        load_data(str(tmp_path / "a.parquet"))
    pandas.DataFrame({"image": [[1, 2]], "label": [0]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="no columns that could hold the image"):
        load_data(str(tmp_path / "a.parquet"))
    with pytest.raises(InputError, match="holds no image files"):
        load_data(str(tmp_path / "a.parquet"), image="image")
    pandas.DataFrame({"image": [png()], "label": ["a"]}).iloc[:0].to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"no images|No images"):
        load_data(str(tmp_path / "a.parquet"))
    with pytest.raises(InputError, match="have no label"):
        load_data(parquet(tmp_path / "a.parquet", [png()] * 2, [1.0, None]))


# Names and paths, at the command line: one sentence, exit code 2


@pytest.fixture
def odd(tmp_path) -> dict[str, str]:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file.txt").write_text("no images")
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("no images")
    os.mkfifo(tmp_path / "pipe")
    return {
        "too long": str(tmp_path / ("x" * 300)),
        "much too long": "x" * 100_000,
        "NUL": "a\0b",
        "below a file": str(tmp_path / "file.txt/photos"),
        "a loop of links": str(tmp_path / "loop"),
        "a folder where a file should be": str(tmp_path / "folder.parquet"),
        "no parquet": str(tmp_path / "file.txt"),
        "no images": str(tmp_path / "notes"),
        "a pipe": str(tmp_path / "pipe"),
        "nothing": "",
        "odd characters": "photos of [/x] \x1b[31m",
        "an unknown user": "~nobody-of-this-name/photos",
        "a slip below a folder": "notes/photos",
        "brackets": str(tmp_path / "[/x]"),
        "an unknown option": f"{tmp_path}/notes,sise=3",
        "a size of text": "fashion-mnist-mini,size=big",
        "a huge size": "fashion-mnist-mini,size=1000000000",
        "two channels": "fashion-mnist-mini,channels=2",
        "a column that is a truth value": "fashion-mnist-mini,label=no",
        "an unknown word": "fashion-mnist-mini,holds=tset",
        "a column that is not there": "fashion-mnist-mini,label=x",
        "names that are there already": "fashion-mnist-mini,classes=auto",
    }


def test_sources_at_fault_end_in_one_sentence(odd, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for what, source in odd.items():
        with pytest.raises(InputError) as caught:
            data_named(source, "train")
        said = str(caught.value)
        assert len(said) < 600, what
        assert "\x1b" not in said, what
        assert "\n" not in said, what
    for what in ("too long", "odd characters", "a size of text"):
        assert main(["layers", "rn18,width=4", "--data", odd[what]]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch, capsys):
    def unreachable(*_):  # as datasets does: it looks into its cache first, and then says what was wrong
        offline = ConnectionError("Couldn't reach\n'x' on the Hub")
        try:
            raise FileNotFoundError("Dataset x is not cached in None")
        except FileNotFoundError:
            raise offline from None

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert main(["layers", "rn18,width=4", "--data", "someone/photos,config=other"]) == 2
    said = capsys.readouterr().err
    assert "No images could be read from someone/photos" in said
    assert said.endswith("(Couldn't reach 'x' on the Hub).\n")


def test_paths_with_brackets_are_read_and_printed(tmp_path, capsys):
    (tmp_path / "a[x]/[").mkdir(parents=True)
    file = parquet(tmp_path / "a[x]/[/x].parquet", [png()] * 5, ["a", "b"] * 2 + ["a"])
    assert len(data_named(f"{file},holds=both", "train")) == 4
    assert "[/x].parquet are numbered in sorted order" in capsys.readouterr().err
    assert len(data_named(class_folders(tmp_path / "a[x]/[red]"), "train")) == 16
    assert capsys.readouterr().out == ""


def test_a_finetuned_network_meets_its_classes_again(tmp_path, capsys):
    for name, order in (("first", ("cat", "dog")), ("other", ("mouse", "dog"))):
        class_folders(tmp_path / name, order)
    short = [
        "--epochs=1",
        "--holdout=4",
        "--batch_size=8",
        "--threat.steps=1",
        "--validation_steps=1",
        "--health=false",
    ]
    base = ["--model", "rn18,width=2", "--data", str(tmp_path / "first"), "--out", str(tmp_path / "base")]
    assert main(["train", "pgd-at", *base, *short]) == 0
    assert "set aside for testing" in capsys.readouterr().err
    known = shared.stored_facts(str(tmp_path / "base"))["data"]
    assert known["sha256"] == load_data(str(tmp_path / "first")).digest()
    fine = ["--from", str(tmp_path / "base"), "--data", str(tmp_path / "other"), "--out", str(tmp_path / "fine")]
    assert main(["finetune", "clat", *fine, *short]) == 2
    assert "those of" in capsys.readouterr().err
    assert main(["layers", str(tmp_path / "base"), "--data", str(tmp_path / "other"), "--batch", "2"]) == 2
