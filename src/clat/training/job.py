"""The parts of a run that are made before its first epoch and stay the same until its last."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clat.data.dataset import Dataset
from clat.text import plain
from clat.training.averaging import Averaged
from clat.training.batches import RunImages, run_images
from clat.training.method import Method
from clat.training.processes import Processes
from clat.training.recipe import Recipe
from clat.training.runs import Run


@dataclass(frozen=True)
class Job:
    """One run in progress.

    Args:
        recipe: with the precision and layout that were settled
        method: objective, tuner and threat model, put to the network
        averaged: the network's average over the steps so far
        console: silent in all processes but the first
    """

    recipe: Recipe
    method: Method
    averaged: Averaged
    images: RunImages
    processes: Processes
    run: Run
    console: Console

    @property
    def model(self) -> nn.Module:
        return self.method.model

    def say(self, text: str) -> None:
        """Prints a line under the progress bar's place. Nothing in it is markup: names come from files."""
        self.console.print(f"  {text}", markup=False, highlight=False)


def prepared(
    recipe: Recipe, model: nn.Module, data: Dataset, processes: Processes, run: Run, console: Console, workers: int
) -> Job:
    """The parts of a run. Says what was assumed of its extra images.

    Raises:
        InputError: images that do not fit each other or the recipe
    """
    job = Job(
        recipe=recipe,
        method=Method(
            model,
            recipe.objective,
            recipe.tuner,
            recipe.threat,
            seed=recipe.seed,
            precision=recipe.precision,
            recompute=recipe.recompute,
        ),
        averaged=Averaged(model, recipe.average),
        images=run_images(recipe, data, processes, workers),
        processes=processes,
        run=run,
        console=console,
    )
    for note in job.images.extra.notes if job.images.extra else ():
        job.say(plain(note))
    if recipe.augment is True and job.images.augment == "resized-crop":
        job.say("training images are cropped and resized at random (--augment resized-crop)")
    if recipe.accumulate > 1:
        job.say(f"each batch is attacked and its gradients are made in parts of {job.images.part_size} images")
        if any(isinstance(module, _BatchNorm) for module in model.modules()):
            job.say("BatchNorm in training mode has the statistics of these parts, not of the batch")
    return job


@contextmanager
def progress_bar(job: Job, done: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, as a function that is told the epoch and the steps made in it; ``done`` epochs are over."""
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    epochs, steps = job.recipe.epochs, job.images.steps
    with Progress(*columns, console=job.console, transient=True, disable=not job.console.is_terminal) as bar:
        task = bar.add_task("", total=epochs * steps, completed=done * steps)
        yield lambda epoch, made: bar.update(task, advance=made, description=f"epoch {epoch}/{epochs}")
