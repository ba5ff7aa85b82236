"""Recipes as keys and values: the whole recipe of a run, and where two differ."""

from collections.abc import Mapping
from typing import Any

from clat.threat import Threat
from clat.training.recipe import Recipe

SETTLED = ("precision", "layout")  # what auto became is in the run's own recipe


def resolved(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of a recipe, defaults among them. Raises InputError if the keys make no recipe."""
    return Recipe.from_keys(keys).keys()


def differing(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """The keys that two recipes differ in, with dots; what is auto in the first may be either in the other."""
    first, second = _flat(resolved(wanted)), _flat(resolved(found))
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    return [key for key in keys if not (key in SETTLED and first.get(key) == "auto")]


def validated_by(recipe: Mapping[str, Any]) -> Threat:
    """The attack that a run's held-out images were under; its objective and tuner may be classes that clat has not."""
    keys = ("threat", "validation_steps", "validation_eps", "validation_step")
    return Recipe.from_keys({key: recipe[key] for key in keys if key in recipe}).validation_threat


def _flat(keys: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in keys.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found
