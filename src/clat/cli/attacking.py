"""Shared by the commands that attack: networks and images that fit, lines about a measurement, records, a bar."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import rich.progress
import torch
from rich.console import Console
from torch import nn

from clat.checkpoint import checkpoint_path
from clat.cli.shared import console, data_named, device_named, fitting, network_named, stored_facts
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.evaluation.evaluate import Progress
from clat.evaluation.fits import check_all_fit
from clat.evaluation.measured import Measured
from clat.models import normalisation_of
from clat.text import plain
from clat.training.runs import Run


@dataclass(frozen=True)
class Opened:
    """The networks that a command names, on the device, and all images of the split."""

    models: dict[str, nn.Module]
    data: Dataset
    place: torch.device


def opened(
    networks: Sequence[str], data: str, split: str, model: str | None, device: str | None, *, base: str | None = None
) -> Opened:
    """The networks by the names given, and the images with their classes in the order that the networks know them in.

    Args:
        base: one more network, which may be among the others
    Raises:
        InputError: a network named twice, networks that order the classes differently, or that do not fit the images
    """
    place = device_named(device)
    dataset = _fitted(data_named(data, split), [*networks, *([base] if base else [])])
    if len(set(networks)) < len(networks):
        raise InputError("A network is named twice; name each once.")
    models = {name: network_named(name, dataset, model).to(place) for name in networks}
    check_all_fit(models, dataset, place, warn=False)  # what attacks them warns
    return Opened(models, dataset, place)


def _fitted(dataset: Dataset, networks: Sequence[str]) -> Dataset:
    fitted = [fitting(dataset, stored_facts(name), name) for name in networks]
    for name, each in zip(networks, fitted, strict=True):
        if each.classes != fitted[0].classes:
            raise InputError(
                f"{plain(networks[0])} and {plain(name)} order the classes differently; evaluate each by itself."
            )
    return fitted[0]


def talking(json: str | None) -> Console:
    """The console for a command's messages: a silent one if its result goes to standard output."""
    return console if json != "-" else Console(quiet=True)


def assumed(measured: Measured, data: Dataset) -> str:
    """How a command measures, on one line."""
    names = ", ".join(data.classes[:3]) + (", ..." if len(data.classes) > 3 else "")
    return plain(f"{measured}; {len(data.classes)} classes ({names})")


def say_measured(talk: Console, measured: Measured, data: Dataset, models: Mapping[str, nn.Module]) -> None:
    """Prints how a command measures, and how its networks normalise."""
    talk.print(assumed(measured, data), highlight=False)
    for name, model in models.items():
        of = f" of {name}" if len(models) > 1 else ""
        talk.print(plain(f"Normalisation{of}: {normalisation_of(model)}"), highlight=False)


def say_read(words: Iterable[str], talk: Console) -> None:
    """Prints which results come from an earlier record."""
    for each in filter(None, words):
        talk.print(f"{each[0].upper()}{each[1:]}.", highlight=False)


@contextmanager
def showing(console: Console) -> Iterator[Callable[[Progress], None]]:
    """A bar for the attack that is running, on a terminal."""
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("")

        def show(now: Progress) -> None:
            name = f"{plain(now.name)} ({now.number} of {now.attacks}), {now.broken} broken"
            bar.update(task, description=name, completed=now.done, total=now.total)

        yield show


def network_path(network: str) -> str:
    """The file that a network is read from, or its name if it is from none."""
    return str(checkpoint_path(network)) if os.path.exists(network) else network


def records(network: str, out: str | None) -> Path | None:
    """The folder of an evaluation's record; None for a network by name, unless one is given."""
    if out is not None:
        return Path(out)
    return checkpoint_path(network).parent / "evaluations" if os.path.exists(network) else None


def reported(networks: Iterable[str], out: str | None) -> list[str]:
    """What ``clat report`` takes to show records: the run that a network belongs to, or the folder of its records."""
    found: dict[str, None] = {}
    for network in networks:
        if out is not None:
            found[out] = None
        elif os.path.exists(network):
            folder = checkpoint_path(network).parent
            found[str(folder if Run(folder).exists else folder / "evaluations")] = None
    return list(found)
