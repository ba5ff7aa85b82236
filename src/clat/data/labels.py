"""Class labels as they come, numbered 0, 1, 2 ..., and lists of class names compared."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from clat.errors import InputError
from clat.network import Labels
from clat.text import plain

MOST_CLASSES = 100_000
UNEVEN = 2  # classes differ much if the largest has more than this many times the images of the smallest
FEW = 10  # and at least this many images more

Classes = int | str | Sequence[str] | None  # how many, "auto", their names, or as found


def numbered(
    values: Sequence[Any], classes: Classes = None, *, source: str, others: Iterable[Any] = ()
) -> tuple[Labels, tuple[str, ...], tuple[str, ...]]:
    """Labels (n,) in 0 ... classes - 1, the names of the classes, and sentences about what was assumed.

    Args:
        values: numbers, texts or truth values, one for each image
        classes: None: numbers must be 0, 1, 2 ... without a gap, and texts are numbered in sorted order; ``auto``:
            numbers are numbered in sorted order too; a number: so many classes, numbered from 0, of which some may have
            no image; names: the classes in their order
        others: labels of the source's other splits, which count when the classes are
    Raises:
        InputError: a missing label, labels of several types, or numbers that leave gaps, with the mapping to use
    """
    values, others = [_simple(value) for value in values], [_simple(value) for value in others]
    if any(value is None for value in values):
        missing = next(i for i, value in enumerate(values) if value is None)
        raise InputError(f"Some images of {source} have no label, the one at place {missing} for example; remove them.")
    found: set[Any] = {value for value in values if isinstance(value, (str, int))}
    if len(types := {type(value) for value in values}) > 1 or not types <= {bool, int, str}:
        raise InputError(
            f"The labels of {source} are of type {', '.join(sorted(kind.__name__ for kind in types))}; give whole "
            "numbers or names, one for each image."
        )
    found |= {value for value in others if type(value) in types and (isinstance(value, str) or value >= 0)}
    names = _names(classes, source)
    if types == {int} and classes != "auto":
        return _as_they_are(values, found, names, source)
    if types == {str} and classes not in (None, "auto"):
        return _by_name(values, found, names, source)
    order = sorted(found, key=int if all(str(value).isdecimal() for value in found) else str)
    number = {value: place for place, value in enumerate(order)}
    names = tuple(str(value) for value in order)
    said = () if types == {int} and names == default(len(names)) else (_mapping(order, source),)
    return torch.tensor([number[value] for value in values], dtype=torch.int64), names, said


def uneven(labels: Labels, names: Sequence[str], source: str) -> tuple[str, ...]:
    """A sentence that names the largest and the smallest class where classes differ much in size, or an only class."""
    if len(names) == 1:
        return (f"All images of {plain(source)} are of one class ({plain(names[0])[:40]}).",)
    counts = labels.bincount(minlength=len(names)).tolist()
    least, most = min(counts), max(counts)
    if most <= UNEVEN * least or most - least < FEW:
        return ()
    smallest, largest = (plain(names[counts.index(count)])[:40] for count in (least, most))
    return (
        f"The classes of {plain(source)} differ in size, from {least:,} images ({smallest}) to {most:,} ({largest}); "
        "balanced accuracy counts every class the same.",
    )


def default(count: int) -> tuple[str, ...]:
    """The names of classes that have none: 0, 1, 2 ..."""
    return tuple(map(str, range(count)))


def shortened(names: Iterable[object], most: int = 6) -> str:
    """A list on one line, safe to print, cut after a few of its entries."""
    shown = [plain(name)[:40] for name in names]
    return ", ".join(shown) if len(shown) <= most else f"{', '.join(shown[: most - 1])}, ... ({len(shown)} in all)"


def _simple(value: Any) -> Any:
    """A number of NumPy, or a float that is whole, as a Python number; NaN as None."""
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return value


def _names(classes: Classes, source: str) -> tuple[str, ...] | None:
    if classes is None or classes == "auto":
        return None
    if isinstance(classes, (bool, str)) or not isinstance(classes, (int, Sequence)):
        raise InputError(f"classes is {classes!r}; give auto, a number of classes or their names.")
    count = classes if isinstance(classes, int) else len(classes)
    if not 1 <= count <= MOST_CLASSES:
        raise InputError(f"classes is {count} for {source}; it must lie between 1 and {MOST_CLASSES:,}.")
    return default(count) if isinstance(classes, int) else tuple(map(str, classes))


def _as_they_are(
    values: list[int], found: set[int], names: tuple[str, ...] | None, source: str
) -> tuple[Labels, tuple[str, ...], tuple[str, ...]]:
    order = sorted(found)
    if names is None and order == list(range(len(order))):
        names = default(len(order))
    if names is None:
        raise InputError(
            f"The labels of {source} are {shortened(order)} and not 0 ... {len(order) - 1}; number them "
            f"{_arrows(order)}, or have it done with classes=auto; if classes are numbered from 0 and some have no "
            "image, say how many there are, e.g. classes=10."
        )
    if order[0] < 0 or order[-1] >= len(names):
        raise InputError(
            f"Labels in {source} run from {order[0]} to {order[-1]}, but must lie in 0...{len(names) - 1}; remove "
            "unlabelled images or number the classes from 0."
        )
    return torch.tensor(values, dtype=torch.int64), names, ()


def _by_name(
    values: list[str], found: set[str], names: tuple[str, ...] | None, source: str
) -> tuple[Labels, tuple[str, ...], tuple[str, ...]]:
    assert names is not None
    unknown = found - set(names)
    if unknown:
        raise InputError(
            f"{source} has the labels {shortened(sorted(unknown))}, which are not among the classes {shortened(names)}."
        )
    return torch.tensor([names.index(value) for value in values], dtype=torch.int64), names, ()


def _arrows(order: Sequence[object]) -> str:
    return shortened(f"{value} -> {place}" for place, value in enumerate(order))


def _mapping(order: Sequence[object], source: str) -> str:
    return f"The classes of {source} are numbered in sorted order: {_arrows(order)}."
