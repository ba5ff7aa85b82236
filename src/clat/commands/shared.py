"""What the commands share: networks and data by name, and where their output goes."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from clat.arguments import named
from clat.checkpoint import load_checkpoint
from clat.data import Dataset, load_data
from clat.errors import InputError
from clat.evaluate import best_device, find_device
from clat.files import write_text
from clat.models import build_model
from clat.text import plain
from clat.threat import fraction

_first = os.environ.get("RANK", "0") == "0"  # of the processes that accelerate launch or torchrun started
# Names come from files and folders: nothing in them is markup.
console = Console(quiet=not _first, width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)


def is_beside_the_first() -> bool:
    """Whether a launcher started this process beside the first one, which alone evaluates; if so, says it."""
    if not _first:
        print(f"clat: process {os.environ['RANK']} ends; evaluations run in the first one alone.", file=sys.stderr)
    return not _first


def device_named(text: str | None) -> torch.device:
    """The device of ``--device``: cpu, cuda, cuda:1 or mps; the fastest kind of device here if it is not given.

    Raises:
        InputError: another name, or no such device here
    """
    device = find_device(text or best_device())
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"{device} is no device that clat runs on; choose cpu, cuda, cuda:1 or mps.")
    return device


def assumed(device: torch.device, precision: str, data: Dataset) -> str:
    """What a command takes for granted, on one line."""
    names = ", ".join(data.classes[:3]) + (", ..." if len(data.classes) > 3 else "")
    return plain(f"Device {device}, precision {precision}, split {data.split}, {len(data.classes)} classes ({names})")


def network_named(name: str, data: Dataset) -> nn.Module:
    """The network in a checkpoint or run folder, or a new one by name that fits the data."""
    if Path(name).exists():
        return load_checkpoint(name)[0]
    kind, options = model_options(name)
    mean, std = data.statistics()
    return build_model(kind, len(data.classes), channels=data.shape[0], mean=mean, std=std, **options)


def data_named(text: str, split: str) -> Dataset:
    """A split of the data named with its options after commas, e.g. ``photos,size=64``."""
    source, options = named(text)
    try:
        return load_data(source, split, **options)
    except TypeError as error:
        raise InputError(f"Data options are size, image and label; got {text!r}.") from error


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
