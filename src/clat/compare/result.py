"""A comparison's result.json: every finished unit's entry, and what another machine needs to continue from it."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clat.compare.plan import Comparison
from clat.compare.statistics import unpack
from clat.errors import InputError
from clat.files import read_sealed, write_sealed
from clat.text import plain

Entry = dict[str, Any]
FORM = 1  # of result.json; one of another form is not read


def write_result(path: Path, comparison: Comparison, entries: Iterable[Entry], found: Mapping[str, Any]) -> None:
    """Writes the entries of the finished units, in the comparison's order, and what was ``found`` from them."""
    content = {
        "form": FORM,
        "comparison": comparison.to_json(),
        **found,
        "units": list(entries),
    }
    write_sealed(path, content)


def read_entries(path: Path) -> list[Entry]:
    """The entries in a result.json, or the one in a unit's file; none if there is no such file.

    Raises:
        InputError: it is damaged, or no result of clat's
    """
    if not path.is_file():
        return []
    content = read_sealed(path)
    entries = content.get("units", [content])
    try:
        if content.get("form", FORM) != FORM:
            raise ValueError(f"it has form {content['form']}, and this clat reads {FORM}")
        for entry in entries:
            _check(entry)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{plain(path)} is no result of clat compare's ({plain(error)}); put it back from a copy, or move it away."
        ) from error
    return entries


def _check(entry: Entry) -> None:
    """Raises what a value of another kind raises."""
    str(entry["arm"] + entry["model"] + entry["start"] + entry["data"]["sha256"])
    for key in ("seed", "epochs", "trainable", "parameters", "peak_memory_bytes"):
        _require(type(entry[key]) is int and entry[key] >= 0, key)
    flops = entry.get("flops", 0)  # none in entries of before it was counted
    _require(type(flops) is int and flops >= 0, "flops")
    _require(type(entry["seconds"]) in (int, float) and 0 <= entry["seconds"] < math.inf, "seconds")
    _require(isinstance(entry["recipe"], dict) and isinstance(entry["environment"], dict), "recipe or environment")
    _require(all(isinstance(digest, str) for digest in entry["weights"].values()), "weights")
    for curve in entry["curves"].values():
        _require(all(type(value) in (int, float) for value in curve), "a curve")
    for found in entry["evaluations"]:
        n = found["evaluation"]["images"]
        _require(isinstance(found["images_sha256"], str) and isinstance(found["checkpoint"], str), "an evaluation")
        for key in ("clean", "robust"):
            right = unpack(found[f"{key}_images"])
            _require(len(right) == n and int(right.sum()) == found[key], f"{key} of an evaluation")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{what} is damaged")
