"""The command line's arguments. Typos and gaps are found before torch is imported, with the table flags.json.

``tools/make_flags.py`` makes the table from the commands' signatures and docstrings; a test says when it is stale.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from clat.cli.completion import SCRIPTS, offered
from clat.errors import InputError
from clat.files import parse_yaml
from clat.inputs import annotations, block_of, check_word, entry_of, fit, from_text, nearest, shown
from clat.training.recipe_files import laid_over, read_recipe

Command = Callable[..., int | None]  # returns the exit code, 0 if None

USAGE = {
    "demo": "[--out DIR] [--resume] [--overwrite]",
    "layers": "MODEL_OR_CHECKPOINT --data DATA [--batch 100] [--json FILE] [--key value ...]",
    "train": "RECIPE --model MODEL --data DATA --out RUN [--protocol NAME] [--scale small] [--resume] "
    "[--overwrite] [--key value ...]",
    "finetune": "RECIPE --from CHECKPOINT_OR_RUN --data DATA --out RUN [--model MODEL] [--scale small] [--resume] "
    "[--overwrite] [--key value ...]",
    "evaluate": "CHECKPOINT_OR_RUN --data DATA [--tier quick|standard|full|blackbox] [--eps 8/255] [--limit N] "
    "[--repeats N] [--json FILE] [--key value ...]",
    "transfer": "NETWORK NETWORK [...] --data DATA [--attack pgd|activation] [--layer NAME] [--json FILE] "
    "[--key value ...]",
    "sweep": "NETWORK [...] --data DATA [--eps 8/255] [--steps 20] [--picture FILE] [--json FILE] [--key value ...]",
    "trust": "CHECKPOINT_OR_RUN --data DATA [--eps 8/255] [--base CHECKPOINT_OR_RUN] [--budget MINUTES] [--json FILE] "
    "[--key value ...]",
    "compare": "FILE_OR_NAME --data DATA --out DIR [--scale small] [--seeds 0 1 2] [--only ARM ...] [--jobs N] "
    "[--model MODEL] [--dry-run]",
    "report": "RUN_OR_COMPARISON [...] --out page.html|card.md [--data DATA] [--base RUN] "
    "[--limit N] [--key value ...]",
    "list": "[--json FILE]",
    "status": "RUN [--model MODEL] [--json FILE]",
    "import": "FILE --model MODEL --out CHECKPOINT [--classes N] [--mean R,G,B --std R,G,B] [--overwrite]",
    "adapter save": "RUN --out FILE [--overwrite]",
    "adapter apply": "BASE ADAPTER --out CHECKPOINT [--model MODEL] [--overwrite]",
    "export": "CHECKPOINT_OR_RUN --to FILE.safetensors|FILE.onnx [--model MODEL] [--size N] [--overwrite]",
}
RECIPE_COMMANDS = ("train", "finetune")
OVERLAYS = {"protocol": ("clat", "rift"), "scale": ("small",)}  # folders in recipes, and what is in them


@dataclass(frozen=True)
class Given:
    """A command, the texts of its arguments, and recipes, each overriding those before it."""

    command: str
    texts: Mapping[str, Any]  # a text, a list of texts, or True for a switch
    recipes: tuple[Mapping[str, Any], ...] = ()


@cache
def table() -> dict[str, Any]:
    """The ``commands`` by name, each with its ``summary`` and ``arguments``, and the ``settings`` of a recipe."""
    return json.loads((Path(__file__).parent / "flags.json").read_text(encoding="utf-8"))


def parse(arguments: Sequence[str], commands: Mapping[str, Command]) -> tuple[str, dict[str, Any]]:
    """The command's name and the values for its function; a recipe with the flags over it comes as a ``Recipe``.

    Raises:
        InputError: arguments that are unknown, missing or of the wrong type
    """
    given = read(arguments)
    return given.command, values(given, commands[given.command])


def read(arguments: Sequence[str]) -> Given:
    """Checks the command's name, its flags' names, words and required arguments, and reads the recipe's file.

    Prints help or the version and exits where these are asked for.

    Raises:
        InputError: an argument that is unknown or missing, or no such recipe
    """
    name, rest = _command(list(arguments))
    rest = [_underscored(argument) for argument in rest]
    recipes: tuple[Mapping[str, Any], ...] = ()
    if name in RECIPE_COMMANDS:
        named, rest = _recipes(name, rest)
        keys = [entry["name"] for entry in table()["settings"] if "." not in entry["name"]]
        recipes = tuple(read_recipe(recipe, keys) for recipe in named)
    known = {entry["name"]: entry for entry in _entries(name)}
    flags = [f"--{key}" for key, entry in known.items() if not entry.get("positional")]
    for argument in rest:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag not in (*flags, "--help", "--"):
            raise InputError(f"clat {name} has no flag {shown(flag)}.{nearest(flag, flags)}")
    texts, extra = _parser(name).parse_known_args(rest)
    if extra:
        raise InputError(f"clat {name} takes no argument {shown(extra[0])}; its usage is clat {name} {USAGE[name]}.")
    for key, text in vars(texts).items():
        if "choices" in known[key]:
            check_word(key, text, known[key]["choices"])
    return Given(name, vars(texts), recipes)


def values(given: Given, function: Command) -> dict[str, Any]:
    """The values for a command's function, of the types that it is annotated with.

    Raises:
        InputError: a value that does not fit
    """
    from clat.training.recipe import Recipe, recipe_keys

    texts = dict(given.texts)
    if "from" in texts:
        texts["origin"] = texts.pop("from")
    found: dict[str, Any] = {}
    for key, annotation in annotations(function).items():
        if key in texts:
            found[key] = fit(key, _value(texts.pop(key), annotation), annotation)
    if given.command in RECIPE_COMMANDS:
        keys: dict[str, Any] = {}
        for recipe in given.recipes:
            keys = laid_over(keys, recipe)
        for key in sorted(texts, key=lambda key: "." in key):  # a block, then keys in it
            outer, _, inner = key.partition(".")
            annotation = recipe_keys()[outer]
            if inner:
                value = _value(texts[key], annotations(block_of(annotation))[inner])
                under = keys.get(outer)
                keys[outer] = {**(under if isinstance(under, Mapping) else {}), inner: value}
            else:
                keys = laid_over(keys, {key: _value(texts[key], annotation)})
        found["recipe"] = Recipe.from_keys(keys)
    return found


def _value(text: Any, annotation: Any) -> Any:
    if isinstance(text, list):
        return [_value(each, entry_of(annotation)) for each in text]
    return from_text(text, annotation, lambda text: parse_yaml(text, "A value")) if isinstance(text, str) else text


def _command(arguments: list[str]) -> tuple[str, list[str]]:
    """The command's name, and the rest."""
    first = arguments[0] if arguments else ""
    if first in ("--help", "-h"):
        print(_overview(), end="")
        sys.exit(0)
    if first == "--version":
        from importlib.metadata import version

        print(f"clat {version('torch-clat')}")
        sys.exit(0)
    if first == "--completion":
        check_word("--completion", "".join(arguments[1:2]), SCRIPTS)
        print(SCRIPTS[arguments[1]], end="")
        sys.exit(0)
    if first == "--complete":  # the scripts call this
        print(*offered(arguments[1:], table(), RECIPE_COMMANDS), sep="\n")
        sys.exit(0)
    known = table()["commands"]
    if not first:
        raise InputError(f"Name a command: clat COMMAND ..., where COMMAND is one of {', '.join(known)}.")
    if " ".join(arguments[:2]) in known:  # a command of two words
        return " ".join(arguments[:2]), arguments[2:]
    if first not in known:
        names = ", ".join(known)
        raise InputError(f"There is no command {shown(first)}; choose one of {names}.{nearest(first, known)}")
    return first, arguments[1:]


def _underscored(argument: str) -> str:
    """A flag with dashes inside its name as underscores; anything else as it is."""
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value if argument.startswith("--") else argument


def _recipes(name: str, arguments: list[str]) -> tuple[list[str], list[str]]:
    """The recipes named, lower ones first (RECIPE, --config FILE, --protocol NAME, --scale NAME), and the rest."""
    if {"--help", "-h"} & set(arguments):
        return [], arguments
    recipes: list[str] = []
    if arguments and not arguments[0].startswith("-"):
        recipes, arguments = [arguments[0]], arguments[1:]
    for kind in ("config", *OVERLAYS):
        for place, argument in enumerate(arguments):
            flag, _, named = argument.partition("=")
            if flag == f"--{kind}":
                rest = arguments[place + 1 :]
                if not named and not rest:
                    example = f"{kind} {OVERLAYS[kind][0]}" if kind in OVERLAYS else "config FILE"
                    raise InputError(f"Name a {kind}, for example --{example}.")
                named, rest = (named, rest) if named else (rest[0], rest[1:])
                if not recipes and kind != "config":
                    break
                recipes.append(named if kind == "config" else f"{kind}/{named}")
                arguments = [*arguments[:place], *rest]
                break
    if not recipes:
        raise InputError(f"Name a recipe first: clat {name} RECIPE ..., for example clat {name} pgd-at.")
    return recipes, arguments


def _entries(name: str) -> list[dict[str, Any]]:
    return [*table()["commands"][name]["arguments"], *_settings(name)]


def _settings(name: str) -> list[dict[str, Any]]:
    return table()["settings"] if name in RECIPE_COMMANDS else []


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        message = message.replace("the following arguments are required:", "it needs", 1)
        raise InputError(f"{self.prog}: {message}; its usage is {self.usage}.")


@cache
def _parser(name: str) -> _Parser:
    """Parses every argument as text. Arguments that were not given are left out."""
    described, settings = table()["commands"][name], _settings(name)
    parser = _Parser(
        prog=f"clat {name}", usage=f"clat {name} {USAGE[name]}", description=described["summary"], allow_abbrev=False
    )
    of_recipe = parser.add_argument_group("recipe", "Every setting of a run.") if settings else parser
    for group, entries in ((parser, described["arguments"]), (of_recipe, settings)):
        for entry in entries:
            options: dict[str, Any] = {"help": entry["help"].replace("%", "%%"), "default": argparse.SUPPRESS}
            if entry.get("many"):
                options["nargs"] = "+"
            if entry.get("positional"):
                del options["default"]
            elif entry.get("switch"):
                options["action"] = "store_true"
            else:
                options.update(metavar=entry["metavar"], required=entry.get("required", False))
            group.add_argument(entry["name"] if entry.get("positional") else f"--{entry['name']}", **options)
    return parser


def _overview() -> str:
    known = table()["commands"]
    width = max(map(len, known)) + 2
    lines = [f"  {name:{width}}{entry['summary']}" for name, entry in known.items()]
    return (
        "usage: clat COMMAND ...\n\n"
        "Criticality-Leveraged Adversarial Training: find a network's critical layers, train only these.\n\n"
        "commands:\n" + "\n".join(lines) + "\n\noptions:\n"
        "  --help        this text; clat COMMAND --help lists a command's flags\n"
        "  --version     the version\n"
        "  --debug       show where in the code an error arose\n"
        '  --completion  a script that completes commands in bash or zsh: eval "$(clat --completion bash)"\n'
    )
