"""Measurements after an epoch: accuracy on held-out and training images, and the probe for catastrophic overfitting."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from clat.compute import autocast, seeded
from clat.data.dataset import Dataset
from clat.evaluation.evaluate import evaluate
from clat.network import Images, Labels
from clat.training.job import Job
from clat.training.recipe import Recipe

Metrics = Mapping[str, Any]  # one epoch's line of metrics.jsonl
Batch = tuple[Images, Labels]


def accuracy(job: Job, images: Dataset | None = None) -> tuple[float, float, int]:
    """Clean and robust accuracy on the held-out images, and their number, over all processes.

    Where weights are averaged, it is the average that is measured.

    Args:
        images: this process's part of other images, to measure in their place
    """
    recipe = job.recipe
    with job.averaged.swapped_in():
        found = evaluate(
            job.model,
            job.images.validation if images is None else images,
            recipe.validation_threat,
            seed=recipe.seed,
            batch_size=250 if recipe.accumulate == 1 else min(250, job.images.part_size),
            workers=job.images.workers,
            device=job.processes.device,
            precision=recipe.precision,
        )
    clean, robust, n = job.processes.totals(found.clean.correct, found.robust.correct, found.clean.n)
    return clean / n, robust / n, n


def validate(
    job: Job, epoch: int, losses: Mapping[str, float], first_batch: Batch, rate: float, seconds: float
) -> dict[str, Any]:
    """The epoch's line of metrics.jsonl.

    Args:
        losses: mean over the epoch of the loss and its terms
        first_batch: of the epoch, for the probe
        rate: learning rate of the epoch's first step
        seconds: that training the epoch took
    """
    start = time.perf_counter()
    clean, robust, n = accuracy(job)
    fitted = {}
    if len(job.images.fitted):
        found = accuracy(job, job.images.fitted)
        fitted = dict(zip(("train_clean", "train_robust", "train_images"), found, strict=True))
    return {
        "epoch": epoch,
        **{name if name == "loss" else f"loss/{name}": value for name, value in losses.items()},
        "clean": clean,
        "robust": robust,
        **fitted,
        **probe(job, first_batch),
        "validation_images": n,
        "learning_rate": rate,
        "trainable": sum(p.numel() for p in job.model.parameters() if p.requires_grad),
        "seconds": round(seconds, 3),
        "validation_seconds": round(time.perf_counter() - start, 3),
        "peak_memory_bytes": peak_memory(job.processes.device),
    }


def probe(job: Job, batch: Batch) -> dict[str, float]:
    """Accuracy under attack on a training batch, for an objective that watches it."""
    x, y = batch
    with seeded(job.recipe.seed, job.processes.device), autocast(job.processes.device, job.recipe.precision):
        right = job.method.objective.probe(job.model, x, y, job.recipe.threat)
    if right is None:
        return {}
    correct, n = job.processes.totals(right.sum(), len(y))
    return {"probe": correct / n}


def overfits(job: Job, metrics: Sequence[Metrics], entry: Metrics) -> bool:
    """Whether the probe fell so far in this epoch that the objective ends the run. Says so."""
    if "probe" not in entry or not metrics:
        return False
    fall = metrics[-1]["probe"] - entry["probe"]
    if fall <= job.method.objective.largest_drop:
        return False
    job.say(
        f"epoch {entry['epoch']}: catastrophic overfitting (accuracy under attack on a training batch fell by "
        f"{100 * fall:.0f} points); the run ends with epoch {entry['epoch'] - 1}"
    )
    return True


def best_epoch(metrics: Sequence[Metrics], recipe: Recipe) -> int:
    """The epoch with the best validation accuracy; of equals, the last."""
    order = ("robust", "clean") if recipe.select_by == "robust" else ("clean", "robust")
    return max(metrics, key=lambda entry: (entry[order[0]], entry[order[1]], entry["epoch"]))["epoch"]


def out_of_patience(job: Job, metrics: Sequence[Metrics]) -> bool:
    """Whether as many epochs as the recipe's patience have passed without a new best one. Says so."""
    patience = job.recipe.patience
    if patience is None or not metrics or len(metrics) - best_epoch(metrics, job.recipe) < patience:
        return False
    job.say(f"no new best in {patience} epoch{'s' * (patience > 1)}; the run ends with epoch {len(metrics)}")
    return True


def peak_memory(device: torch.device) -> int:
    """Most memory in use so far: on a GPU by tensors, elsewhere by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
