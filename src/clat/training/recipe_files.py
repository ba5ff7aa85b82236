"""Recipe files: where they are, what they hold, and how one overrides another. Does not import torch."""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from clat.errors import InputError
from clat.files import parse_yaml, read_text, shipped
from clat.inputs import check_keys, nearest, shown

RENAMED = {  # keys of a block, and their words, that run folders of an earlier clat hold
    "critical": {
        "momentum": ("optimizer_state", {"drop": "reset"}),
        "learning_rate": ("lr_schedule", dict[str, str]()),
    }
}


def recipe_path(name: str) -> Path:
    """The file of a recipe given by path or by the name of one that ships with clat, e.g. ``clat``.

    Raises:
        InputError: there is none
    """
    with suppress(OSError):  # too long a name, a loop of links, a folder without access
        if Path(name).is_file():
            return Path(name)
    known = shipped("recipes")
    if name in known:
        return known[name]
    names = ", ".join(sorted(known))
    raise InputError(f"There is no recipe {shown(name)}; give a YAML file or one of {names}.{nearest(name, known)}")


def summary(text: str) -> str:
    """The first sentence of the comment that a recipe's file begins with."""
    words = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    return re.split(r"\.\s+(?=[A-Z])", words)[0].removesuffix(".")


def read_recipe(name: str, known: list[str]) -> dict[str, Any]:
    """The keys and values of a recipe given by path or name.

    Args:
        known: the keys that a recipe has; a file never chooses code, data or a folder to write in
    Raises:
        InputError: no such file, no YAML mapping, or a key that a recipe does not have
    """
    path = recipe_path(name)
    content = parse_yaml(read_text(path, "recipe"), path, "recipe")
    if not isinstance(content, dict):
        raise InputError(f"The recipe {shown(str(path))} must hold keys and values, as recipes/clat.yaml does.")
    check_keys(content, known, f"The recipe {shown(str(path))}")
    return renewed(content)


def renewed(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a recipe.yaml that an earlier clat wrote, as they are called now."""
    found = dict(keys)
    if found.get("layout") == "default":
        found["layout"] = "contiguous"
    for block, renamed in RENAMED.items():
        if isinstance(keys.get(block), dict):
            found[block] = {}
            for key, value in keys[block].items():
                name, words = renamed.get(key, (key, {}))
                found[block][name] = words.get(value, value) if isinstance(value, str) else value
    return found


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """One recipe over another: a key of the upper one wins, and blocks of keys are merged."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = laid_over(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return merged
