"""CSV files that list images: their splits, columns and paths, and those at fault."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from clat.data.loading import load_data
from clat.errors import InputError


def listed(folder: Path, text: str, name: str = "photos.csv", images: int = 10) -> str:
    """A CSV file beside a folder of grey images, image i of brightness i."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(images):
        Image.new("L", (4, 4), i).save(folder / f"images/{i}.png")
    (folder / name).write_text(text, encoding="utf-8-sig")
    return str(folder / name)


def rows(count: int = 10, separator: str = ",") -> str:
    return "".join(f"images/{i}.png{separator}{'cat' if i < 5 else 'dog'}\n" for i in range(count))


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_file_lists_images_beside_it(tmp_path, monkeypatch, separator):
    source = listed(tmp_path / "set", f"path{separator}label\n" + rows(separator=separator) + "\n", "train.csv")
    monkeypatch.chdir("/")
    data = load_data(source)
    assert data.pixels[:, 0, 0, 0].tolist() == list(range(10))
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0] * 5 + [1] * 5
    shutil.move(tmp_path / "set", tmp_path / "moved")
    assert load_data(str(tmp_path / "moved/train.csv")).digest() == data.digest()


def test_a_csv_file_is_divided_by_its_name_by_a_column_or_by_seed(tmp_path):
    source = listed(tmp_path, "path,label\n" + rows())
    train, test = load_data(source), load_data(source, "test")
    assert (len(train), len(test)) == (8, 2)
    assert not set(train.pixels[:, 0, 0, 0].tolist()) & set(test.pixels[:, 0, 0, 0].tolist())
    assert "2 of its 10 images, drawn by a fixed seed, are set aside for testing" in train.notes[-1]
    named = "".join(f"images/{i}.png,{i % 2},{'train' if i < 6 else 'Val'}\n" for i in range(10))
    source = listed(tmp_path, "file,label,split\n" + named, "all.csv")
    assert (len(load_data(source)), len(load_data(source, "test"))) == (6, 4)
    with pytest.raises(InputError, match=r"The column split of .*all.csv has 'fold1'; write train, validation or test"):
        load_data(listed(tmp_path, "file,label,split\nimages/1.png,0,fold1\n", "all.csv"))
    with pytest.raises(InputError, match="has no split 'test'; it has train, which can serve for both"):
        load_data(listed(tmp_path, "path,label\n" + rows(), "train.csv"), "test")


def test_columns_of_a_csv_file_are_named_where_there_are_several(tmp_path):
    text = "front,back,breed,age\n" + "".join(f"images/{i}.png,images/{9 - i}.png,a{i % 2},{i}\n" for i in range(10))
    source = listed(tmp_path, text, "train.csv")
    with pytest.raises(InputError, match="2 columns that could hold the image"):
        load_data(source)
    data = load_data(source, image="back", label="breed")
    assert data.pixels[:, 0, 0, 0].tolist() == list(range(9, -1, -1))
    assert data.classes == ("a0", "a1")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "its first line is empty"),
        ("path,label\n", "and then a line for each image"),
        (rows(3), "a first line that names its columns, each differently, .* is images/0.png, cat"),
        ("path,path\nimages/1.png,0\n", "each differently"),
        ("path,label\nimages/1.png\n", "Line 2 of .* has 1 values for 2 columns"),
        ("path,label\nimages/1.png,0\n\nimages/1.png,0,1\n", "Line 4 of .* has 3 values for 2 columns"),
        ('path,label\n"images/1.png,0\n', "cannot be read as a CSV file"),
        ("path,label\nimages/1.png,\nimages/2.png,0\n", "have no label, the one at place 0"),
        ("path,label\nhttps://a.b/1.png,0\n", "it is an address, not an image"),
        ("path,label\nimages/99.png,0\n", "images/99.png .*No such file.*unreadable=skip"),
        ("path,label\nimages/1.png,1\n,0\n", "row 1 .there is no image"),
        ("path,label\nimages/1,0\n", "columns that could hold the image"),
    ],
)
def test_csv_files_at_fault_end_in_one_sentence(tmp_path, text, says):
    with pytest.raises(InputError, match=says):
        load_data(listed(tmp_path, text, "train.csv"))


def test_a_csv_file_that_is_no_utf8_is_refused(tmp_path):
    (tmp_path / "train.csv").write_bytes("path,label\nä.png,0\n".encode("latin1"))
    with pytest.raises(InputError, match="as a CSV file of UTF-8 text"):
        load_data(str(tmp_path / "train.csv"))


def test_missing_files_of_a_csv_file_are_skipped_and_counted(tmp_path):
    data = load_data(listed(tmp_path, "path,label\nimages/1.png,0\nimages/99.png,0\n", "train.csv"), unreadable="skip")
    assert len(data) == 1
    assert "that cannot be read and are left out: 1 (" in data.notes[0]
