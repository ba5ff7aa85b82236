"""Trackers: what a run tells TensorBoard, Weights & Biases or trackio as it happens, through Accelerate."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from clat.errors import InputError
from clat.inputs import check_word
from clat.text import plain
from clat.training.job import Job
from clat.tuners.selection import Selection

TRACKERS = ("tensorboard", "wandb", "trackio")  # as Accelerate and pip call them
Log = Callable[[int, Mapping[str, Any]], None]  # the step, over all epochs, and what is known after it


def check_tracker(name: str | None) -> None:
    """Raises InputError unless there is such a tracker and it is installed."""
    if name is not None:
        check_word("tracker", name, TRACKERS)
        if find_spec(name) is None:
            raise InputError(f"The tracker {name} is not installed; run pip install {name}, or leave tracker out.")


@contextmanager
def tracked(job: Job) -> Iterator[Log]:
    """A function that tells the run's tracker, if it has one, what is new; the first call starts the tracker.

    TensorBoard's files are in the run folder, under ``tensorboard``. A resumed run takes the steps after its last
    finished epoch again.
    """
    accelerator = job.processes.accelerator
    begun = False

    def log(step: int, values: Mapping[str, Any]) -> None:
        nonlocal begun
        if accelerator.log_with and not begun:
            job.processes.by_first(lambda: _begin(job, step))
            begun = True
        accelerator.log(dict(values), step=step)

    try:
        yield log
    finally:
        for tracker in accelerator.trackers if begun else ():
            tracker.finish()
        accelerator.trackers = []


def _begin(job: Job, step: int) -> None:
    name, folder = str(job.processes.accelerator.log_with[0]), job.run.folder
    keys = {"purge_step": step} if name == "tensorboard" else {"name": folder.name, "config": job.recipe.keys()}
    try:
        # TensorBoard's folder is named after the project.
        project = name if name == "tensorboard" else "clat"
        job.processes.accelerator.init_trackers(project, init_kwargs={name: keys})
    except Exception as error:  # a tracker may raise anything, such as when nobody is logged in
        raise InputError(
            f"The tracker {name} did not start ({plain(' '.join(str(error).split())[:200]).rstrip('.')}); mend that, "
            "or leave tracker out and resume the run."
        ) from error
    if name == "tensorboard":
        job.processes.accelerator.log({"recipe": f"```\n{json.dumps(job.recipe.keys(), indent=1)}\n```"}, step=step)


def of_selection(selection: Selection) -> dict[str, Any]:
    """The selected layers in words, and what the tuner measured of every layer."""
    scores = {f"criticality/{score.name}": score.criticality for score in selection.scores}
    return {"selected": selection.in_words(), **scores}
