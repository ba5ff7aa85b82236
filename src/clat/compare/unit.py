"""One unit of a comparison, an arm with a seed: its run folder, its evaluations, and its entry in the result."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import yaml
from torch import nn

from clat.attacks import Attack, TierName, apgd_ce
from clat.attacks import tier as make_tier
from clat.checkpoint import load_header, load_tensors
from clat.compare.images import DRAWN_BY, Load, measured_on
from clat.compare.plan import Arm, Comparison, Evaluation
from clat.compare.recipes import differing, resolved
from clat.compare.result import Entry
from clat.compare.statistics import pack
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.evaluation.evaluate import evaluate
from clat.files import digest_of, write_sealed, write_text
from clat.network import fingerprint, tensors
from clat.text import plain
from clat.training.flops import training_flops
from clat.training.runs import Run
from clat.tuners.selection import Selection

DIGITS = 5  # of the curves
CURVES = ("clean", "robust", "train_clean", "train_robust", "loss")
STARTS = "starts"  # in a comparison's folder: ARM-SEED-CHECKPOINT.safetensors

# Seconds and losses are of one machine; what is compared is in the other keys.
_ENVIRONMENT = ("commit", "python", "packages", "platform", "processor", "cores", "threads", "device")


@dataclass(frozen=True)
class Unit:
    """An arm with a seed, and where it lies in the comparison's folder."""

    out: Path
    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.name}-{self.seed}"

    @property
    def run(self) -> Run:
        return Run(self.out / "runs" / self.name)

    @property
    def entry(self) -> Path:
        """What it found, once it is done."""
        return self.out / "units" / f"{self.name}.json"

    @property
    def log(self) -> Path:
        return self.out / "logs" / f"{self.name}.log"

    def checkpoint(self, name: str) -> Path:
        return self.run.folder / f"{name}.safetensors"

    @property
    def origin(self) -> Path | None:
        """The checkpoint that it starts from; None from random weights.

        It is in a finished run folder, or else in starts/, which may hold copies of those that the result names.
        """
        if self.arm.start is None:
            return None
        name = f"{self.arm.start}-{self.seed}"
        made, copy = Run(self.out / "runs" / name), self.out / STARTS / f"{name}-{self.arm.checkpoint}.safetensors"
        finished = made.exists and made.finished
        return copy if copy.is_file() and not finished else made.folder / f"{self.arm.checkpoint}.safetensors"

    @property
    def can_start(self) -> bool:
        """Whether the weights that it starts from are there."""
        origin = self.origin
        if origin is None or origin.parent.name == STARTS:
            return True
        before = Run(origin.parent)
        return before.exists and before.finished

    @property
    def epochs(self) -> int:
        """How many epochs are trained."""
        return len(self.run.metrics) if self.run.exists else 0

    @property
    def trained(self) -> bool:
        return self.run.exists and self.run.finished

    def command(self, data: str, model: str | None, more: Sequence[str] = ()) -> list[str]:
        """The arguments of ``clat`` that train it; its recipe is written for them.

        Args:
            model: the network where the call names it and not the file
        """
        recipe = self.out / "recipes" / f"{self.name}.yaml"
        write_text(recipe, yaml.safe_dump(self.arm.settings(self.seed), sort_keys=False))
        rest = ["--data", data, "--out", str(self.run.folder), "--resume", *more]
        if self.origin is None:
            return ["train", str(recipe), "--model", self.arm.model, *rest]
        return ["finetune", str(recipe), "--from", str(self.origin), *(["--model", model] if model else []), *rest]


def check_folder(unit: Unit, data: str, start: Mapping[str, str] | None) -> None:
    """Refuses a run folder that lies in the unit's place and is of something else.

    Args:
        data: digest of the training images
        start: fingerprints of the weights that the unit begins with; None if they are not known
    Raises:
        InputError: another recipe, other data or other weights at the start
    """
    run, where = unit.run, plain(unit.run.folder)
    if not run.exists:
        return
    remedy = "move it away, or choose another --out"
    if keys := differing(unit.arm.settings(unit.seed), run.recipe):
        raise InputError(f"{where} holds a run with another {', '.join(keys)} than arm {unit.arm.name}; {remedy}.")
    if run.environment["data"]["sha256"] != data:
        raise InputError(f"{where} holds a run on other data than this comparison's; {remedy}.")
    if start is not None:
        began = run.start
        if any(began.get(name) != digest for name, digest in start.items()):
            origin = (
                f"seed {unit.seed}" if unit.origin is None else f"{unit.arm.start}-{unit.seed}/{unit.arm.checkpoint}"
            )
            raise InputError(f"{where} holds a run that began with other weights than those of {origin}; {remedy}.")


def fingerprints(source: Path | nn.Module) -> dict[str, str]:
    """A digest of each tensor of a checkpoint or network."""
    named = load_tensors(source)[0] if isinstance(source, Path) else tensors(source)
    return {name: fingerprint(tensor) for name, tensor in named.items()}


def finish(
    unit: Unit, comparison: Comparison, load: Load, open_checkpoint: Any, *, device: torch.device | str | None = None
) -> dict[str, Any]:
    """Evaluates a trained unit and writes its entry, which it returns.

    Args:
        load: gives a split of the data
        open_checkpoint: gives the network in a checkpoint
        device: where the network is attacked
    """
    evaluations = []
    for evaluation in comparison.evaluations:
        images = measured_on(comparison, evaluation, load)
        for checkpoint in unit.arm.evaluated:
            model = open_checkpoint(_there(unit, checkpoint))
            found = measure(model, images, evaluation, unit.run.folder / "evaluations", device)
            evaluations.append({"checkpoint": checkpoint, **found})
    last = partial(open_checkpoint, _there(unit, "last"))
    flops = training_flops(unit.run, load("train"), last, device)
    entry = {**_facts(unit), "flops": flops, "evaluations": evaluations}
    write_sealed(unit.entry, entry)
    return entry


def measure(
    model: nn.Module, images: Dataset, evaluation: Evaluation, record: Path, device: torch.device | str | None
) -> dict[str, Any]:
    """One ordinary evaluation, with its record in that folder, as the result keeps it."""
    attacks = attacks_of(evaluation, len(images.classes))
    precision = cast(Literal["fp32", "bf16"], evaluation.precision)
    found = evaluate(model, images, attacks, precision=precision, record=record, device=device)
    outcomes = np.array(found.outcomes)
    return {
        **identity(evaluation, images),
        "attack": found.attack,
        "clean": found.clean.correct,
        "robust": found.robust.correct,
        "seconds": found.seconds,
        "clean_images": pack(outcomes != -1),
        "robust_images": pack(outcomes == 0),
    }


def attacks_of(evaluation: Evaluation, classes: int) -> Sequence[Attack]:
    """The attacks of an evaluation."""
    if evaluation.tier == "apgd-ce":
        return [apgd_ce(evaluation.eps, seed=DRAWN_BY)]
    tier, starts = cast(TierName, evaluation.tier), evaluation.starts
    return make_tier(tier, evaluation.eps, classes, steps=evaluation.steps, starts=starts, seed=DRAWN_BY).attacks


def identity(evaluation: Evaluation, images: Dataset) -> dict[str, Any]:
    """What identifies an evaluation: how it is made, and on which images."""
    return {"evaluation": {**asdict(evaluation), "images": len(images)}, "images_sha256": images.digest()}


def _there(unit: Unit, checkpoint: str) -> Path:
    path = unit.checkpoint(checkpoint)
    if not path.is_file():
        average = "; only a recipe with average keeps one" if checkpoint == "averaged" else ""
        raise InputError(f"{plain(unit.run.folder)} has no {checkpoint} checkpoint{average}.")
    return path


def _facts(unit: Unit) -> dict[str, Any]:
    """What the run folder says."""
    run = unit.run
    result, metrics, environment = run.result, run.metrics, run.environment
    began = run.start
    names = load_header(run.last).shapes  # the network's own; start.json also has what is left out of checkpoints
    curves = [key for key in metrics[0] if key in CURVES]
    there = [name for name in ("best", "last", "averaged") if unit.checkpoint(name).is_file()]
    return {
        "arm": unit.arm.name,
        "seed": unit.seed,
        "recipe": resolved(run.recipe),
        "model": unit.arm.model,
        "data": environment["data"],
        "from": None if unit.arm.start is None else f"{unit.arm.start}/{unit.arm.checkpoint}",
        "start": digest_of({name: began[name] for name in names if name in began}),
        "weights": {name: digest_of(fingerprints(unit.checkpoint(name))) for name in there},
        "epochs": result["epochs"],
        "best": {key: result["best"][key] for key in ("epoch", "clean", "robust")},
        "trainable": result["trainable"],
        "parameters": result["parameters"],
        "selected": [_selected(selection) for selection in run.selections if selection.scores or selection.layers],
        "seconds": result["seconds"],
        "validation_seconds": round(sum(entry["validation_seconds"] for entry in metrics), 3),
        "peak_memory_bytes": max(entry["peak_memory_bytes"] for entry in metrics),
        "curves": {key: [round(entry[key], DIGITS) for entry in metrics] for key in curves},
        "environment": {key: environment.get(key) for key in _ENVIRONMENT},
    }


def _selected(selection: Selection) -> dict[str, Any]:
    """The layers, and what was measured of each one when they were chosen."""
    measured = {score.name: float(f"{score.criticality:.{DIGITS}g}") for score in selection.scores}
    return {"epoch": selection.epoch, "layers": list(selection.layers), "measured": measured}


def matches(entry: Entry, unit: Unit, data: str, start: Entry | None, wanted: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an entry is what the unit would find.

    Args:
        data: digest of the training images
        start: the entry of the arm that it starts from
        wanted: the ``identity`` of each evaluation
    """
    came_from = None if unit.arm.start is None else f"{unit.arm.start}/{unit.arm.checkpoint}"
    if entry["model"] != unit.arm.model or entry["data"]["sha256"] != data or entry["from"] != came_from:
        return False
    if differing(unit.arm.settings(unit.seed), entry["recipe"]):
        return False
    if came_from is not None and (start is None or start["weights"].get(unit.arm.checkpoint) != entry["start"]):
        return False
    return all(measured(entry, checkpoint, each) for checkpoint in unit.arm.evaluated for each in wanted)


def measured(entry: Entry, checkpoint: str, wanted: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The entry's evaluation of a checkpoint with that identity; None if it has none."""
    for found in entry["evaluations"]:
        if found["checkpoint"] == checkpoint and all(found[key] == value for key, value in wanted.items()):
            return found
    return None
