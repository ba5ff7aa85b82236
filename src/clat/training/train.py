"""The training of a network by a recipe: what is checked and claimed before ``loop`` runs Algorithm 1."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from clat.data.arrays import as_dataset
from clat.errors import InputError
from clat.evaluation.fits import check_fits
from clat.inputs import check_least, shown
from clat.network import check_made
from clat.training.claims import claim
from clat.training.job import prepared
from clat.training.loop import fit
from clat.training.peers import counted
from clat.training.placement import as_begun, lent, settled
from clat.training.processes import started
from clat.training.recipe import Recipe
from clat.training.runs import Run
from clat.training.saving import check_same_run
from clat.training.tracking import check_tracker


def train(
    recipe: Recipe,
    model: nn.Module,
    data: Any,
    *,
    out: Path | str,
    resume: bool = False,
    overwrite: bool = False,
    device: torch.device | str | None = None,
    workers: int = 2,
    origin: str | None = None,
    tracker: str | None = None,
    console: Console | None = None,
    on_epoch: Callable[[dict[str, Any]], object] | None = None,
) -> Run:
    """Trains or fine-tunes a network by a recipe and records it in a run folder.

    Args:
        model: takes pixels in [0, 1], returns class scores; changed in place, and ends as it was after the last epoch,
            or as its tuner leaves it then, on the device that it came from. One that ``build_model`` did not make is
            given again to resume its run, and reads its checkpoints with ``load_weights``
        data: the training split; ``recipe.holdout`` images of it are held out for validation
        out: the run folder; no other process may train in it at the same time
        resume: continue the run in ``out`` after its last finished epoch, or start it if there is none; on the CPU it
            ends bit-identical to an uninterrupted one. Other ``epochs`` and ``patience`` may be given, where the epochs
            that are done would have had the same learning rates
        overwrite: replace an existing run in ``out``; only files that a run wrote are removed
        device: where to train, e.g. cpu or cuda:1; default the fastest kind of device here, one for each process
        workers: processes that decode images, where these do not fit into memory
        origin: where the network's weights come from, for the record
        tracker: tensorboard, wandb or trackio is told accuracies, losses and selections as they happen
        console: where progress goes, e.g. ``rich.console.Console()``, also in a notebook; default none
        on_epoch: called after each epoch with its line of metrics.jsonl, by the first process, once the epoch is saved;
            what it raises ends the run, which ``resume`` continues
    Raises:
        InputError: a network, data, device or folder that does not fit, or a run folder that is damaged
        HealthError: the loss is not finite, the accuracy stays at chance level, or the attack does not work
        IntegrityError: a frozen tensor changed or a selected one did not
    """
    data = as_dataset(data)
    check_least(0, workers=workers)
    check_made(model)
    if not isinstance(recipe, Recipe):
        raise InputError(
            f"{shown(recipe)} is no recipe; give a clat.Recipe, such as Recipe(objective=Clat(), tuner=Critical(k=1))."
        )
    check_tracker(tracker)
    run = Run(Path(out))
    processes = started(device, tracker, run.folder)
    speaks = console if console and processes.first else Console(quiet=True)
    with counted(processes.rank, processes.count), ExitStack() as claims:
        claimed = claim(run, resume=resume, overwrite=overwrite)
        resuming = processes.by_first(lambda: claims.enter_context(claimed))
        if resuming:
            recipe = as_begun(recipe, run)
            check_same_run(run, recipe, data)
        with lent(model, processes.device):
            processes.copy_first(model)
            check_fits(model, data, processes.device)
            recipe = settled(recipe, model, data, processes, speaks)
            job = prepared(recipe, model, data, processes, run, speaks, workers, on_epoch)
            fit(job, data, resuming, origin)
    return run
