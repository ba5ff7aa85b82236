"""PGD-AT and CLAT on few embedded images, small enough for two cores and six minutes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clat.attacks import pgd_threat
from clat.checkpoint import load_checkpoint
from clat.cli.tables import layer_rows, layer_table
from clat.compare.statistics import LEVEL, Outcomes, mcnemar, pack, unpack
from clat.criticality import layer_criticality
from clat.data.dataset import Dataset, to_unit
from clat.data.loading import load_data
from clat.evaluation.evaluate import evaluate
from clat.files import write_text
from clat.models import build_model
from clat.objectives import Clat
from clat.report.words import percent
from clat.text import plain
from clat.threat import Threat, attack_output
from clat.training.recipe import Recipe
from clat.training.runs import Run
from clat.training.train import train
from clat.tuners import Critical
from clat.tuners.order import ranked

WIDTH = 8  # channels of the first stage of ResNet-18
EVALUATION = pgd_threat("16/255", 20)

# So few images that PGD-AT learns them by heart. Chosen on held-out images, not on the test images of the table.
PRETRAIN = Recipe(
    epochs=20,
    batch_size=25,
    images=300,
    holdout=500,
    lr=0.05,
    schedule="constant",
    weight_decay=0.0,
    augment=False,
    threat=Threat(eps="16/255", step="8/255", steps=3),
    validation_steps=3,
)
FURTHER = replace(PRETRAIN, epochs=40, schedule="step", milestones=(31,))
CLAT = replace(FURTHER, objective=Clat(), tuner=Critical(k=1, every=10))


def run(out: Path, *, resume: bool = False, overwrite: bool = False, console: Console) -> None:
    """Pre-trains with PGD-AT, goes on once with PGD-AT and once with CLAT, and evaluates best and last of each."""
    training, test = load_data(split="train"), load_data(split="test")
    mean, std = training.statistics()
    torch.manual_seed(PRETRAIN.seed)
    model = build_model("rn18", len(training.classes), channels=1, width=WIDTH, mean=mean, std=std)
    images = f"{PRETRAIN.images} of {len(training):,} training images, {len(test):,} test images"
    console.print(f"{images}: {training.source}", highlight=False)

    def stage(name: str, recipe: Recipe, origin: Path | None) -> Run:
        console.print(Text.assemble("\n", (name, "bold"), plain(f": {recipe.epochs} epochs into {out / name}")))
        network = load_checkpoint(origin)[0] if origin else model
        made = train(
            recipe,
            network,
            training,
            out=out / name,
            resume=resume,
            overwrite=overwrite,
            origin=str(origin) if origin else None,
            console=console,
        )
        console.print(made.in_words(), markup=False, highlight=False)
        return made

    base = stage("pgd-at", PRETRAIN, None)
    _show_critical(base, training, console)
    arms = {"PGD-AT": stage("pgd-at-further", FURTHER, base.last), "CLAT": stage("clat", CLAT, base.last)}

    console.print("\nEvaluating the best and the last epoch of each on the test images ...", highlight=False)
    rows = _rows(f"PGD-AT, {PRETRAIN.epochs} epochs", base, test)
    for name, arm in arms.items():
        rows += _rows(f"  + {name}, {FURTHER.epochs} epochs", arm, test)
    write_text(out / "demo.json", json.dumps(rows, indent=2) + "\n")
    console.print(_table(rows))
    console.print(meaning(*[unpack(row["right"]) for row in rows[2:]]), markup=False, highlight=False)
    where = plain(out)
    console.print(
        f"Robust: {EVALUATION.steps}-step PGD, linf, eps 16/255, fp32; 95 % Wilson intervals; one seed, a toy scale.\n"
        f"Run folders: {where}/pgd-at, {where}/pgd-at-further, {where}/clat. Look into one with: clat status "
        f"{where}/clat",
        markup=False,
        highlight=False,
    )


def meaning(pgd_best: Outcomes, pgd_last: Outcomes, clat_best: Outcomes, clat_last: Outcomes) -> str:
    """One sentence on the images that each network gets right under attack, bool (images,).

    McNemar's exact test says whether the images on which two networks differ may do so by chance.
    """
    fell = mcnemar(*_only(pgd_best, pgd_last))
    overfitted = "overfitted" if fell.first > fell.second and fell.p < LEVEL else "did not overfit by more than chance"
    pgd = _difference(pgd_last, pgd_best, "gained", "lost")
    clat = _difference(clat_last, clat_best, "gained", "lost")
    last = _difference(clat_last, pgd_last, "ahead by", "behind by")
    best = _difference(clat_best, pgd_best, "ahead by", "behind by")
    return (
        f"PGD-AT {overfitted}: from its best epoch to its last it {pgd} of robust accuracy, and CLAT {clat}; at the "
        f"last epoch CLAT is {last}, and at the best {best}."
    )


def _only(first: Outcomes, second: Outcomes) -> tuple[int, int]:
    """How many images only the first network gets right, and only the second."""
    return int((first & ~second).sum()), int((second & ~first).sum())


def _difference(first: Outcomes, second: Outcomes, more: str, less: str) -> str:
    """By how many points the first network is better or worse, and whether that may be chance."""
    pair = mcnemar(*_only(first, second))
    points = 100 * (pair.first - pair.second) / len(first)
    p = "p < 0.001" if pair.p < 0.001 else f"p {pair.p:.3f}"
    chance = ", may be chance" if pair.p >= LEVEL else ""
    return f"{more if points >= 0 else less} {abs(points):.1f} points ({p}{chance})"


def _show_critical(run: Run, training: Dataset, console: Console) -> None:
    """The five most critical layers of the pre-trained network."""
    model, _ = load_checkpoint(run.last)
    pixels, y = next(training.batches(100))
    x = to_unit(pixels)
    scores = layer_criticality(model, x, attack_output(model, x, y, PRETRAIN.threat))
    size = sum(parameter.numel() for parameter in model.parameters())
    console.print()
    console.print(layer_table(layer_rows(scores)[:5], size, f"The 5 most critical of {len(ranked(scores))} layers"))


def _rows(name: str, run: Run, test: Dataset) -> list[dict[str, Any]]:
    """The best and the last epoch of a run on the test images."""
    rows: list[dict[str, Any]] = []
    for which, path in (("best", run.best), ("last", run.last)):
        model, facts = load_checkpoint(path)
        result = evaluate(model, test, EVALUATION)
        rows.append(
            {
                "network": name if which == "best" else "",
                "checkpoint": which,
                "epoch": facts["epoch"],
                "clean": result.clean.to_json(),
                "robust": result.robust.to_json(),
                "right": pack(np.array(result.outcomes) == 0),
                "trainable": run.result["trainable"],
                "parameters": run.result["parameters"],
                "seconds": run.result["seconds"],
                "run": str(run.folder),
            }
        )
    return rows


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold")
    for heading in ("", "epoch", "clean %", "robust %", "trained parameters", "seconds"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        share = 100 * row["trainable"] / row["parameters"]
        last = row["checkpoint"] == "last"
        trained = "" if last else f"{row['trainable']:,} ({share:.1f} %)"
        cells = [percent(row[key]) for key in ("clean", "robust")]
        epoch = f"{row['checkpoint']} {row['epoch']}"
        table.add_row(row["network"], epoch, *cells, trained, "" if last else f"{row['seconds']:.0f}")
    return table
