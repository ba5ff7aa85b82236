"""The parts of a run that are made before its first epoch and stay the same until its last."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.network import Images, Labels
from clat.text import plain
from clat.training.averaging import Averaged
from clat.training.batches import PartThreat, RunImages, TrainingBatch, run_images
from clat.training.method import Method
from clat.training.optimizer import learning_rate
from clat.training.processes import Processes
from clat.training.recipe import Recipe
from clat.training.runs import Run
from clat.training.targets import targets
from clat.tuners.selection import Selection


@dataclass(frozen=True)
class Job:
    """One run in progress.

    Args:
        recipe: with the precision and layout that were settled
        method: objective, tuner and threat model, put to the network
        averaged: the network's average over the steps so far
        targets: what the loss learns for each label, (classes, classes); None for the labels themselves
        console: silent in all processes but the first
        on_epoch: the user's, for each epoch's line of metrics.jsonl
    """

    recipe: Recipe
    method: Method
    averaged: Averaged
    images: RunImages
    targets: Tensor | None
    processes: Processes
    run: Run
    console: Console
    on_epoch: Callable[[dict[str, Any]], object] | None = None

    @property
    def model(self) -> nn.Module:
        return self.method.model

    def learned(self, y: Labels) -> Tensor:
        """What the loss learns in place of these labels, or of these shares of the classes."""
        if self.targets is None:
            return y
        return y @ self.targets if y.is_floating_point() else self.targets[y]

    def mixed(self, batch: TrainingBatch) -> TrainingBatch:
        """The batch as it is attacked and trained on: with ``mixup``, mixed."""
        return batch.mixed(self.recipe.mixup, len(self.images.training.classes)) if self.recipe.mixup else batch

    def say(self, text: str) -> None:
        """Prints a line under the progress bar's place. Nothing in it is markup: names come from files."""
        self.console.print(f"  {text}", markup=False, highlight=False)

    def report(self, entry: dict[str, Any]) -> None:
        """Prints an epoch's line."""
        terms = {name.removeprefix("loss/"): value for name, value in entry.items() if name.startswith("loss/")}
        listed = ", ".join(f"{name} {value:.3f}" for name, value in terms.items())
        self.say(
            f"epoch {entry['epoch']}/{self.recipe.epochs}: loss {entry['loss']:.3f}"
            f"{f' ({plain(listed)})' if len(terms) > 1 else ''}, validation clean "
            f"{100 * entry['clean']:.1f} %, robust {100 * entry['robust']:.1f} %, {entry['seconds']:.0f} s"
        )

    def rate(self, epoch: int, step: int = 0) -> float:
        """The learning rate of a step."""
        selected = self.method.selection.epoch if self.method.selection else 1
        return learning_rate(self.recipe, epoch, step, self.images.steps, selected)

    def choose(self, epoch: int) -> Selection:
        """What trains from this epoch on, the same in every process; each one measures its share of the images."""
        tuner, processes = self.method.tuner, self.processes
        (x, y), unseen = self.images.for_selection(epoch, tuner.batch, tuner.unseen())
        together: dict[str, Any] = {}
        if tuner.averages() and 1 < processes.count <= len(x):
            part = PartThreat.of(self.recipe.threat, len(x), processes)
            together = {"threat": part, "mean": processes.mean_over_images}
            x, y = part.own(x), part.own(y)
        return processes.of_first(self.method.choose(x, y, epoch, unseen=unseen, **together))

    def attack(self, batch: TrainingBatch) -> Images:
        """Algorithm 1, line 13, part by part; the images themselves where the objective attacks none."""
        found = []
        for part in batch.parts(self.recipe.accumulate):
            x_adv = self.method.attack(part.x, part.y, threat=self.images.threat(part))
            if x_adv is part.x:
                return batch.x
            self.images.keep(part, x_adv)
            found.append(x_adv)
        return found[0] if len(found) == 1 else torch.cat(found)

    def average_buffers(self) -> None:
        """Buffers that each process moved by its own images become one again; those of BatchNorm already are."""
        if self.method.selection is not None:
            moving = self.method.selection.moving_buffers(self.model)
            for held in (dict(self.model.named_buffers()), self.averaged.tensors):
                self.processes.average_buffers(held, moving)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Compiles the network if the recipe says so. Afterwards it is as its tuner leaves it, and not compiled."""
        if self.recipe.compile:
            self.model.compile()
        try:
            yield
        finally:
            self.method.tuner.undo(self.model)
            self.model._compiled_call_impl = None

    def tell(self, entry: Mapping[str, Any]) -> None:
        """Hands a copy of an epoch's line to the user's function, in the first process only."""
        if self.on_epoch is not None and self.processes.first:
            self.on_epoch(dict(entry))


def prepared(
    recipe: Recipe,
    model: nn.Module,
    data: Dataset,
    processes: Processes,
    run: Run,
    console: Console,
    workers: int,
    on_epoch: Callable[[dict[str, Any]], object] | None = None,
) -> Job:
    """The parts of a run. Says what was assumed of its extra images.

    Raises:
        InputError: images that do not fit each other or the recipe, or a wrapper around the network
    """
    if isinstance(model, DistributedDataParallel):
        raise InputError("Give train the network itself, without DistributedDataParallel; it averages the gradients.")
    images = run_images(recipe, data, processes, workers)
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
        images=images,
        targets=targets(recipe, images.training.labels, len(data.classes)),
        processes=processes,
        run=run,
        console=console,
        on_epoch=on_epoch,
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
    """A bar on a terminal or in a notebook, as a function that is told the epoch and the steps made in it.

    In a notebook, rich draws it with ipywidgets; without them there is none, as on no terminal.

    Args:
        done: epochs that are over
    """
    console = job.console
    shown = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    epochs, steps = job.recipe.epochs, job.images.steps
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("", total=epochs * steps, completed=done * steps)
        yield lambda epoch, made: bar.update(task, advance=made, description=f"epoch {epoch}/{epochs}")
