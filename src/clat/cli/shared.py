"""Shared by the commands: networks and data by name, and where output goes."""

import json
import os
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from clat.checkpoint import checkpoint_path, is_checkpoint, load_checkpoint, load_header
from clat.compute import best_device, find_device
from clat.data.dataset import Dataset, trained_on
from clat.data.loading import OPTIONS, load_data
from clat.errors import InputError
from clat.files import write_text
from clat.inputs import fraction, named
from clat.models import MODELS, Normalized, bridge, build_model, known_names, takes_statistics
from clat.models.importing import import_weights
from clat.text import plain

_first = os.environ.get("RANK", "0") == "0"  # of the processes that accelerate launch or torchrun started
# Names come from files and folders: nothing in them is markup.
console = Console(quiet=not _first, width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)
notices = Console(quiet=not _first, stderr=True, markup=False, emoji=False)


def is_beside_the_first() -> bool:
    """Whether this is not the launcher's first process, the only one that evaluates; if so, prints a notice."""
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


def network_named(name: str, data: Dataset, model: str | None = None) -> nn.Module:
    """The network in a checkpoint or run folder, or a new one by name that fits the data.

    Args:
        model: as in ``checkpoint_named``; then ``name`` is a file
    """
    if model is not None or (exists(name) and not name.endswith(".py")):
        return checkpoint_named(name, model, data)[0]
    kind, options = model_options(name)
    if kind not in MODELS and ":" not in kind and bridge(kind) is None:
        raise InputError(
            f"There is no model {plain(name)!r}, and no checkpoint or run folder there; choose one of {known_names()}."
        )
    return _new(kind, options, len(data.classes), data.shape[0], data)


def pretrained_named(name: str, data: Dataset, *, partial: bool) -> nn.Module:
    """A network by name whose weights were trained elsewhere, which fits the data.

    Args:
        partial: only some of its layers will train
    Raises:
        InputError: no such network, one with random weights, or a new head that would stay random
    """
    network = network_named(name, data)
    kind, options = model_options(name)
    if ":" not in kind and not options.get("pretrained"):
        hint = "" if kind in MODELS else f"add pretrained=true ({plain(name)},pretrained=true), or "
        raise InputError(
            f"{plain(name)} has random weights and nothing to fine-tune; {hint}train it first by clat train."
        )
    if partial and isinstance(network, Normalized) and network.new_head:
        raise InputError(
            f"{plain(name)} has a new head, which stays random if only other layers train; first train the whole, e.g. "
            f"clat train clean --model {plain(name)}, and fine-tune from that run."
        )
    return network


def checkpoint_named(
    name: str, model: str | None = None, data: Dataset | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The network in a checkpoint or run folder, and the facts stored with it.

    Args:
        model: the network that the weights belong to, with its options after commas, where the file may not choose it
            (a factory made it) or does not say (a checkpoint of others', which is read as ``clat import`` does)
        data: says how many classes and channels there are where the file does not
    Raises:
        InputError: no checkpoint, or weights that do not fit the network
    """
    if model is None:
        return load_checkpoint(name)
    kind, options = model_options(model)
    path = checkpoint_path(name)
    if not is_checkpoint(path):
        return import_weights(path, kind, classes=len(data.classes) if data else None, **options).model, {}
    header = load_header(path)
    made, seen = header.facts.get("model") or {}, header.facts.get("data") or {}
    if made and "normalise" in options:
        raise InputError(f"{plain(path)} holds the normalisation it was trained with; leave normalise out of --model.")
    classes = made.get("classes") or len(seen.get("classes", ())) or (len(data.classes) if data else 0)
    channels = made.get("channels") or (seen.get("shape") or (data.shape if data else [3]))[0]
    if not classes:
        raise InputError(f"{plain(path)} does not say how many classes its network has; load it in Python.")
    if made:
        options["normalise"] = "none"  # until the weights bring theirs
    return load_checkpoint(path, _new(kind, options, classes, channels, data))


def exists(path: str) -> bool:
    """Whether there is a file or folder of that name."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, or not to be looked into
        return False


def _new(kind: str, options: dict[str, Any], classes: int, channels: int, data: Dataset | None) -> Normalized:
    """A new network. Says what became of the head of a pretrained one."""
    if data is not None and takes_statistics(kind, options):
        mean, std = data.statistics()
        options = {**options, "mean": mean, "std": std, "normalise": "data"}
    model = build_model(kind, classes, channels=channels, **options)
    _notice(model.notes)
    return model


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
    if not exists(network):
        return {}
    path = checkpoint_path(network)
    return load_header(path).facts if is_checkpoint(path) else {}


@contextmanager
def sentences_for_warnings() -> Iterator[None]:
    """Inside the block what clat warns of is printed once, as a sentence, without the place in the code."""
    home, said, others = str(Path(__file__).parents[1]), set[str](), warnings.showwarning

    def show(message: Any, category: Any, filename: str, *more: Any, **named: Any) -> None:
        if not filename.startswith(home):
            others(message, category, filename, *more, **named)
        elif str(message) not in said:
            said.add(str(message))
            _notice([f"Warning: {message}"])

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _notice(sentences: Iterable[str]) -> None:
    """On standard error, so that a result on standard output stays whole."""
    for sentence in sentences:
        notices.print(plain(sentence), markup=False, highlight=False, soft_wrap=True)


def model_options(text: str) -> tuple[str, dict[str, Any]]:
    """A network's name and options; what comes from the data or the checkpoint is refused, such as classes."""
    name, options = named(text)
    for key in ("name", "path", "classes", "channels", "mean", "std"):
        if key in options:
            raise InputError(f"{key} is no option of a network; leave it out of {text!r}.")
    return name, options


def numbers(text: str | None) -> list[float] | None:
    """The numbers in a list with commas."""
    return None if text is None else [fraction(number) for number in text.split(",")]


def say_page(talk: Console, sources: Iterable[str]) -> None:
    """Says which command draws a page of what was found."""
    talk.print(plain(f"To look at: clat report {shlex.join(sources)} --out page.html"), highlight=False, soft_wrap=True)


def write_json(path: str, content: Any) -> None:
    """Writes to a file, or to standard output if the path is -."""
    text = json.dumps(content, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        write_text(Path(path), text)
