"""Layers by the names that a user gives."""

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from fnmatch import fnmatchcase

from torch import nn

from clat.errors import InputError
from clat.inputs import nearest
from clat.layers import find_layers
from clat.network import Images
from clat.text import plain

WRAPPER = "network."  # begins the names of all layers of a network that ``build_model`` made


def named_layers(model: nn.Module, x: Images, names: Sequence[str]) -> dict[str, nn.Module]:
    """The layers of these names that run on images x; ``network.``, which ``build_model`` puts first, may be left out.

    Raises:
        InputError: the network has no such layer
    """
    known = find_layers(model, x[:1])
    full = {name: name if name in known else f"{WRAPPER}{name}" for name in names}
    for name in names:
        if full[name] not in known:
            listed = [plain(layer.removeprefix(WRAPPER)) for layer in known]
            raise InputError(
                f"The network has no layer {plain(name)!r}; clat layers lists them: {', '.join(listed)}."
                f"{nearest(name, listed)}"
            )
    return {full[name]: known[full[name]] for name in names}


def allowed(names: Iterable[str], include: Sequence[str], exclude: Sequence[str]) -> set[str]:
    """The layers that may be selected: those that a pattern of ``include`` matches, or all, without ``exclude``'s.

    Raises:
        InputError: a pattern that matches no layer
    """
    every = set(names)
    left = matching(include, every, "critical.include") if include else every
    return left - matching(exclude, every, "critical.exclude")


def matching(patterns: Sequence[str], names: Iterable[str], key: str) -> set[str]:
    """The layers whose names match a pattern, ``*`` being anything, as in ``*.se.*``; ``network.`` may be left out.

    Args:
        key: where the patterns stand, for messages
    Raises:
        InputError: a pattern that matches no layer, with the names near it
    """
    short = {name.removeprefix(WRAPPER): name for name in names}
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for bare, name in short.items() if fnmatchcase(bare, pattern) or fnmatchcase(name, pattern)}
        if not matched:
            near = sorted(short, key=lambda bare: -_likeness(pattern, bare))[:3]
            raise InputError(
                f"{key} has {plain(pattern)!r}, which matches no layer of the network; near it are "
                f"{', '.join(map(plain, near))}."
            )
        found |= matched
    return found


def _likeness(pattern: str, name: str) -> float:
    """How much a layer's name is like a pattern's longest piece without wildcards, from 0 to 1."""
    piece = max(re.split(r"[*?.\[\]]+", pattern), key=len)
    return max(SequenceMatcher(None, piece, part).ratio() for part in name.split("."))
