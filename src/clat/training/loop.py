"""Algorithm 1, for pre-training and fine-tuning, any objective and any tuner, one process or several.

The file is in the order in which it runs: ``train`` prepares, ``_epochs`` is the algorithm, ``_select`` its lines 4 to
10 and ``_epoch`` its lines 11 to 16.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from clat.batchnorm import shared_norms
from clat.checkpoint import load_weights
from clat.compute import seeded
from clat.data.arrays import as_dataset
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.evaluation.fits import check_fits
from clat.network import snapshot
from clat.text import plain
from clat.training.batches import PartThreat
from clat.training.claims import claim
from clat.training.health import check_attack, check_finite, check_learning
from clat.training.job import Job, prepared, progress_bar
from clat.training.optimizer import learning_rate, load_optimizer_state, make_optimizer, optimizer_state, set_rate
from clat.training.peers import counted
from clat.training.placement import as_begun, lent, settled
from clat.training.processes import seed_of, started
from clat.training.recipe import Recipe
from clat.training.runs import Run
from clat.training.saving import begin, check_same_run, check_same_start, commit, end_best, restore, write_result
from clat.training.tracking import Log, check_tracker, of_selection, tracked
from clat.training.validation import Batch, overfits, validate
from clat.tuners.selection import Selection

Entries = list[dict[str, Any]]  # a line of metrics.jsonl for each epoch


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
) -> Run:
    """Trains or fine-tunes a network by a recipe and records it in a run folder.

    Args:
        model: takes pixels in [0, 1], returns class scores; changed in place, and ends as it was after the last epoch,
            or as its tuner leaves it then, on the device that it came from. One that ``build_model`` did not make is
            given again to resume its run, and reads its checkpoints with ``load_weights``
        data: the training split; ``recipe.holdout`` images of it are held out for validation
        out: the run folder; no other process may train in it at the same time
        resume: continue the run in ``out`` after its last finished epoch, or start it if there is none; on the CPU it
            ends bit-identical to an uninterrupted one
        overwrite: replace an existing run in ``out``; only files that a run wrote are removed
        device: where to train, e.g. cpu or cuda:1; default the fastest kind of device here, one for each process
        workers: processes that decode images, where these do not fit into memory
        origin: where the network's weights come from, for the record
        tracker: tensorboard, wandb or trackio is told accuracies, losses and selections as they happen
        console: where progress goes; default none
    Raises:
        InputError: a network, data, device or folder that does not fit, or a run folder that is damaged
        HealthError: the loss is not finite, the accuracy stays at chance level, or the attack does not work
        IntegrityError: a frozen tensor changed or a selected one did not
    """
    data = as_dataset(data)
    if type(workers) is not int or workers < 0:
        raise InputError(f"workers is {workers!r}; it must be 0 or more.")
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
            job = prepared(recipe, model, data, processes, run, speaks, workers)
            _fit(job, data, resuming, origin)
    return run


def _fit(job: Job, data: Dataset, resuming: bool, origin: str | None) -> None:
    """All epochs and what comes after them."""
    start = snapshot(job.model)
    if resuming:
        check_same_start(job, start)
    if job.recipe.compile:
        job.model.compile()
    try:
        metrics, overfitted = _epochs(job, data, resuming, origin)
    finally:
        job.method.tuner.undo(job.model)
        job.model._compiled_call_impl = None
    load_weights(job.run.last, job.model)  # if the last epoch was dropped, the one before
    write_result(job, metrics, overfitted, end_best(job, start, metrics))


def _epochs(job: Job, data: Dataset, resuming: bool, origin: str | None) -> tuple[Entries, int | None]:
    """Algorithm 1: the metrics of each epoch, and the epoch that was dropped for overfitting, if one was."""
    recipe, method = job.recipe, job.method
    metrics, selections, optimizer = restore(job) if resuming else ([], [], None)
    with progress_bar(job, len(metrics)) as progress, tracked(job) as log:
        for epoch in range(len(metrics) + 1, recipe.epochs + 1):
            began = time.perf_counter()
            torch.manual_seed(seed_of(recipe.seed, epoch, job.processes.rank))
            if method.tuner.due(epoch):  # line 3
                selections = [*selections, _select(job, epoch)]
                if epoch == 1 and not resuming:
                    begin(job, data, origin)  # the input is checked, so an old run can be removed
                optimizer = _take(job, selections[-1], optimizer)
                log((epoch - 1) * job.images.steps, of_selection(selections[-1]))
            assert optimizer is not None  # a selection is due before the first epoch
            with shared_norms(job.model, job.processes.mean, job.processes.count):
                losses, first_batch = _epoch(job, epoch, optimizer, progress, log)
            method.verify()
            seconds = time.perf_counter() - began
            entry = validate(job, epoch, losses, first_batch, _rate(job, epoch), seconds)
            if overfits(job, metrics, entry):
                return metrics, epoch
            metrics = [*metrics, entry]
            _report(job, entry)
            log(epoch * job.images.steps, entry)
            commit(job, optimizer, metrics, selections)
            check_learning(metrics, len(data.classes), recipe)
    return metrics, None


def _select(job: Job, epoch: int) -> Selection:
    """Lines 4 to 9: what trains from this epoch on, the same in every process."""
    tuner, processes = job.method.tuner, job.processes
    (x, y), unseen = job.images.for_selection(epoch, tuner.batch, tuner.unseen())
    together: dict[str, Any] = {}
    if tuner.averages() and 1 < processes.count <= len(x):
        part = PartThreat.of(job.recipe.threat, len(x), processes)
        together = {"threat": part, "mean": processes.mean_over_images}
        x, y = part.own(x), part.own(y)
    # In fp32: early layers' differences of bf16 features are mostly rounding.
    with seeded(seed_of(job.recipe.seed, epoch), processes.device):
        selection = processes.of_first(job.method.choose(x, y, epoch, unseen=unseen, **together))
    if selection.partial(job.model):
        job.say(f"epoch {epoch}: selected {plain(selection.in_words())}")
    return selection


def _take(job: Job, selection: Selection, before: torch.optim.Optimizer | None) -> torch.optim.Optimizer:
    """Line 10: freezes what was not selected, and makes a new optimizer for the parameters that train."""
    kept = optimizer_state(before, job.model) if job.method.tuner.optimizer_state == "keep" else {}
    job.method.take(selection)
    optimizer = make_optimizer(job.recipe, job.model)
    load_optimizer_state(optimizer, job.model, kept)
    return optimizer


def _epoch(
    job: Job, epoch: int, optimizer: torch.optim.Optimizer, progress: Callable[[int, int], None], log: Log
) -> tuple[dict[str, float], Batch]:
    """Lines 11 to 16: the mean of the loss and of each of its terms over the epoch, and its first batch."""
    recipe, method, steps = job.recipe, job.method, job.images.steps
    method.begin()
    replays = method.objective.replays
    awp = recipe.awp if recipe.awp and epoch > recipe.awp.warmup else None
    processes = job.processes
    totals: dict[str, Tensor] = {}
    progress(epoch, 0)
    for step, batch in enumerate(job.images.batches(epoch)):
        x, y = batch.x, batch.y
        set_rate(optimizer, recipe, _rate(job, epoch, step))
        for _ in range(replays):
            x_adv = method.attack(x, y, threat=job.images.threat(batch))
            job.images.keep(batch, x_adv)
            terms = method.update(optimizer, x, x_adv, y, awp=awp, clip=recipe.clip, share=processes.average_gradients)
            for name, term in {"loss": torch.stack(list(terms.values())).sum(), **terms}.items():
                totals[name] = totals.get(name, torch.zeros((), device=x.device)) + term
        last = step == steps - 1
        job.averaged.take(epoch, last=last)
        if step == 0:
            first_batch = x, y
            if x_adv is not x:
                check_attack(processes.mean(recipe.threat.distance(x_adv, x).mean()).item(), recipe)
        if step % 20 == 0 or last:
            loss = processes.mean(totals["loss"]).item() / ((step + 1) * replays)
            check_finite(loss, recipe, epoch, step)
            log((epoch - 1) * steps + step + 1, {"loss_within_epoch": loss})
        progress(epoch, 1)
    _average_buffers(job)
    means = processes.mean(torch.stack(list(totals.values()))).tolist()
    return {name: mean / (steps * replays) for name, mean in zip(totals, means, strict=True)}, first_batch


def _average_buffers(job: Job) -> None:
    """Buffers that each process moved by its own images become one again; those of BatchNorm already are."""
    if job.method.selection is not None:
        moving = job.method.selection.moving_buffers(job.model)
        for held in (dict(job.model.named_buffers()), job.averaged.tensors):
            job.processes.average_buffers(held, moving)


def _rate(job: Job, epoch: int, step: int = 0) -> float:
    """The learning rate of a step."""
    selected = job.method.selection.epoch if job.method.selection else 1
    return learning_rate(job.recipe, epoch, step, job.images.steps, selected)


def _report(job: Job, entry: dict[str, Any]) -> None:
    terms = {name.removeprefix("loss/"): value for name, value in entry.items() if name.startswith("loss/")}
    listed = ", ".join(f"{name} {value:.3f}" for name, value in terms.items())
    job.say(
        f"epoch {entry['epoch']}/{job.recipe.epochs}: loss {entry['loss']:.3f}"
        f"{f' ({plain(listed)})' if len(terms) > 1 else ''}, validation clean "
        f"{100 * entry['clean']:.1f} %, robust {100 * entry['robust']:.1f} %, {entry['seconds']:.0f} s"
    )
