"""Algorithm 1, for pre-training and fine-tuning, any objective and any tuner, one process or several.

The file is in the order in which it runs: ``_epochs`` is the algorithm, ``_select`` and ``_take`` its lines 4 to 10,
``_epoch`` its lines 11 to 16. What comes before is in ``train``.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from clat.batchnorm import shared_norms
from clat.checkpoint import load_weights
from clat.compute import seeded
from clat.data.dataset import Dataset
from clat.network import snapshot
from clat.text import plain
from clat.training.health import check_attack, check_learning
from clat.training.job import Job, progress_bar
from clat.training.losses import Losses
from clat.training.optimizer import load_optimizer_state, make_optimizer, optimizer_state, set_rate
from clat.training.processes import seed_of
from clat.training.saving import begin, check_same_start, commit, end_best, restore, write_result
from clat.training.tracking import Log, of_selection, tracked
from clat.training.validation import Batch, out_of_patience, overfits, validate
from clat.tuners.selection import Selection

Entries = list[dict[str, Any]]  # a line of metrics.jsonl for each epoch


def fit(job: Job, data: Dataset, resuming: bool, origin: str | None) -> None:
    """All epochs and what comes after them."""
    start = snapshot(job.model)
    if resuming:
        check_same_start(job, start)
    with job.running():
        metrics, overfitted = _epochs(job, data, resuming, origin)
    load_weights(job.run.last, job.model)  # if the last epoch was dropped, the one before
    write_result(job, metrics, overfitted, end_best(job, start, metrics))


def _epochs(job: Job, data: Dataset, resuming: bool, origin: str | None) -> tuple[Entries, int | None]:
    """Algorithm 1: the metrics of each epoch, and the epoch that was dropped for overfitting, if one was."""
    recipe, method = job.recipe, job.method
    metrics, selections, optimizer = restore(job) if resuming else ([], [], None)
    with progress_bar(job, len(metrics)) as progress, tracked(job) as log:
        for epoch in range(len(metrics) + 1, recipe.epochs + 1):
            if out_of_patience(job, metrics):
                break
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
            entry = validate(job, epoch, losses, first_batch, job.rate(epoch), seconds)
            if overfits(job, metrics, entry):
                return metrics, epoch
            metrics = [*metrics, entry]
            job.report(entry)
            log(epoch * job.images.steps, entry)
            commit(job, optimizer, metrics, selections)
            job.tell(entry)
            check_learning(metrics, len(data.classes), recipe)
    return metrics, None


def _select(job: Job, epoch: int) -> Selection:
    """Lines 4 to 9: what trains from this epoch on, the same in every process."""
    # In fp32: early layers' differences of bf16 features are mostly rounding.
    with seeded(seed_of(job.recipe.seed, epoch), job.processes.device):
        selection = job.choose(epoch)
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
    recipe, method, processes, steps = job.recipe, job.method, job.processes, job.images.steps
    method.begin()
    awp = recipe.awp if recipe.awp and epoch > recipe.awp.warmup else None
    more: dict[str, Any] = {"awp": awp, "clip": recipe.clip, "parts": recipe.accumulate}
    more["share"] = processes.average_gradients
    losses = Losses(job, epoch)
    progress(epoch, 0)
    for step, drawn in enumerate(job.images.batches(epoch)):
        batch, last = job.mixed(drawn), step == steps - 1
        set_rate(optimizer, recipe, job.rate(epoch, step))
        for _ in range(method.objective.replays):
            x_adv = job.attack(batch)  # line 13
            losses.add(method.update(optimizer, batch.x, x_adv, job.learned(batch.y), **more))  # lines 14 and 15
        job.averaged.take(epoch, last=last)
        if step == 0:
            first_batch = drawn.x, drawn.y
            if x_adv is not batch.x:
                check_attack(processes.mean(recipe.threat.distance(x_adv, batch.x).mean()).item(), recipe)
        if step % 20 == 0 or last:
            log((epoch - 1) * steps + step + 1, {"loss_within_epoch": losses.checked(step)})
        progress(epoch, 1)
    job.average_buffers()
    return losses.means(), first_batch
