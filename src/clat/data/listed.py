"""Tables of image files: CSV files that list them, and what tells one table from another."""

import csv
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import PIL.Image

from clat.data.labels import shortened
from clat.errors import InputError
from clat.text import plain

SEPARATORS = ",;\t"

_WHOLE = re.compile(r"[-+]?\d{1,18}")


def read_csv(path: Path) -> Any:
    """The rows of a CSV file as a ``datasets`` table, in which columns of paths are image files.

    The first line names the columns. They are separated by commas, semicolons or tabs, whichever this line has most of.
    A column holds paths if its first value ends as an image file does; paths are relative to the file's folder. A
    column whose values are all whole numbers holds numbers, any other texts.

    Raises:
        InputError: no UTF-8 text, no line that names the columns, no other line, or a line of another length
    """
    import datasets

    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            separator = max(SEPARATORS, key=file.readline().count)
            file.seek(0)
            reader = csv.reader(file, delimiter=separator, strict=True)
            lines = [(reader.line_num, row) for row in reader if row]
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise InputError(f"{plain(path)} cannot be read as a CSV file of UTF-8 text ({plain(error)}).") from error
    names = lines[0][1] if lines else []
    if len(lines) < 2 or len(set(names)) < len(names) or any(map(names_image, names)):
        raise InputError(
            f"{plain(path)} must have a first line that names its columns, each differently, and then a line for each "
            f"image; its first line is {shortened(names) or 'empty'}."
        )
    for number, row in lines:
        if len(row) != len(names):
            raise InputError(f"Line {number} of {plain(path)} has {len(row)} values for {len(names)} columns; mend it.")
    columns, features, sizes = dict[str, Any](), dict[str, Any](), list[int]()
    for place, name in enumerate(names):
        values = [row[place] or None for _, row in lines[1:]]
        given = [value for value in values if value is not None]
        if given and names_image(given[0]):
            columns[name], features[name] = [_beside(path, value) for value in values], datasets.Image(decode=False)
            sizes += [size_of(Path(each)) for each in columns[name] if each is not None]
        elif given and all(map(_WHOLE.fullmatch, given)):
            columns[name] = [None if value is None else int(value) for value in values]
            features[name] = datasets.Value("int64")
        else:
            columns[name], features[name] = values, datasets.Value("string")
    table = datasets.Dataset.from_dict(columns, datasets.Features(features))
    return fingerprinted(table, f"{hashlib.sha256(path.read_bytes()).hexdigest()} {sizes}")


def fingerprinted(table: Any, content: str) -> Any:
    """The table with a fingerprint of this content, in place of one that depends on where its files are."""
    import datasets

    return datasets.Dataset(table.data, fingerprint=hashlib.sha256(content.encode(errors="replace")).hexdigest()[:16])


def size_of(path: Path) -> int:
    """Bytes of a file; -1 if there is none."""
    return path.stat().st_size if path.exists() else -1


def names_image(name: object) -> bool:
    """Whether a file's name ends as those of images do."""
    return isinstance(name, str) and Path(name).suffix.lower() in _endings()


@cache
def _endings() -> frozenset[str]:
    return frozenset(ending for ending, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN)


def _beside(table: Path, name: str | None) -> str | None:
    """A path in a table, relative to the table's folder; an address stays one, which is refused where it is read."""
    return name if name is None or "://" in name else str(table.parent / name)
