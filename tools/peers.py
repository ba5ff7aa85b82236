"""Our attacks beside those of torchattacks, foolbox and pyautoattack, at equal settings; writes results/peers.json.

    python tools/peers.py NAME DATA CHECKPOINT [IMAGES [AUTOATTACK_IMAGES]]     e.g. ... base uoft-cs/cifar10 runs/base

On an adversarially trained network and on the cleanly trained ResNet-18 in the pyautoattack wheel, both of CIFAR-10, on
512 test images drawn at random: PGD-20 at eps 8/255, from the images themselves and from one random start, whose robust
accuracies should lie within a point of each other; APGD-CE, then the whole of AutoAttack, through ``evaluate`` and by
pyautoattack itself, which should leave the very same images. What is done is not done again.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from pyautoattack import AutoAttack
from torch import nn

from clat import evaluate, load_data
from clat.attacks import Attack, apgd_ce, autoattack, pgd_threat
from clat.checkpoint import load_checkpoint
from clat.compute import best_device, seeded
from clat.data.dataset import Dataset, to_unit
from clat.evaluation.accuracy import Accuracy
from clat.files import write_text
from clat.models.importing import import_weights
from clat.network import Images, Labels, predict, weights_digest
from clat.threat import Threat, attack_output
from clat.training.environment import environment

TARGET = Path(__file__).parents[1] / "results/peers.json"
BATCH = 128

Pgd = Callable[[nn.Module, Images, Labels, Threat], Images]


def by_torchattacks(model: nn.Module, x: Images, y: Labels, threat: Threat) -> Images:
    """PGD of torchattacks; under linf its random start is ours if the seed is the same."""
    import torchattacks

    kind = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[threat.norm]
    random = threat.start == "uniform"
    return kind(model, eps=threat.radius, alpha=threat.step, steps=threat.steps, random_start=random)(x, y)


def by_foolbox(model: nn.Module, x: Images, y: Labels, threat: Threat) -> Images:
    """PGD of foolbox."""
    import foolbox

    kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[threat.norm]
    attack = kind(abs_stepsize=threat.step, steps=threat.steps, random_start=threat.start == "uniform")
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    return attack.run(wrapped, x, foolbox.criteria.Misclassification(y), epsilon=threat.radius)


PGDS: dict[str, Pgd] = {
    "clat": partial(attack_output, keep="best"),
    "torchattacks": by_torchattacks,
    "foolbox": by_foolbox,
}


def robust(model: nn.Module, data: Dataset, attack: Pgd, threat: Threat, device: str = "cpu") -> list[bool]:
    """Which images are classified correctly clean and after the attack; each batch starts from seed 0."""
    right: list[bool] = []
    for pixels, y in data.to(device).batches(BATCH):
        x = to_unit(pixels)
        with seeded(0, device):
            x_adv = attack(model, x, y, threat)
        right += ((predict(model, x) == y) & (predict(model, x_adv) == y)).tolist()
    return right


def by_pyautoattack(
    model: nn.Module,
    data: Dataset,
    eps: float,
    attacks: list[str] | None = None,
    *,
    norm: Literal["linf", "l2"] = "linf",
    batch_size: int = BATCH,
    device: str = "cpu",
    shorten: Callable[[AutoAttack], None] = lambda _: None,
) -> list[bool]:
    """Which images withstand pyautoattack, called as its documentation says, with seed 0.

    Args:
        attacks: default those of its standard version
        shorten: sets numbers of iterations
    """
    kind: dict[str, Any] = {"version": "custom", "attacks": attacks} if attacks else {"version": "standard"}
    adversary = AutoAttack(model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=0, device=device, **kind)
    adversary.apgd.n_restarts = adversary.fab.n_restarts = 1  # as the standard version sets
    shorten(adversary)
    pixels, y = next(data.to(device).batches(len(data), workers=0))
    with seeded(0, device):
        _, predicted = adversary.run_standard_evaluation(to_unit(pixels), y, batch_size=batch_size)
    return (predicted == y).tolist()


def through_evaluate(
    model: nn.Module, data: Dataset, attacks: Sequence[Attack], *, batch_size: int = BATCH, device: str = "cpu"
) -> list[bool]:
    """Which images withstand the attacks of ``evaluate``."""
    found = evaluate(model, data, attacks, batch_size=batch_size, device=device)
    return [outcome == 0 for outcome in found.outcomes]


def agreement(ours: list[bool], theirs: list[bool]) -> dict[str, Any]:
    """Both robust accuracies, how many points they are apart, and on how many images they disagree."""
    n = len(ours)
    return {
        "clat": Accuracy(sum(ours), n).to_json(),
        "peer": Accuracy(sum(theirs), n).to_json(),
        "points_apart": round(100 * abs(sum(ours) - sum(theirs)) / n, 3),
        "images_that_differ": sum(a != b for a, b in zip(ours, theirs, strict=True)),
    }


def parts(model: nn.Module, data: Dataset, few: Dataset, eps: float, device: str) -> dict[str, Callable[[], Any]]:
    """Each comparison by name; AutoAttack's are on the ``few`` images."""

    def pgds(start: Literal["zero", "uniform"]) -> dict[str, Any]:
        threat = replace(pgd_threat(eps, 20), start=start)
        right = {name: robust(model, data, attack, threat, device) for name, attack in PGDS.items()}
        return {name: agreement(right["clat"], right[name]) for name in ("torchattacks", "foolbox")}

    classes = len(data.classes)
    tiers = {"APGD-CE": ([apgd_ce(eps)], ["apgd-ce"]), "AutoAttack": (autoattack(eps, classes), None)}

    def tier(name: str) -> dict[str, Any]:
        ours, theirs = tiers[name]
        return agreement(
            through_evaluate(model, few, ours, device=device), by_pyautoattack(model, few, eps, theirs, device=device)
        )

    return {
        "PGD-20 from the images": lambda: pgds("zero"),
        "PGD-20 from a random start": lambda: pgds("uniform"),
        **{f"{name} as in pyautoattack": partial(tier, name) for name in tiers},
    }


def compare(networks: dict[str, nn.Module], data: Dataset, few: Dataset, target: Path, eps: float = 8 / 255) -> None:
    """Runs what ``target`` does not have yet and writes it after each comparison."""
    device = best_device()
    about = environment(torch.device(device))
    del about["started"], about["command"]
    about["packages"] |= {name: version(name) for name in ("torchattacks", "foolbox", "pyautoattack")}
    about |= {"data": data.source, "split": data.split, "digests": [data.digest()[:16], few.digest()[:16]], "eps": eps}
    found: dict[str, Any] = {"about": about, "networks": {}}
    if target.exists() and (before := json.loads(target.read_text()))["about"] == about:
        found = before
    for name, model in networks.items():
        model.to(device).eval()
        done = found["networks"].setdefault(name, {"weights": weights_digest(model)})
        for part, run in parts(model, data, few, eps, device).items():
            if part not in done:
                start = time.perf_counter()
                done[part] = {**run(), "seconds": round(time.perf_counter() - start, 1)}
                write_text(target, json.dumps(found, indent=1) + "\n")
                print(name, part, json.dumps(done[part]), flush=True)


def main(name: str, source: str, checkpoint: str, images: int = 512, autoattack_images: int = 512) -> None:
    test = load_data(source, "test")
    wheel = find_spec("pyautoattack")
    assert wheel is not None
    assert wheel.origin is not None
    clean = import_weights(Path(wheel.origin).parent / "examples/model_test.pt", "rn18").model
    networks = {name: load_checkpoint(checkpoint)[0], "pyautoattack/examples/model_test.pt": clean}
    compare(networks, test.sample(images), test.sample(autoattack_images), TARGET)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
