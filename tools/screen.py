"""Compares the settings that the paper leaves open, on held-out training images; writes results/screening.json.

    python tools/screen.py DATA RUNS [PART OF]    e.g. python tools/screen.py uoft-cs/cifar10 runs/screen

Base: ResNet-18 of width 16 after 5 epochs of PGD-AT. Each variant fine-tunes it for 1 epoch. What is done is not done
again, so the script can be killed and restarted; PART OF (such as 0 2) shares the variants between processes.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from clat import Recipe, build_model, load_data, train
from clat.checkpoint import load_checkpoint
from clat.evaluation.accuracy import Accuracy
from clat.objectives import Clat
from clat.report.words import percent
from clat.training.runs import Run
from clat.tuners import Critical


def clat(k: int = 1, **keys: Any) -> Recipe:
    """One epoch of CLAT on the k most critical layers; ``keys`` are the objective's."""
    return Recipe(objective=Clat(**keys), tuner=Critical(k=k), epochs=1, lr=0.01)


LETTER: dict[str, Any] = {"cross_entropy": "clean", "attack": "feature"}
MIXED: dict[str, Any] = {"cross_entropy": "adversarial", "attack": "feature"}
LABEL: dict[str, Any] = {"cross_entropy": "adversarial", "attack": "label"}

VARIANTS = {
    "letter-w.1-lr.01": clat(weight=0.1, **LETTER),
    "featadv-w.1-lr.01": clat(weight=0.1, **MIXED),
    "labadv-w0-lr.01": clat(weight=0.0, **LABEL),
    "labadv-w.1-lr.01": clat(weight=0.1, **LABEL),
    "letter-w.01-lr.01": clat(weight=0.01, **LETTER),
    "featadv-w.01-lr.01": clat(weight=0.01, **MIXED),
    "k2-w.1": clat(k=2, weight=0.1, **LABEL),
    "k2-w.01": clat(k=2, weight=0.01, **LABEL),
}


def main(source: str, runs: Path, part: int = 0, of: int = 1) -> None:
    data = load_data(source)
    base = Run(runs / "base")
    if not base.finished:
        mean, std = data.statistics()
        torch.manual_seed(0)
        train(
            Recipe(epochs=5), build_model("rn18", 10, width=16, mean=mean, std=std), data, out=base.folder, resume=True
        )
    for name in list(VARIANTS)[part::of]:
        model, _ = load_checkpoint(base.last)
        train(VARIANTS[name], model, data, out=runs / name, resume=True, origin="base")
    if part == 0:
        report(runs, base)


def report(runs: Path, base: Run) -> None:
    """Collects the finished runs: validation counts with 95 % Wilson intervals, one seed each."""
    rows = []
    for name in ["base", *VARIANTS]:
        run = Run(runs / name)
        if run.finished:
            last = run.result["last"]
            n = last["validation_images"]
            accuracies = {key: Accuracy(round(last[key] * n), n).to_json() for key in ("clean", "robust")}
            recipe = {key: run.recipe[key] for key in ("objective", "lr", "epochs", "clat", "threat")}
            layers = [selection.layers for selection in run.selections] if name in VARIANTS else None
            rows.append({"variant": name, **accuracies, "layers": layers, "recipe": recipe})
    about = {key: base.environment[key] for key in ("packages", "processor", "cores", "data", "parameters", "model")}
    about["attack"] = f"PGD-{base.recipe['validation_steps']}, linf, eps {base.recipe['threat']['eps']}, bf16"
    target = Path(__file__).parents[1] / "results/screening.json"
    target.write_text(json.dumps({"about": about, "seeds": 1, "rows": rows}, indent=1) + "\n")
    print("\n".join(markdown(rows)))


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """The table in docs/method.md, line by line."""
    lines = ["| cross-entropy | perturbation maximises | λ | k | clean | robust |", "|---|---|---|---|---|---|"]
    for row in rows:
        keys = row["recipe"]["clat"]
        if row["variant"] == "base":
            cells = ["before", "", "", ""]
        else:
            cells = [keys["cross_entropy"], keys["attack"], f"{keys['weight']:g}", str(len(row["layers"][0]))]
        lines.append(f"| {' | '.join([*cells, percent(row['clean']), percent(row['robust'])])} |")
    return lines


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
