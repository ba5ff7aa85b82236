"""The facts that a checkpoint holds about its tensors, as JSON: those that clat reads have a known form."""

from collections.abc import Callable
from typing import Any

from clat.errors import InputError
from clat.files import DEEPEST, parse_json
from clat.text import plain


def parse_facts(text: str, path: object) -> dict[str, Any]:
    """The facts in a file's metadata, if they have the form that clat writes.

    Args:
        path: the file, for messages
    Raises:
        InputError: another form
    """
    facts = parse_json(text, path, "checkpoint")
    if not isinstance(facts, dict):
        raise InputError(f"The facts in {plain(path)} are no keys and values; it was not written by clat.")
    if _depth(facts) > DEEPEST:
        raise InputError(f"The facts in {plain(path)} are nested too deep for a checkpoint.")
    for key, (words, fits) in FORMS.items():
        if key in facts and not fits(facts[key]):
            raise InputError(f"{plain(path)} has no usable {key!r} in its facts; it must be {words}.")
    return facts


def _depth(value: Any) -> int:
    """Levels of nesting, without recursion."""
    level, depth = [value], 0
    while level := [
        inner
        for entry in level
        for inner in (entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ())
    ]:
        depth += 1
    return depth


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _counts(value: Any) -> bool:
    return isinstance(value, dict) and _count(value.get("images")) and isinstance(value.get("seed"), int)


def _words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _data(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("source"), str)
        and _words(value.get("classes"))
        and isinstance(value.get("shape"), list)
        and len(value["shape"]) == 3
        and all(map(_count, value["shape"]))
    )


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(entry, (int, float)) and not isinstance(entry, bool) for entry in value.values()
    )


def _adapter(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("base"), str)
        and _words(value.get("tied"))
        and isinstance(value.get("recipe"), dict)
        and isinstance(value.get("selections"), list)
        and all(isinstance(entry, dict) and _words(entry.get("layers")) for entry in value["selections"])
    )


# Each fact that clat reads: its form in words, and as a test.
FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "epoch": ("a whole number", _count),
    "averaged": ("a whole number", _count),
    "holdout": ("whole numbers images and seed", _counts),
    "data": ("source, classes and shape of the training images", _data),
    "selected": ("a list of layers", lambda value: value is None or _words(value)),
    "validation": ("numbers by name", _numbers),
    "end": ("keys and values", lambda value: isinstance(value, dict)),
    "imported": ("keys and values", lambda value: isinstance(value, dict)),
    "adapter": ("base, tied names, recipe and selections", _adapter),
}
