"""What the commands share: networks and data by name, and where their output goes."""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from clat.arguments import named
from clat.checkpoint import load_checkpoint
from clat.data import OPTIONS, Dataset, load_data, trained_on
from clat.errors import InputError
from clat.files import write_text
from clat.models import build_model
from clat.text import plain
from clat.threat import fraction

_first = os.environ.get("RANK", "0") == "0"  # of the processes that accelerate launch or torchrun started
console = Console(quiet=not _first, width=None if sys.stdout.isatty() else 120)
notices = Console(quiet=not _first, stderr=True)


def network_named(name: str, data: Dataset) -> nn.Module:
    """The network in a checkpoint or run folder, or a new one by name that fits the data."""
    if Path(name).exists():
        return load_checkpoint(name)[0]
    kind, options = model_options(name)
    mean, std = data.statistics()
    return build_model(kind, len(data.classes), channels=data.shape[0], mean=mean, std=std, **options)


def data_named(text: str, split: str) -> Dataset:
    """A split of the data named with its options after commas, e.g. ``photos,size=64``. Says what was assumed."""
    source, options = named(text)
    if unknown := [key for key in options if key not in OPTIONS]:
        raise InputError(f"Data options are {', '.join(OPTIONS)}; got {plain(', '.join(unknown))} in {plain(text)!r}.")
    data = load_data(source, split, **options)
    _notice(data.notes)
    return data


def fitting(data: Dataset, facts: Mapping[str, Any], network: str, *, unseen: bool = True) -> Dataset:
    """The data with its classes in the order of those that a checkpoint's network was trained on. Says what it did.

    Args:
        facts: what is stored with the checkpoint
        network: its name, for the sentences
        unseen: warn if the network was trained on these images
    Raises:
        InputError: other classes
    """
    known = trained_on(facts)
    matched = data.with_classes(known.get("classes", data.classes), network)
    _notice(matched.notes[len(data.notes) :])
    if unseen and (share := matched.share_seen(known)) > 0:
        which = (
            "These are images"
            if share == 1
            else f"About {max(1, round(100 * share))} % of these images are among those"
        )
        _notice([f"Warning: {which} that {plain(network)} was trained on; what is measured on them is no test."])
    return matched


def stored_facts(network: str) -> dict[str, Any]:
    """The facts stored with the checkpoint or run of that name; none if it is the name of a new network."""
    return load_checkpoint(network)[1] if Path(network).exists() else {}


def _notice(sentences: Iterable[str]) -> None:
    """On standard error, so that a result on standard output stays whole."""
    for sentence in sentences:
        notices.print(plain(sentence), markup=False, highlight=False, soft_wrap=True)


def model_options(text: str) -> tuple[str, dict[str, Any]]:
    """A network's name and options, which leave what the data or the checkpoint decides to these."""
    name, options = named(text)
    for key in ("name", "path", "classes", "channels", "mean", "std"):
        if key in options:
            raise InputError(f"{key} is no option of a network; leave it out of {text!r}.")
    return name, options


def numbers(text: str | None) -> list[float] | None:
    """The numbers in a list with commas."""
    return None if text is None else [fraction(number) for number in text.split(",")]


def write_json(path: str, content: Any) -> None:
    """Writes to a file, or to standard output if the path is -."""
    text = json.dumps(content, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        write_text(Path(path), text)
