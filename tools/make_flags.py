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
from clat.objectives import OBJECTIVES
from clat.training.recipe import Recipe
from clat.tuners import TUNERS

TABLE = Path(__file__).parents[1] / "src/clat/cli/flags.json"
METAVARS = {int: "N", float: "NUMBER", int | float: "NUMBER", bool: "true|false", float | str: "NUMBER"}

WORDS = {"objective": list(OBJECTIVES), "tuner": list(TUNERS)}


def table() -> dict[str, Any]:
    """Every command with its summary and arguments, and the settings of a recipe."""
    commands = {
        name: {"summary": (function.__doc__ or "").strip().split("\n")[0], "arguments": arguments(name, function)}
        for name, function in COMMANDS.items()
    }
    return {"commands": commands, "settings": settings(Recipe)}


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


def settings(owner: type, prefix: str = "") -> list[dict[str, Any]]:
    """The keys of a recipe, and after each block of keys the keys in it."""
    described, found = helps(owner), []
    for field in fields(owner):
        annotation = annotations(owner)[field.name]
        block = block_of(annotation)
        text = described[field.name]
        if block is None and field.default is not MISSING:
            text = with_default(text, field.default)
        entry = {"name": prefix + field.name, "help": text, **kind(annotation)}
        if prefix + field.name in WORDS:
            entry["choices"] = WORDS[field.name]
        found += [entry, *(settings(block, f"{field.name}.") if block else [])]
    return found


def with_default(text: str, default: object) -> str:
    """A help text with the default, where that says something and the text does not."""
    words = {"True": "true", "False": "false", "()": "none"}.get(str(default), default)  # not by value: 1 is True
    return text if default is None or "default" in text else f"{text} (default: {words})"


def kind(annotation: Any) -> dict[str, Any]:
    if get_origin(annotation) is Literal:
        words = list(get_args(annotation))
        return {"metavar": f"{{{','.join(words)}}}", "choices": words}
    if block_of(annotation):
        return {"metavar": "{key: value, ...}"}
    plain = next((each for each in get_args(annotation) if type(None) in get_args(annotation)), annotation)
    return {"metavar": METAVARS.get(annotation, METAVARS.get(plain, "TEXT" if plain is str else "LIST"))}


def helps(owner: Any) -> dict[str, str]:
    found = docstring_parser.parse(owner.__doc__ or "").params
    return {entry.arg_name: " ".join((entry.description or "").split()) for entry in found}


def written() -> str:
    return json.dumps(table(), indent=1) + "\n"


if __name__ == "__main__":
    TABLE.write_text(written(), encoding="utf-8")
