"""Every objective and tuner at a small scale, then CLAT on top of each; writes results/methods.json and its table.

    python tools/compare_methods.py DATA RUNS [METHOD ...]     e.g. ... uoft-cs/cifar10 runs/methods pgd-at trades

Each method trains a ResNet-18 of width 16 for 3 epochs on 5,000 images (--scale small, 5 attack steps in place of 10;
the fine-tuning ones start from pgd-at), then `clat` fine-tunes its last checkpoint for 2. What is done is not done
again, so that the methods can be shared out among processes. This shows that each method runs and learns, not how good
it is: no method is tuned for so short a run.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from clat import evaluate, load_data
from clat.attacks import pgd_threat
from clat.checkpoint import load_checkpoint
from clat.evaluation.accuracy import Accuracy
from clat.training.runs import Run

BASE = "pgd-at"
FROM_SCRATCH = (BASE, "clean", "trades", "mart", "score", "awp", "fast-at", "free-at", "grad-align")
FINE_TUNED = ("rift", "convlora", "clat", "clat-paper", "clat-fast")  # from BASE
ON_TOP = {name: f"{name}+clat" for name in (*FROM_SCRATCH, "rift", "convlora")}
STEPS = 5  # of the training attack, where the recipe has ten
ONE_STEP = ("clean", "fast-at", "free-at", "grad-align", "clat-fast")
EXTRA = {
    "awp": ["--awp.warmup", "2"],  # from the first step on, two epochs end at chance: see docs/baselines.md
    "free-at": ["--epochs", "1"],  # 8 replays of each batch
    "rift": ["--rift.batch", "500"],  # of 10,000, which take ten passes for each layer
}
TEST_IMAGES = 1000
TARGET = Path(__file__).parents[1] / "results/methods.json"


def main(source: str, runs: Path, methods: list[str]) -> None:
    test = load_data(source, "test")
    for name in methods or (*FROM_SCRATCH, *FINE_TUNED):
        start = ["--model", "rn18,width=16"] if name in FROM_SCRATCH else ["--from", _last(runs / BASE)]
        command = "train" if name in FROM_SCRATCH else "finetune"
        _run(command, name, start, source, runs / name, EXTRA.get(name, []))
        _measure(Run(runs / name), test)
        if name in ON_TOP:
            on_top = ["--from", _last(runs / name)]
            _run("finetune", "clat", on_top, source, runs / ON_TOP[name], ["--epochs", "2"])
            _measure(Run(runs / ON_TOP[name]), test)
        report(runs)


def _run(command: str, recipe: str, start: list[str], source: str, out: Path, more: list[str]) -> None:
    fixed = ["--data", source, "--out", str(out), "--scale", "small", "--validation_steps", str(STEPS), "--resume"]
    if recipe not in ONE_STEP:
        fixed += ["--threat.steps", str(STEPS)]
    subprocess.run([sys.executable, "-m", "clat", command, recipe, *start, *fixed, *more], check=True)


def _last(folder: Path) -> str:
    return str(folder / "last.safetensors")


def _accuracies(run: Run) -> Path:
    return run.folder.with_suffix(".test.json")


def _measure(run: Run, test: Any) -> None:
    """Test accuracies of the last checkpoint, kept beside the run."""
    if not _accuracies(run).is_file():
        model, _ = load_checkpoint(run.last)
        found = evaluate(model, test.sample(TEST_IMAGES), pgd_threat("8/255", 20))
        _accuracies(run).write_text(json.dumps({"clean": found.clean.correct, "robust": found.robust.correct}))


def _row(run: Run) -> dict[str, Any]:
    counts, metrics = json.loads(_accuracies(run).read_text()), run.metrics
    return {
        "method": run.folder.name,
        **{key: Accuracy(counts[key], TEST_IMAGES).to_json() for key in ("clean", "robust")},
        "seconds_per_epoch": round(sum(entry["seconds"] for entry in metrics) / len(metrics), 1),
        "peak_memory_bytes": max(entry["peak_memory_bytes"] for entry in metrics),
        "trainable": run.result["trainable"],
        "layers": [list(selection.layers) for selection in run.selections] if "clat" in run.folder.name else None,
        "loss": [round(entry["loss"], 4) for entry in metrics],
    }


def report(runs: Path) -> None:
    """Writes the rows of all that is done so far."""
    names = [name for method in (*FROM_SCRATCH, *FINE_TUNED) for name in (method, ON_TOP.get(method)) if name]
    rows = [_row(run) for run in map(Run, (runs / name for name in names)) if _accuracies(run).is_file()]
    base = Run(runs / BASE)
    about = {key: base.environment[key] for key in ("packages", "processor", "cores", "threads", "parameters", "data")}
    about["training_attack_steps"] = STEPS
    about["timing"] = "one thread each, beside up to three other jobs on two cores"
    about["precision"] = base.recipe["precision"]
    about["attack"] = f"PGD-20, linf, eps 8/255, fp32, on {TEST_IMAGES} test images drawn at random, seed 0"
    TARGET.write_text(json.dumps({"about": about, "seeds": 1, "rows": rows}, indent=1) + "\n")
    print("\n".join(markdown(rows)), flush=True)


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """The table in docs/baselines.md, line by line."""
    lines = ["| method | clean | PGD-20 | s / epoch | peak MiB | trainable |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = []
        for key in ("clean", "robust"):
            half = 50 * (row[key]["high"] - row[key]["low"])
            cells.append(f"{100 * row[key]['accuracy']:.1f} ± {half:.1f}")
        memory = f"{row['peak_memory_bytes'] / 2**20:,.0f}"
        cells += [f"{row['seconds_per_epoch']:.0f}", memory, f"{row['trainable']:,}"]
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
