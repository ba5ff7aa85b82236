"""Makes src/clat/cli/flags.json, the table of the command line, from the commands' signatures and docstrings.

Run it after a change to a command's or a recipe's keys: .venv/bin/python tools/make_flags.py
"""

import inspect
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import docstring_parser

from clat.cli.arguments import OVERLAYS, RECIPE_COMMANDS, Command
from clat.cli.commands import COMMANDS
from clat.inputs import annotations, block_of, entry_of
from clat.training.recipe import METHODS, Recipe, recipe_keys

TABLE = Path(__file__).parents[1] / "src/clat/cli/flags.json"
METAVARS = {int: "N", float: "NUMBER", int | float: "NUMBER", bool: "true|false", float | str: "NUMBER"}

KINDS = {name.replace("-", "_"): f"{kind} {name}" for kind, known in METHODS.items() for name in known}  # of a block


def table() -> dict[str, Any]:
    """Every command with its summary and arguments, and the settings of a recipe."""
    commands = {
        name: {"summary": (function.__doc__ or "").strip().split("\n")[0], "arguments": arguments(name, function)}
        for name, function in COMMANDS.items()
    }
    return {"commands": commands, "settings": settings()}


def arguments(name: str, function: Command) -> list[dict[str, Any]]:
    described, hints = helps(function), annotations(function)
    found: list[dict[str, Any]] = []
    for key, parameter in inspect.signature(function).parameters.items():
        required = parameter.default is parameter.empty
        flag = "from" if key == "origin" else key
        if key == "recipe":
            continue
        if required and parameter.kind is not parameter.KEYWORD_ONLY:
            many = {"many": True} if get_origin(hints[key]) is list else {}
            found.append({"name": flag, "positional": True, "help": described[key], **many})
        elif parameter.default is False:
            found.append({"name": flag, "switch": True, "help": described[key]})
        else:
            must = {"required": True} if required else {}
            text = described[key] if required else with_default(described[key], parameter.default)
            many = {"many": True} if entry_of(hints[key]) is not hints[key] else {}
            found.append({"name": flag, "help": text, **kind(entry_of(hints[key])), **must, **many})
    if name in RECIPE_COMMANDS:
        found.append({"name": "config", "help": "the recipe, the same as RECIPE", "metavar": "FILE"})
        for over, names in OVERLAYS.items():
            text = f"lay recipes/{over}/NAME.yaml over the recipe"
            found.append({"name": over, "help": text, "metavar": f"{{{','.join(names)}}}"})
    return found


def settings() -> list[dict[str, Any]]:
    """The keys of a recipe, and after each block of keys the keys in it."""
    described, defaults, found = helps(Recipe), Recipe().keys(), list[dict[str, Any]]()
    for name, annotation in recipe_keys().items():
        block = block_of(annotation)
        text = described.get(name) or f"keys of the {KINDS[name]}"
        entry = {"name": name, "help": text if block else with_default(text, defaults[name]), **kind(annotation)}
        if name in METHODS:
            entry["choices"] = list(METHODS[name])
        found += [entry, *(block_settings(block, f"{name}.") if block else [])]
    return found


def block_settings(owner: type, prefix: str) -> list[dict[str, Any]]:
    described, found = helps(owner), []
    for field in fields(owner):
        text = described[field.name]
        text = text if field.default is MISSING else with_default(text, field.default)
        found.append({"name": prefix + field.name, "help": text, **kind(annotations(owner)[field.name])})
    return found


def with_default(text: str, default: object) -> str:
    """A help text with the default, where that says something and the text does not."""
    words = {"True": "true", "False": "false", "()": "none", "[]": "none"}.get(str(default), default)  # 1 is True
    return text if default is None or "default" in text else f"{text} (default: {words})"


def kind(annotation: Any) -> dict[str, Any]:
    if get_origin(annotation) is Literal:
        words = list(get_args(annotation))
        return {"metavar": f"{{{','.join(words)}}}", "choices": words}
    if block_of(annotation):
        return {"metavar": "{key: value, ...}"}
    words = [word for each in get_args(annotation) if get_origin(each) is Literal for word in get_args(each)]
    if words and bool in get_args(annotation):
        return {"metavar": "|".join(["true", "false", *words])}
    plain = next((each for each in get_args(annotation) if type(None) in get_args(annotation)), annotation)
    return {"metavar": METAVARS.get(annotation, METAVARS.get(plain, "TEXT" if plain is str else "LIST"))}


def helps(owner: Any) -> dict[str, str]:
    found = docstring_parser.parse(owner.__doc__ or "").params
    return {entry.arg_name: " ".join((entry.description or "").split()) for entry in found}


def written() -> str:
    return json.dumps(table(), indent=1) + "\n"


if __name__ == "__main__":
    TABLE.write_text(written(), encoding="utf-8")
