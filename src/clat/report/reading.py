"""A run folder with all that was measured on its checkpoints, and the run that it started from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from clat.checkpoint import load_tensors
from clat.errors import InputError
from clat.network import digest_of_tensors, fingerprint, weights_digest
from clat.report.records import Records, records_in
from clat.text import plain
from clat.training.runs import Run
from clat.tuners.selection import Selection

Load = Callable[[Path], nn.Module]  # the network in a checkpoint


@dataclass(frozen=True)
class Told:
    """What a run folder tells.

    Args:
        name: the folder as it was given
        checkpoint: the one that is shown first: the best, or that from which another run started
        base: the run that this one started from, if it is there and has these very weights; or the one given
    """

    run: Run
    name: str
    checkpoint: str
    metrics: list[dict[str, Any]]
    selections: list[Selection]
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]
    records: Records
    base: "Told | None" = None

    @property
    def file(self) -> Path:
        return self.run.folder / f"{self.checkpoint}.safetensors"

    @cached_property
    def best(self) -> int:
        """The best epoch."""
        return self.run.epoch_of(self.run.best)

    @property
    def finished(self) -> bool:
        return self.run.finished

    @property
    def parameters(self) -> int:
        return int(self.environment["parameters"])

    @property
    def trainable(self) -> int:
        """Parameters that trained, at most at a time."""
        return max(int(entry["trainable"]) for entry in self.metrics)


def told(name: str, load: Load, *, base: str | None = None, checkpoint: str = "best", alone: bool = False) -> Told:
    """Reads a run folder.

    Args:
        load: opens a checkpoint; where it cannot, the weights are compared by what the file holds
        base: another run to show beside this one; default the one that it started from
        checkpoint: the one that is shown first
        alone: read no base
    Raises:
        InputError: no run folder, one whose first epoch is not done, or one that is damaged
    """
    run = Run(Path(name))
    if not run.exists:
        raise InputError(f"{plain(name)} is no run folder; give one that clat train or finetune wrote.")
    metrics, selections = run.progress()
    if not metrics:
        raise InputError(f"{plain(name)} has no finished epoch yet; there is nothing to show.")
    recipe, environment = run.recipe, run.environment
    origin = environment.get("from")
    beside: Told | None = None
    if base is not None:
        beside = told(base, load, alone=True)
    elif isinstance(origin, str) and not alone:
        beside = _origin(run, Path(origin), load)
    digests = {digest: each for each in ("averaged", "last", "best") if (digest := _weights(run, each, load))}
    kept = run.folder / "evaluations"
    return Told(
        run=run,
        name=name,
        checkpoint=checkpoint,
        metrics=metrics,
        selections=selections,
        recipe=recipe,
        environment=environment,
        records=records_in([kept], digests) if kept.is_dir() else Records(),
        base=beside,
    )


def _weights(run: Run, checkpoint: str, load: Load) -> str:
    """The digest of a checkpoint's weights as an evaluation records it; none if there is no such checkpoint."""
    path = run.folder / f"{checkpoint}.safetensors"
    if not path.is_file():
        return ""
    try:
        return weights_digest(load(path))
    except InputError:  # a network that a file may not choose
        return digest_of_tensors({name: fingerprint(tensor) for name, tensor in load_tensors(path)[0].items()})[:16]


def _origin(run: Run, path: Path, load: Load) -> Told | None:
    """The run whose checkpoint this one started from, where it was or beside this run, if it has these weights."""
    for file in (path, run.folder.parent / path.parent.name / path.name):
        folder = Run(file.parent)
        if folder.exists and file.is_file() and folder.folder.resolve() != run.folder.resolve():
            began = run.start
            weights = {name: fingerprint(tensor) for name, tensor in load_tensors(file)[0].items()}
            if weights and all(began.get(name) == digest for name, digest in weights.items()):
                return told(str(file.parent), load, checkpoint=file.stem, alone=True)
    return None
