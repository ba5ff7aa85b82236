"""CLAT with cheaper attacks, judged by robust accuracy at equal time; writes results/cheaper.json.

    python tools/cheaper.py DATA BASE RUNS [SEED ...]     e.g. ... uoft-cs/cifar10 runs/base runs/cheaper 0 1

Each variant fine-tunes BASE on 5,000 of its training images, for as many epochs as the time of two epochs with the
recipe's ten steps allows (by the shares of results/bench.json), or for two epochs too, which takes less time then. They
are judged under PGD-20 on 2,000 training images that neither BASE nor any variant has trained on or was chosen on; the
test split is not touched. What is done is not done again, so seeds can be shared out among processes.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from clat import evaluate, load_data
from clat.attacks import pgd_threat
from clat.checkpoint import load_checkpoint
from clat.data.dataset import Dataset
from clat.evaluation.accuracy import Accuracy
from clat.files import write_text
from clat.report.words import percent
from clat.training.runs import Run

FEATURE = ("--clat.attack", "feature")
# name: epochs, flags; the first one is clat.yaml as it is
VARIANTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "10 steps": (2, ()),
    "2 steps, 2 epochs": (2, ("--threat.steps", "2", "--threat.step", "0.02")),
    "2 steps, 7 epochs": (7, ("--threat.steps", "2", "--threat.step", "0.02")),
    "10 feature steps, 2 epochs": (2, FEATURE),
    "4 feature steps, 2 epochs": (2, (*FEATURE, "--threat.steps", "4", "--threat.step", "0.014")),
}
IMAGES, JUDGED = 5000, 2000
TARGET = Path(__file__).parents[1] / "results/cheaper.json"


def main(source: str, base: Path, runs: Path, seeds: list[int]) -> None:
    judges = unseen(load_data(source, "train"), Run(base))
    judge(base / "last.safetensors", runs / "base.json", judges)
    for seed in seeds:
        for name, (epochs, flags) in VARIANTS.items():
            out = runs / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            fixed = ["--from", str(base / "last.safetensors"), "--data", source, "--out", str(out), "--resume"]
            fixed += ["--images", str(IMAGES), "--seed", str(seed), "--epochs", str(epochs), "--validation_steps", "2"]
            subprocess.run([sys.executable, "-m", "clat", "finetune", "clat", *fixed, *flags], check=True)
            judge(out / "last.safetensors", out.with_suffix(".json"), judges, run=Run(out))
            write_text(TARGET, json.dumps(report(runs, base), indent=1) + "\n")


def unseen(data: Dataset, base: Run) -> Dataset:
    """Training images that the base has neither trained on nor been chosen on."""
    recipe = base.recipe
    training, _ = data.hold_out(recipe["holdout"], recipe["holdout_seed"])
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(recipe["holdout_seed"]))
    return training.subset(order[recipe["images"] :][:JUDGED])


def judge(checkpoint: Path, target: Path, judges: Dataset, run: Run | None = None) -> None:
    if not target.exists():
        found = evaluate(load_checkpoint(checkpoint)[0], judges, pgd_threat("8/255", 20))
        facts = {"outcomes": [outcome == 0 for outcome in found.outcomes], "clean": found.clean.correct}
        if run is not None:
            facts |= {"seconds": run.result["seconds"], "selected": run.selections[-1].layers}
        write_text(target, json.dumps(facts))


def report(runs: Path, base: Path) -> dict[str, Any]:
    """Each variant's accuracies, and how many images it gains and loses beside BASE and the ten steps of its seed."""
    start = json.loads((runs / "base.json").read_text())
    about = Run(base).environment
    found: dict[str, Any] = {
        "about": {key: about[key] for key in ("packages", "processor", "cores", "model", "data")},
        "base": {"recipe": Run(base).recipe, "result": Run(base).result["last"]},
        "images": IMAGES,
        "judged": JUDGED,
        "attack": "PGD-20, eps 8/255",
        "start": {"clean": start["clean"], "robust": Accuracy(sum(start["outcomes"]), JUDGED).to_json()},
        "rows": [],
    }
    for name, (epochs, flags) in VARIANTS.items():
        stem = name.replace(" ", "-").replace(",", "")
        paths = [path for path in sorted(runs.glob("*.json")) if path.stem.rsplit("-", 1)[0] == stem]
        each = []
        for path in paths:
            seed = path.stem.rsplit("-", 1)[1]
            facts = json.loads(path.read_text())
            plain = json.loads((runs / f"10-steps-{seed}.json").read_text())["outcomes"]
            each.append(
                {
                    "seed": int(seed),
                    "clean": facts["clean"],
                    "robust": sum(facts["outcomes"]),
                    "beside_start": _changed(facts["outcomes"], start["outcomes"]),
                    "beside_ten_steps": _changed(facts["outcomes"], plain),
                    "selected": facts["selected"],
                    "seconds": facts["seconds"],
                }
            )
        if each:
            mean = {key: round(statistics.mean(e[key] for e in each) / JUDGED, 5) for key in ("clean", "robust")}
            found["rows"].append({"variant": name, "epochs": epochs, "flags": list(flags), **mean, "seeds": each})
    return found


def _changed(now: list[bool], before: list[bool]) -> dict[str, int]:
    """How many images withstand the attack only now, and how many only before."""
    pairs = list(zip(now, before, strict=True))
    return {"gained": sum(a and not b for a, b in pairs), "lost": sum(b and not a for a, b in pairs)}


def markdown(found: dict[str, Any]) -> list[str]:
    """The table in docs/performance.md, line by line."""
    n, start = found["judged"], found["start"]
    lines = ["| training attack | epochs | seed | clean | robust | beside before | beside 10 steps |"]
    lines.append("|---|---|---|---|---|---|---|")
    clean = f"{100 * start['clean'] / n:.1f}"
    lines.append(f"| before |  |  | {clean} | {percent(start['robust'])} |  |  |")
    for row in found["rows"]:
        for each in row["seeds"]:
            robust = percent(Accuracy(each["robust"], n).to_json())
            sides = [f"+{each[key]['gained']} -{each[key]['lost']}" for key in ("beside_start", "beside_ten_steps")]
            sides[1] = "" if row is found["rows"][0] else sides[1]
            cells = f"{each['seed']} | {100 * each['clean'] / n:.1f} | {robust} | {' | '.join(sides)}"
            lines.append(f"| {row['variant'].split(',')[0]} | {row['epochs']} | {cells} |")
    return lines


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), list(map(int, sys.argv[4:])) or [0])
