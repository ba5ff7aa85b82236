"""The whole way on embedded data, small enough for two cores and a few minutes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clat.attacks import pgd_threat
from clat.checkpoint import load_checkpoint
from clat.cli.tables import layer_rows, layer_table
from clat.criticality import layer_criticality, ranked
from clat.data.dataset import Dataset, to_unit
from clat.data.loading import load_data
from clat.evaluation.accuracy import Result
from clat.evaluation.evaluate import evaluate
from clat.files import write_text
from clat.models import build_model
from clat.objectives import Clat
from clat.report.words import percent
from clat.text import plain
from clat.threat import Threat, attack_output
from clat.training.loop import train
from clat.training.recipe import Recipe
from clat.training.runs import Run
from clat.tuners import Critical

WIDTH = 8  # channels of the first stage of ResNet-18
EVALUATION = pgd_threat("16/255", 20)

# Chosen on held-out training images, not on the test images that the table shows.
PRETRAIN = Recipe(epochs=8, lr=0.1, threat=Threat(eps="16/255", step="4/255", steps=7), holdout=500)
FURTHER = replace(PRETRAIN, epochs=4, lr=0.02)
CLAT = replace(FURTHER, objective=Clat(), tuner=Critical(k=1, every=2))


def run(out: Path, *, resume: bool = False, overwrite: bool = False, console: Console) -> None:
    """Pre-trains with PGD-AT, continues once with CLAT and once with PGD-AT for as long, and evaluates all three."""
    training, test = load_data(split="train"), load_data(split="test")
    mean, std = training.statistics()
    torch.manual_seed(PRETRAIN.seed)
    model = build_model("rn18", len(training.classes), channels=1, width=WIDTH, mean=mean, std=std)
    console.print(f"{len(training):,} training and {len(test):,} test images of {training.source}", highlight=False)

    def stage(name: str, recipe: Recipe, origin: Path | None) -> Run:
        console.print(Text.assemble("\n", (name, "bold"), plain(f": {recipe.epochs} epochs into {out / name}")))
        network = load_checkpoint(origin)[0] if origin else model
        return train(
            recipe,
            network,
            training,
            out=out / name,
            resume=resume,
            overwrite=overwrite,
            origin=str(origin) if origin else None,
            console=console,
        )

    base = stage("pgd-at", PRETRAIN, None)
    _show_critical(base, training, console)
    clat = stage("clat", CLAT, base.last)
    further = stage("pgd-at-further", FURTHER, base.last)

    console.print("\nEvaluating the last checkpoint of each on the test images ...", highlight=False)
    rows = [
        _row(f"PGD-AT, {PRETRAIN.epochs} epochs", base, test),
        _row(f"  + CLAT, {CLAT.epochs} epochs", clat, test),
        _row(f"  + PGD-AT, {FURTHER.epochs} epochs", further, test),
    ]
    write_text(out / "demo.json", json.dumps(rows, indent=2) + "\n")
    console.print(_table(rows))
    where = plain(out)
    console.print(
        f"Robust: {EVALUATION.steps}-step PGD, linf, eps 16/255, fp32; 95 % Wilson intervals; one seed, a toy scale.\n"
        f"Run folders: {where}/pgd-at, {where}/clat, {where}/pgd-at-further. Look into one with: clat status "
        f"{where}/clat",
        markup=False,
        highlight=False,
    )


def _show_critical(run: Run, training: Dataset, console: Console) -> None:
    """The five most critical layers of the pre-trained network."""
    model, _ = load_checkpoint(run.last)
    pixels, y = next(training.batches(100))
    x = to_unit(pixels)
    scores = layer_criticality(model, x, attack_output(model, x, y, PRETRAIN.threat))
    size = sum(parameter.numel() for parameter in model.parameters())
    console.print()
    console.print(layer_table(layer_rows(scores)[:5], size, f"The 5 most critical of {len(ranked(scores))} layers"))


def _row(name: str, run: Run, test: Dataset) -> dict[str, Any]:
    model, _ = load_checkpoint(run.last)
    result: Result = evaluate(model, test, EVALUATION)
    return {
        "network": name,
        "clean": result.clean.to_json(),
        "robust": result.robust.to_json(),
        "trainable": run.result["trainable"],
        "parameters": run.result["parameters"],
        "seconds": run.result["seconds"],
        "run": str(run.folder),
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold")
    for heading in ("", "clean %", "robust %", "trainable parameters", "training seconds"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        share = 100 * row["trainable"] / row["parameters"]
        cells = [percent(row[key]) for key in ("clean", "robust")]
        table.add_row(row["network"], *cells, f"{row['trainable']:,} ({share:.1f} %)", f"{row['seconds']:.0f}")
    return table
