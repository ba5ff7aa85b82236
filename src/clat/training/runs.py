"""A run folder: settings and results of a run, written so that it can be killed at any moment.

recipe.yaml            the resolved recipe
environment.json       data, model, versions, hardware, command
start.json             fingerprint of each tensor before the first step
metrics.jsonl          one line an epoch
selections.jsonl       one line a selection, with the criticality of every layer
last.safetensors       the network after the last finished epoch: writing it commits the epoch
best.safetensors       the network after the epoch with the best validation accuracy, averaged if the recipe averages
averaged.safetensors   the average of the weights after the last finished epoch, if the recipe averages
optimizer-N.safetensors  the optimizer after epoch N, for --resume, with the network if ``last`` has it merged
result.json            the summary, once the run is finished
tensorboard/           what a run with --tracker tensorboard told it
evaluations/           what clat evaluate, sweep and trust found, a file an evaluation or verdict
.lock                  there while a process trains here

Files are checked when they are read, each one and against each other: a damaged or incomplete folder is refused, with
the name of the file, and never trained on from.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from clat.checkpoint import load_tensors
from clat.errors import InputError
from clat.files import read_text, write_text
from clat.text import plain
from clat.training import contents
from clat.tuners.selection import Selection

COPY = "put it back from a copy, or train the run again"

Content = TypeVar("Content")


@dataclass(frozen=True)
class Run:
    """A run folder and what it holds.

    What a property reads is checked; InputError says in one sentence which file is missing or damaged, and how.
    """

    folder: Path

    @property
    def last(self) -> Path:
        return self.folder / "last.safetensors"

    @property
    def best(self) -> Path:
        return self.folder / "best.safetensors"

    @property
    def averaged(self) -> Path:
        return self.folder / "averaged.safetensors"

    def optimizer(self, epoch: int) -> Path:
        return self.folder / f"optimizer-{epoch}.safetensors"

    @property
    def exists(self) -> bool:
        return os.path.isfile(self.folder / "recipe.yaml")  # False too where there can be no such path

    @property
    def finished(self) -> bool:
        return os.path.isfile(self.folder / "result.json")

    @property
    def epoch(self) -> int:
        """The last finished epoch, 0 before the first."""
        return self.epoch_of(self.last) if self.last.exists() else 0

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return self._read("metrics.jsonl", contents.read_metrics) if (self.folder / "metrics.jsonl").exists() else []

    @property
    def selections(self) -> list[Selection]:
        return (
            self._read("selections.jsonl", contents.read_selections)
            if (self.folder / "selections.jsonl").exists()
            else []
        )

    @property
    def selected(self) -> list[str]:
        """The layers that were selected so far, each once."""
        return list(dict.fromkeys(name for selection in self.selections for name in selection.layers))

    @property
    def start(self) -> dict[str, str]:
        return self._read("start.json", contents.read_start)

    @property
    def environment(self) -> dict[str, Any]:
        return self._read("environment.json", contents.read_environment)

    @property
    def recipe(self) -> dict[str, Any]:
        return self._read("recipe.yaml", contents.read_recipe)

    @property
    def result(self) -> dict[str, Any]:
        return self._read(
            "result.json", contents.read_result, "give the run's command again with --resume, which writes it again"
        )

    def in_words(self) -> str:
        """The best and the last finished epoch, and how far apart they are in robust accuracy.

        Raises:
            InputError: no epoch is finished, or a file is missing or damaged
        """
        metrics, best = self.progress()[0], self.epoch_of(self.best)
        if not 0 < best <= len(metrics):
            raise self.unusable(self.best.name, f"holds epoch {best}, and {len(metrics)} are finished")
        entry = self.result["best"] if self.finished else metrics[best - 1]  # a tuner may change the best at the end
        return _best_and_last(entry, metrics[-1])

    def progress(self) -> tuple[list[dict[str, Any]], list[Selection]]:
        """Metrics and selections up to the last finished epoch, which a resumed run continues from.

        Raises:
            InputError: a file is missing or damaged, or they are not of one run
        """
        metrics, selections = self.metrics, self.selections
        if not self.last.exists():
            if self.best.exists() or self.finished or len(metrics) > 1:  # more than a kill in the first epoch leaves
                raise self.unusable(self.last.name, "is missing", self.rescue())
            return [], []
        try:
            _, facts = load_tensors(self.last)
            epoch = contents.epoch_of(facts)
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise self.unusable(self.last.name, f"is damaged ({_reason(error)})", self.rescue()) from error
        for name in ("metrics.jsonl", "selections.jsonl"):
            if not (self.folder / name).exists():
                raise self.unusable(name, f"is missing, and {self.last.name} holds epoch {epoch}")
        if len(metrics) not in (epoch, epoch + 1):  # one more where a kill came between the two files
            raise self.unusable(
                "metrics.jsonl", f"ends with epoch {len(metrics)}, but {self.last.name} holds epoch {epoch}"
            )
        if any(facts.get("validation", {}).get(key) != metrics[epoch - 1][key] for key in ("clean", "robust")):
            raise self.unusable("metrics.jsonl", f"tells another accuracy of epoch {epoch} than {self.last.name}")
        return metrics[:epoch], [selection for selection in selections if selection.epoch <= epoch]

    def epoch_of(self, path: Path) -> int:
        """The epoch that a checkpoint of the run holds. Raises InputError if it is missing or damaged."""
        try:
            return contents.epoch_of(load_tensors(path)[1])
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise self.unusable(path.name, f"is damaged ({_reason(error)})") from error

    def rescue(self) -> str:
        """What to do if ``last`` is lost."""
        try:
            epoch = self.epoch_of(self.best)
        except InputError:
            return COPY
        return (
            f"{self.best.name} holds epoch {epoch} and is intact: start from it with clat finetune RECIPE --from "
            f"{plain(self.best)} --out ANOTHER, or put {self.last.name} back from a copy"
        )

    def unusable(self, name: str, why: str, remedy: str = COPY) -> InputError:
        """The error that a file of the folder cannot be used: ``why`` continues its name."""
        return InputError(f"{plain(self.folder)} is not a complete run folder: {name} {why}; {remedy}.")

    def write(self, name: str, content: Any) -> None:
        """Writes a JSON, JSONL or YAML file of the folder atomically."""
        if name.endswith(".yaml"):
            text = yaml.safe_dump(content, sort_keys=False)
        elif name.endswith(".jsonl"):
            text = "".join(json.dumps(entry) + "\n" for entry in content)
        else:
            text = json.dumps(content, indent=2) + "\n"
        write_text(self.folder / name, text)

    def _read(self, name: str, parse: Callable[[str], Content], remedy: str = COPY) -> Content:
        path = self.folder / name
        if not os.path.lexists(path):
            raise self.unusable(name, "is missing", remedy)
        try:
            return parse(read_text(path))
        except KeyError as error:
            raise self.unusable(name, f"is damaged (it lacks {plain(error.args[0])})", remedy) from error
        except (TypeError, ValueError) as error:
            raise self.unusable(name, f"is damaged ({_reason(error)})", remedy) from error


def _best_and_last(best: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    """Two lines of metrics.jsonl in words; robust overfitting is named where the gap is more than chance makes."""
    found, after = (f"clean {100 * e['clean']:.1f} %, robust {100 * e['robust']:.1f} %" for e in (best, last))
    if best["epoch"] == last["epoch"]:
        return f"Best epoch {best['epoch']}, the last: validation {found}."
    said = f"Best epoch {best['epoch']}: validation {found}; last epoch {last['epoch']}: {after}."
    n, gap = last["validation_images"], best["robust"] - last["robust"]
    error = math.sqrt(sum(e["robust"] * (1 - e["robust"]) for e in (best, last)) / n)  # of the gap, were they unpaired
    if gap <= 0:
        return f"{said} Robust accuracy has not fallen since."
    points = f"The last is {100 * gap:.1f} points less robust"
    if gap <= 2 * error:
        return f"{said} {points}, which on {n:,} images may be chance."
    fitted = f", while it has {100 * last['train_robust']:.1f} % on training images" if "train_robust" in last else ""
    use = "Use best.safetensors, as commands do that are given the run folder."
    return f"{said} {points}{fitted}: robust overfitting. {use}"


def _reason(error: Exception) -> str:
    """An error's message, as a part of a sentence."""
    said = f"it lacks {error.args[0]}" if isinstance(error, KeyError) else str(error)
    return plain(" ".join(said.split())).rstrip(".")
