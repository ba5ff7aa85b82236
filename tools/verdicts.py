"""The verdict of clat trust on a CLAT run, and the adaptive attack's figure beside AutoAttack's.

    python tools/verdicts.py NAME RUN BASE DATA EPS [IMAGES]     adds NAME to results/verdicts.json; then make docs

PGD-20, AutoAttack (standard) and the attack through the selected layers run apart from each other on the same test
images, drawn at random; so do their worst cases together. The trust battery runs on its own default number of images.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from clat import evaluate, load_data, trust
from clat.attacks import autoattack, pgd_threat, restarts, through_layers
from clat.checkpoint import load_checkpoint
from clat.evaluation.accuracy import worst_case
from clat.files import write_text
from clat.training.environment import environment
from clat.training.runs import Run

TARGET = Path(__file__).parents[1] / "results/verdicts.json"


def main(name: str, run: str, base: str, source: str, eps: str, images: int = 256) -> None:
    model = load_checkpoint(run)[0]
    test = load_data(source, "test")
    layers = Run(Path(run)).selected
    verdict = trust(model, test, eps, base=load_checkpoint(base)[0], layers=layers, budget=60)
    print(verdict.text, flush=True)
    few = test.sample(images)
    attacks = {
        "PGD-20": restarts(pgd_threat(eps, 20)),
        "through the selected layers": [through_layers(layers, eps)],
        "AutoAttack": autoattack(eps, len(test.classes)),
    }
    found = {}
    for attack, parts in attacks.items():
        found[attack] = evaluate(model, few, parts)
        print(attack, found[attack].robust, flush=True)
    row: dict[str, Any] = {
        "about": environment(torch.device("cpu"), argv=["verdicts.py", name, eps, str(images)]),
        "recipe": Run(Path(run)).recipe,
        "selected": layers,
        "verdict": verdict.to_json(),
        "clean": found["PGD-20"].clean.to_json(),
        "attacks": {attack: result.to_json() for attack, result in found.items()},
        "worst_case": worst_case(list(found.values())).to_json(),
    }
    rows = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    write_text(TARGET, json.dumps({**rows, name: row}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:6], *map(int, sys.argv[6:]))
