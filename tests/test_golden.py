"""Two training steps of every method and recipe give the recorded numbers, bit for bit.

A record says what restructuring the code must not change: the loss by terms, the held-out counts, the selected layers
and a fingerprint of all weights. Machines round differently, so there is a record for each kind of machine. On a kind
that has none, losses may differ by 1e-3 of their size from one of the records, and fingerprints are not compared. To
compare bits there, write the record at the commit before the change, then test the change against it.

``python tests/test_golden.py --write`` writes the record of this machine's kind. Do it only when numbers are
meant to change (the CHANGELOG then says so) or when a method or recipe is added, and read the difference: entries of
methods that were not touched must not move.
"""

import hashlib
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
import yaml
from torch import Tensor, nn

from clat import Dataset, Recipe, build_model, train
from clat.checkpoint import load_checkpoint
from clat.cli.arguments import parse
from clat.cli.commands import COMMANDS
from clat.training.environment import environment

torch.set_num_threads(1)

RECORDS = sorted(Path(__file__).parent.glob("golden-*.json"))  # one for each set of vector instructions
RECIPES = Path(__file__).parents[1] / "recipes"
TOLERANCE = 1e-3  # of the loss on another kind of machine; AVX2 and SSE4.1 differ by up to 2e-4 after two steps

Keys = dict[str, Any]

ONE_STEP = {"eps": "8/255", "step": "10/255", "steps": 1}
OBJECTIVES: dict[str, Keys] = {
    "clean": {},
    "pgd-at": {},
    "trades": {"threat": {"start": "gaussian"}},
    "mart": {"threat": {"start": "gaussian"}},
    "score": {},
    "fast-at": {"threat": ONE_STEP},
    "free-at": {"threat": {**ONE_STEP, "step": "8/255", "start": "zero"}, "free_at": {"replays": 2}},
    "grad-align": {"threat": {**ONE_STEP, "start": "zero", "mode": "batch"}},
    "clat": {"clat": {"weight": 0.1}},
}
TUNERS: dict[str, Keys] = {
    "whole": {},
    "critical": {"critical": {"k": 2, "norm_affine": True, "norm_statistics": "selected"}},
    "rift": {"rift": {"batch": 8, "passes": 1}},
    "convlora": {"convlora": {"rank": 2}},
}
OTHER: dict[str, Keys] = {
    "the letter, selected twice, momentum kept, restarted": {
        "objective": "clat",
        "tuner": "critical",
        "epochs": 2,
        "clat": {"weight": 0.1, "cross_entropy": "clean", "attack": "feature"},
        "critical": {"k": 3, "every": 1, "optimizer_state": "keep", "lr_schedule": "restart", "norm_statistics": "all"},
    },
    "relative distance after the activation, both cross-entropies": {
        "objective": "clat",
        "tuner": "critical",
        "clat": {"weight": 0.1, "cross_entropy": "both", "distance": "relative", "at": "activation"},
        "critical": {"k": 0.25, "norm": "rms", "at": "activation", "head": True},
    },
    "random layers": {"objective": "clat", "tuner": "critical", "critical": {"k": 4, "ranking": "random"}},
    "lowest layers": {"objective": "trades", "tuner": "critical", "critical": {"k": 4, "ranking": "lowest"}},
    "AWP, EMA and clipping on critical layers": {
        "objective": "clat",
        "tuner": "critical",
        "critical": {"k": 3},
        "awp": {"gamma": 0.01},
        "average": {"kind": "ema", "decay": 0.9},
        "clip": 0.5,
    },
    "SWA of ConvLoRA": {"objective": "pgd-at", "tuner": "convlora", "average": {"kind": "swa"}, "epochs": 2},
    "l2, mean distance, Nesterov, no decay of norms": {
        "objective": "clat",
        "clat": {"weight": 0.1, "distance": "mean"},
        "threat": {"norm": "l2", "eps": 0.5, "step": 0.1, "mode": "train"},
        "nesterov": True,
        "decay": "no_norm",
    },
    "steps, AdamW": {"objective": "pgd-at", "epochs": 2, "schedule": "step", "milestones": [2], "optimizer": "adamw"},
    "cyclic, momentum cycled": {"objective": "pgd-at", "epochs": 2, "schedule": "cyclic", "cycle_momentum": True},
    "SCORE around PGD-AT": {"objective": "score", "score": {"form": "pgd-at"}, "seed": 3, "holdout_seed": 1},
    **{
        f"ranking {ranking}": {"objective": "clat", "tuner": "critical", "critical": {"k": 3, "ranking": ranking}}
        for ranking in ("relative", "loss", "alignment", "gradient")
    },
    "a teacher, both cross-entropies": {
        "objective": "clat",
        "tuner": "critical",
        "epochs": 2,
        "clat": {"weight": 0.1, "teacher": 0.6, "cross_entropy": "both"},
        "critical": {"k": 3},
    },
    "the latent attack, AWP": {
        "objective": "clat",
        "tuner": "critical",
        "clat": {"weight": 0.1, "attack": "latent"},
        "critical": {"k": 3},
        "awp": {"gamma": 0.01},
    },
    "warm starts": {"objective": "pgd-at", "epochs": 3, "warm_start": True, "threat": {"steps": 1, "step": 0.02}},
    "listed layers": {"objective": "clat", "tuner": "critical", "critical": {"layers": ["layer4.0.conv1", "conv1"]}},
}

# A network, images and steps so few that all of this takes seconds.
SMALL = (
    "--batch_size=8 --images=16 --holdout=8 --validation_steps=1 --precision=fp32 --layout=contiguous --health=false"
)
FEWER = {
    "critical": ["--critical.batch=8"],
    "rift": ["--rift.batch=8", "--rift.passes=1"],
    "free-at": ["--free_at.replays=2"],
}


def cases() -> dict[str, tuple[Path | Keys, list[str]]]:
    """What is trained, by name: a recipe file or its keys, and the flags over it."""
    found: dict[str, tuple[Path | Keys, list[str]]] = {}
    for objective, its in OBJECTIVES.items():
        for tuner, keys in TUNERS.items():
            found[f"{objective} x {tuner}"] = {"objective": objective, "tuner": tuner, **its, **keys}, []
    found |= {name: (keys, []) for name, keys in OTHER.items()}
    for path in sorted(RECIPES.glob("*.yaml")):
        keys = yaml.safe_load(path.read_text())
        name, small = f"recipe {path.stem}", [*FEWER.get(keys["tuner"], []), *FEWER.get(keys["objective"], [])]
        found[name] = path, small
        if keys.get("schedule", "cosine") != "cosine":  # what else the overlay sets is smaller still here
            found[f"{name}, scale small"] = path, ["--scale=small", *small]
        if keys["tuner"] == "whole" and keys["objective"] != "clean" and keys.get("threat", {}).get("steps", 10) > 1:
            for protocol in ("clat", "rift"):
                found[f"{name}, protocol {protocol}"] = path, [f"--protocol={protocol}", *small]
    return found


def recipe_of(source: Path | Keys, flags: list[str], folder: Path) -> Recipe:
    """The recipe that the command line makes of a file, or of a file with these keys, and of flags."""
    if isinstance(source, dict):
        path = folder / "recipe.yaml"
        threat = {"steps": 3, **source.get("threat", {})}
        path.write_text(yaml.safe_dump({"epochs": 1, **source, "threat": threat}))
    else:
        path, flags = source, ["--epochs=1", *flags]
    others = ["--model=rn18", "--data=none", "--out=none"]  # which the command needs
    return parse(["train", str(path), *others, *SMALL.split(), *flags], {"train": COMMANDS["train"]})[1]["recipe"]


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_model("rn18", 3, channels=1, width=8, mean=[0.4], std=[0.25])


def images() -> Dataset:
    """32 noisy images of three classes: a bright bar at the top, in the middle or at the bottom."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(32) % 3
    pixels = torch.randint(0, 120, (32, 1, 9, 9), dtype=torch.uint8, generator=generator)
    for image, label in zip(pixels, labels, strict=True):
        image[:, 3 * label : 3 * label + 3] += 100
    return Dataset(pixels, labels, ("top", "middle", "bottom"), "bars", "train")


def measured(source: Path | Keys, flags: list[str], folder: Path) -> Keys:
    """What a run gives: by epoch its losses and counts, the layers of each selection, and the weights at its end."""
    model = network()
    run = train(recipe_of(source, flags, folder), model, images(), out=folder / "run")
    return {
        "epochs": [
            {
                **{name: value for name, value in entry.items() if name.startswith("loss")},
                **{name: round(entry[name] * entry["validation_images"]) for name in ("clean", "robust")},
                "trainable": entry["trainable"],
            }
            for entry in run.metrics
        ],
        "selected": [" ".join(selection.layers).replace("network.", "") for selection in run.selections],
        "last": fingerprint(model),
        "best": fingerprint(load_checkpoint(run.best)[0]),
    }


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, types and bytes of all parameters and buffers."""
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    content = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content.update(tensor.numpy().tobytes())
    return content.hexdigest()


def machine() -> dict[str, str]:
    """What decides how this machine rounds."""
    return {
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": environment(torch.device("cpu"))["processor"],
        "system": f"{platform.system()} {platform.machine()}",
    }


def rounded_otherwise(run: Keys) -> Keys:
    """A recorded run as another kind of machine may give it: losses within the tolerance, any fingerprint."""
    epochs = [
        {
            name: pytest.approx(value, abs=TOLERANCE * entry["loss"]) if isinstance(value, float) else value
            for name, value in entry.items()
        }
        for entry in run["epochs"]
    ]
    return {"epochs": epochs, "selected": run["selected"], "last": ANY, "best": ANY}


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_holds_every_method_and_recipe(path):
    assert list(json.loads(path.read_text())["runs"]) == list(cases())


@pytest.mark.parametrize("name", cases())
def test_training_gives_the_recorded_numbers(name, tmp_path):
    records = [json.loads(path.read_text()) for path in RECORDS]
    exact = [record["runs"][name] for record in records if record["made_on"] == machine()]
    assert measured(*cases()[name], tmp_path) in (
        exact or [rounded_otherwise(record["runs"][name]) for record in records]
    )


def write() -> None:
    runs = {}
    for name, (source, flags) in cases().items():
        with tempfile.TemporaryDirectory() as folder:
            runs[name] = measured(source, flags, Path(folder))
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in runs.items())
    record = Path(__file__).with_name(f"golden-{machine()['instructions'].lower()}.json")
    record.write_text(f'{{\n "made_on": {json.dumps(machine())},\n "runs": {{\n{lines}\n }}\n}}\n')
    print(f"{record}: {len(runs)} runs on {machine()}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: python {sys.argv[0]} --write (read the docstring first)")
    write()
