"""Checks the entries of a comparison's file."""

from collections.abc import Mapping
from typing import Any

from clat.errors import InputError
from clat.inputs import LARGEST_SEED, named, nearest, shown
from clat.models.spec import WEIGHTS, from_file

NORMALISATIONS = ("none", "data", "imagenet")


def entries_of(content: Any, where: str, required: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping, if it has all required keys, no unknown ones, and values of these types."""
    entries, known = mapping(content, where), {**required, **others}
    for key in required:
        if key not in entries:
            raise InputError(f"{where}: {key} is missing; a file in comparisons/ shows what belongs there.")
    for key, value in entries.items():
        if key not in known:
            raise InputError(f"{where}: {shown(key)} is unknown; choose from {', '.join(known)}.{nearest(key, known)}")
        if not isinstance(value, known[key]) or isinstance(value, bool):
            words: dict[Any, str] = {
                str: "a text",
                dict: "keys and values",
                list: "a list",
                int: "a whole number",
                (int, str): "a whole number, or all",
                (str, list): "a text, or a list of them",
                (dict, list): "keys and values, or a list of them",
            }
            raise InputError(f"{where}: {key} must be {words.get(known[key], 'a number')}; it is {shown(value)}.")
    return entries


def mapping(content: Any, where: str) -> dict[str, Any]:
    """The content, if it holds keys and values."""
    if not isinstance(content, dict):
        raise InputError(f"{where} must hold keys and values.")
    return dict(content)


def whole_list(values: list[Any], what: str) -> tuple[int, ...]:
    """Whole numbers from 0 up, each once."""
    wrong = any(type(value) is not int or not 0 <= value <= LARGEST_SEED for value in values)
    if not values or wrong or len(set(values)) < len(values):
        raise InputError(f"{what} {shown(values)}; list whole numbers from 0 up, each once.")
    return tuple(values)


def check_model(text: str, where: str) -> str:
    """The network that a file names, if a file may name it: data, never code, and no weights from elsewhere.

    Raises:
        InputError: a factory, weights to fetch, or what is no network
    """
    name, options = named(text)
    where = f"{where}: model"
    if ":" in name:
        raise InputError(
            f"{where} is {shown(text)}, which a file may not call; leave it out and give --model {name} on the "
            "command line."
        )
    if set(options) & set(WEIGHTS):
        raise InputError(f"{where} is {shown(text)}; a file may not have weights fetched: give --model instead.")
    if options.pop("normalise", "data") not in NORMALISATIONS:
        raise InputError(f"{where} is {shown(text)}; a file may set normalise to {', '.join(NORMALISATIONS)}.")
    from_file({"name": name, "classes": 2, **options}, where)
    return text
