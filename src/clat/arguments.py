"""The command line's arguments: each command's parser comes from its function's signature and docstring."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import docstring_parser
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from clat.errors import InputError
from clat.files import parse_yaml, read_text
from clat.recipe import Recipe, recipe_path
from clat.text import plain

Command = Callable[..., int | None]  # returns the exit code, 0 if None

USAGE = {
    "demo": "[--out DIR] [--resume] [--overwrite]",
    "layers": "MODEL_OR_CHECKPOINT --data DATA [--batch 100] [--json FILE] [--key value ...]",
    "train": "RECIPE --model MODEL --data DATA --out RUN [--protocol NAME] [--scale small] [--resume] "
    "[--overwrite] [--key value ...]",
    "finetune": "RECIPE --from CHECKPOINT_OR_RUN --data DATA --out RUN [--model MODEL] [--scale small] [--resume] "
    "[--overwrite] [--key value ...]",
    "evaluate": "CHECKPOINT_OR_RUN --data DATA [--tier quick|standard|full] [--eps 8/255] [--limit N] [--repeats N] "
    "[--json FILE] [--key value ...]",
    "transfer": "NETWORK NETWORK [...] --data DATA [--attack pgd|activation] [--layer NAME] [--json FILE] "
    "[--key value ...]",
    "sweep": "NETWORK [...] --data DATA [--eps 8/255] [--steps 20] [--picture FILE] [--json FILE] [--key value ...]",
    "trust": "CHECKPOINT_OR_RUN --data DATA [--eps 8/255] [--base CHECKPOINT_OR_RUN] [--budget MINUTES] [--json FILE] "
    "[--key value ...]",
    "status": "RUN [--model MODEL] [--json FILE]",
    "import": "FILE --model MODEL --out CHECKPOINT [--classes N] [--mean R,G,B --std R,G,B] [--overwrite]",
}
RECIPE_COMMANDS = ("train", "finetune")
OVERLAYS = {"protocol": ("clat", "rift"), "scale": ("small",)}  # folders in recipes, and what is in them


def parse(arguments: Sequence[str], commands: Mapping[str, Command]) -> tuple[str, dict[str, Any]]:
    """The command's name and the values for its function; a recipe with the flags over it comes as a ``Recipe``.

    Raises:
        InputError, jsonargparse.ArgumentError: arguments that are unknown, missing or of the wrong type
    """
    parser = ArgumentParser(
        prog="clat",
        description="Criticality-Leveraged Adversarial Training: find a network's critical layers, train only these.",
        exit_on_error=False,
        version=f"clat {version('torch-clat')}",
    )
    known = parser.add_subcommands(required=True, dest="command", title="commands", metavar="COMMAND")
    for name, function in commands.items():
        known.add_subcommand(name, _subparser(name, function), help=_summary(function))
    parsed = parser.parse_args(_recipe_as_config(list(arguments)))
    values = parser.instantiate(parsed)[parsed.command].as_dict()
    if parsed.command in RECIPE_COMMANDS:
        for key in ("config", *OVERLAYS):
            values.pop(key)
        values["recipe"] = Recipe(**{key: values.pop(key) for key in Recipe.__dataclass_fields__})
    if "from" in values:
        values["origin"] = values.pop("from")
    return parsed.command, values


def _subparser(name: str, function: Command) -> ArgumentParser:
    parser = ArgumentParser(description=_summary(function), exit_on_error=False, usage=f"clat {name} {USAGE[name]}")
    described = {entry.arg_name: entry.description for entry in docstring_parser.parse(function.__doc__ or "").params}
    parameters = inspect.signature(function).parameters
    added = {"recipe", "origin"} & set(parameters)
    if "origin" in parameters:
        parser.add_argument("--from", required=True, metavar="CHECKPOINT_OR_RUN", help=described["origin"])
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY:
            if key != "recipe":
                several = {"nargs": "+"} if parameter.annotation == list[str] else {}
                parser.add_argument(key, type=str, help=described[key], **several)
                added.add(key)
        elif parameter.default is False:
            parser.add_argument(f"--{key}", action="store_true", help=described[key])
            added.add(key)
    parser.add_function_arguments(function, as_group=False, skip=added)
    if "recipe" in parameters:
        parser.add_argument("--config", action=_RecipeFile, help="the recipe, the same as RECIPE")
        for kind, names in OVERLAYS.items():
            parser.add_argument(f"--{kind}", choices=names, help=f"lay recipes/{kind}/NAME.yaml over the recipe")
        parser.add_class_arguments(Recipe)
    return parser


class _RecipeFile(ActionConfigFile):  # type: ignore[misc]
    """A file that sets a recipe's keys and nothing else: no network, no data, and no place to write to."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        content = parse_yaml(read_text(Path(str(values)), "recipe"), values, "recipe")
        others = {str(key).partition(".")[0] for key in content or ()} - set(Recipe.__dataclass_fields__)
        if others:
            raise InputError(
                f"The recipe {plain(values)} sets {', '.join(map(plain, sorted(others)))}, which is no key of a "
                "recipe; give it in the call."
            )
        super().__call__(parser, cfg, values, option_string)


def _overlays(arguments: list[str]) -> list[str]:
    """``--protocol NAME`` and ``--scale NAME`` as recipes laid over the one named first, in this order."""
    laid: list[str] = []
    for kind in OVERLAYS:
        for place, argument in enumerate(arguments):
            flag, _, name = argument.partition("=")
            if flag == f"--{kind}":
                rest = arguments[place + 1 :]
                if not name and not rest:
                    raise InputError(f"Name a {kind}, for example --{kind} {OVERLAYS[kind][0]}.")
                name, rest = (name, rest) if name else (rest[0], rest[1:])
                laid += ["--config", str(recipe_path(f"{kind}/{name}"))]
                arguments = [*arguments[:place], *rest]
                break
    return [*laid, *arguments]


def _summary(function: Command) -> str:
    return (function.__doc__ or "").strip().split("\n")[0]


def _recipe_as_config(arguments: list[str]) -> list[str]:
    """``train RECIPE ...`` as ``train --config FILE ...``, and dashes inside a flag's name as underscores."""
    spelled = [
        "--" + flag[2:].replace("-", "_") + equals + value if argument.startswith("--") else argument
        for argument in arguments
        for flag, equals, value in [argument.partition("=")]
    ]
    if len(spelled) > 1 and spelled[0] in RECIPE_COMMANDS and not spelled[1].startswith("-"):
        path = recipe_path(spelled[1])
        try:
            content = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"The recipe {path} is not readable YAML: {error}.") from error
        if not isinstance(content, dict):
            raise InputError(f"The recipe {path} must hold keys and values, as recipes/clat.yaml does.")
        return [spelled[0], "--config", str(path), *_overlays(spelled[2:])]
    if spelled[:1] and spelled[0] in RECIPE_COMMANDS and not {"--help", "-h", "--config"} & set(spelled):
        raise InputError(f"Name a recipe first: clat {spelled[0]} RECIPE ..., for example clat {spelled[0]} pgd-at.")
    return spelled


def named(text: str) -> tuple[str, dict[str, Any]]:
    """A name with options after commas: ``rn18,width=16`` is ("rn18", {"width": 16})."""
    name, *options = text.split(",")
    pairs = [option.partition("=") for option in options]
    if not all(key and equals for key, equals, _ in pairs):
        raise InputError(f"Options are written key=value after commas, e.g. rn18,width=16; got {text!r}.")
    return name, {key: yaml.safe_load(value) for key, _, value in pairs}
