"""The commands that train: demo, train, finetune, and status, which says what a run trained."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clat.cli import demo as demonstration
from clat.cli.attacking import network_path
from clat.cli.shared import (
    checkpoint_named,
    console,
    data_named,
    exists,
    fitting,
    network_named,
    pretrained_named,
    write_json,
)
from clat.cli.tables import status_table
from clat.data.dataset import Dataset
from clat.models import normalisation_of
from clat.network import check_made
from clat.text import plain
from clat.training.integrity import IntegrityError, status_since
from clat.training.recipe import Recipe
from clat.training.runs import Run
from clat.training.tracking import check_tracker
from clat.training.train import train as train_model


def demo(out: str = "clat-demo", resume: bool = False, overwrite: bool = False) -> None:
    """Everything on few embedded images: pre-train, find critical layers, go on with PGD-AT and with CLAT.

    Args:
        out: folder for the run folders and the table
        resume: continue an interrupted demo there
        overwrite: replace the runs of an earlier demo there
    """
    demonstration.run(Path(out), resume=resume, overwrite=overwrite, console=console)


def train(
    recipe: Recipe,
    *,
    model: str,
    data: str,
    out: str,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    workers: int = 2,
    tracker: str | None = None,
) -> None:
    """Trains a network from random or pretrained weights by a recipe.

    Args:
        model: a network such as rn18, timm/NAME, torchvision/NAME, transformers/NAME or your file.py:factory; options
            after commas, e.g. rn18,width=16 or timm/resnet18,pretrained=true
        data: training images: a Hugging Face name, folder, parquet or CSV file; options after commas, e.g.
            photos,size=64
        out: the run folder
        resume: continue the run in that folder after its last finished epoch
        overwrite: replace the run in that folder
        device: where to train, e.g. cpu or cuda:1; the fastest kind of device here if not given
        workers: processes that decode images, where these do not fit into memory
        tracker: tensorboard, wandb or trackio: told accuracies, losses and selections as they happen
    """
    check_tracker(tracker)
    dataset = data_named(data, "train")
    torch.manual_seed(recipe.seed)
    network = network_named(model, dataset)
    keys = {"resume": resume, "overwrite": overwrite, "device": device, "workers": workers, "tracker": tracker}
    _run(recipe, network, dataset, out, model, keys)


def finetune(
    recipe: Recipe,
    *,
    origin: str,
    data: str,
    out: str,
    model: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    workers: int = 2,
    tracker: str | None = None,
) -> None:
    """Fine-tunes a network from a checkpoint, a run or pretrained weights by a recipe.

    Args:
        origin: a checkpoint, a run folder (its best checkpoint), or a network that comes with trained weights, such as
            timm/NAME,pretrained=true or your file.py:factory
        data: training images, the same as before; options after commas, e.g. photos,size=64
        out: the run folder
        model: the network of the weights if these cannot or do not name it, such as your file.py:factory
        resume: continue the run in that folder after its last finished epoch
        overwrite: replace the run in that folder
        device: where to train, e.g. cpu or cuda:1; the fastest kind of device here if not given
        workers: processes that decode images, where these do not fit into memory
        tracker: tensorboard, wandb or trackio: told accuracies, losses and selections as they happen
    """
    check_tracker(tracker)
    dataset = data_named(data, "train")
    facts: dict[str, Any] = {}
    if model is None and not exists(origin):
        torch.manual_seed(recipe.seed)
        network: nn.Module = pretrained_named(origin, dataset, partial=recipe.tuner.name != "whole")
    else:
        network, facts = checkpoint_named(origin, model)
    dataset = fitting(dataset, facts, origin, unseen=False)
    held = facts.get("holdout", {})
    if facts.get("data", {}).get("source") == data and held != {"images": recipe.holdout, "seed": recipe.holdout_seed}:
        console.print(
            plain(
                f"Warning: {origin} was trained with holdout {held.get('images')} and holdout_seed {held.get('seed')}; "
                "with others, it has seen the validation images."
            ),
            markup=False,
        )
    keys = {"resume": resume, "overwrite": overwrite, "device": device, "workers": workers, "tracker": tracker}
    _run(recipe, network, dataset, out, network_path(origin), keys)


def status(run: str, model: str | None = None, json: str | None = None) -> None:
    """Lists the layers of a run as trained, frozen or irregular, by comparing the weights with those at its start.

    Args:
        run: a run folder
        model: the network of the run if its files cannot or do not name it, such as your file.py:factory
        json: write the list to this file, or to standard output if it is -
    """
    folder = Run(Path(run))
    start, selections = folder.start, folder.selections
    if not folder.last.exists():
        raise folder.unusable(folder.last.name, "is missing", "the first epoch writes it")
    network, _ = checkpoint_named(str(folder.last), model)
    if unknown := set(folder.selected) - dict(network.named_modules()).keys():
        raise folder.unusable("selections.jsonl", f"names {plain(min(unknown))}, which is no layer of the network")
    found = status_since(network, start, selections)
    if json is not None:
        write_json(json, [asdict(layer) for layer in found])
    if json != "-":
        console.print(status_table(found, folder))
        console.print(folder.in_words(), markup=False, highlight=False)
        if folder.averaged.exists():
            console.print(f"{plain(folder.averaged)} holds the averaged weights after the last epoch.", markup=False)
    if any(layer.state == "irregular" for layer in found):
        raise IntegrityError(f"{run} has irregular layers.")


def _run(recipe: Recipe, model: nn.Module, data: Dataset, out: str, origin: str, keys: dict[str, Any]) -> None:
    check_made(model)
    size = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{recipe.objective.name} x {recipe.tuner.name} on {plain(data.source)}, {size:,} parameters, "
        f"from {plain(origin)}",
        markup=False,
    )
    console.print(f"Normalisation: {normalisation_of(model)}", markup=False, highlight=False)
    run = train_model(recipe, model, data, out=out, origin=origin, console=console, **keys)
    console.print(f"{run.in_words()} Run folder: {plain(out)}", markup=False, highlight=False)
