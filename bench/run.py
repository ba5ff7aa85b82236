"""Speed, memory, loading and traffic, for the tables that `make docs` writes.

It writes results/bench.json, results/memory.json, results/loading.json and results/scale.json.

    python bench/run.py            every part, about 30 minutes on two cores; leave the machine alone meanwhile
    python bench/run.py memory     only what a step keeps in memory, which a busy machine does not disturb
    python bench/run.py scale      only what two processes send each other, and memory at 224 pixels
    python bench/run.py loading    only how long a step waits for images that workers decode, about 3 minutes

What was measured in the same environment is not measured again.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import loading
import memory
import scale
import times
import torch
from steps import STEPS, Training

from clat.compute import Precision, best_device
from clat.files import write_text
from clat.objectives import PgdAt
from clat.threat import Threat
from clat.training.environment import environment
from clat.tuners import Whole

RESULTS = Path(__file__).parents[1] / "results"
BATCH = {"rn18": 16, "rn50": 4, "dn121": 4, "vgg19": 16, "preactrn18": 16, "wrn34-10": 2}  # a step takes some seconds
REPEATS = 3
Part = Callable[[], dict[str, Any]]


def parts(device: str) -> dict[str, Part]:
    of_steps: dict[str, Part] = {
        f"steps {name}": partial(times.steps_and_floors, name, device, batch, REPEATS) for name, batch in BATCH.items()
    }
    layouts: dict[str, Part] = {
        f"layout {name}": partial(times.variants, name, device, max(1, batch // 2), REPEATS)
        for name, batch in BATCH.items()
    }
    return {
        **of_steps,
        "peers": partial(times.peers, device, 16, 2 * REPEATS),
        "convolutions": partial(times.convolutions, device, 16),
        "criticality": partial(times.criticality_cost, device, 8, 1),
        "memory by layers": partial(memory.memory_by_layers, (4, 16, 64)),
        "by attack steps": partial(times.by_steps, (1, 2, 3, 4, 5, 10), device, 16, REPEATS),
        "by depth": partial(times.by_depth, (2, 6, 11, 14, 17), device, 16, REPEATS),
        **layouts,
        "compiled": partial(times.compiled, device, 16, REPEATS),
    }


def memory_parts(device: str) -> dict[str, Part]:
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    return {
        **{f"kept {each}": partial(memory.kept_memory, 32, each, device, width=16) for each in precisions},
        **{f"memory {each}": partial(memory.peak_memory, 64, each) for each in precisions},
    }


def loading_parts(device: str) -> dict[str, Part]:
    """With an attack of one step, where the images have to come fastest."""
    fast = Training(PgdAt(), Whole(), Threat(eps=0.03, step=0.03, steps=1))
    waiting = partial(loading.waiting, "timm/mobilenetv3_small_100", fast, device, batch=16, steps=8)
    return {f"{workers} workers": partial(waiting, workers=workers) for workers in (0, 2)}


def scale_parts(_device: str) -> dict[str, Part]:
    return {
        "traffic": partial(scale.traffic, ("rn18", "rn50", "wrn34-10")),
        "kept at 224": partial(scale.kept_at_224, "torchvision/resnet50", scale.SELECTIONS["rn50"]),
    }


def run(todo: dict[str, Part], target: Path, device: str) -> dict[str, Any]:
    """Runs what the file does not have yet from this environment and writes it after each part."""
    about = environment(torch.device(device), argv=[])
    del about["started"], about["command"]
    about["attack"] = f"{STEPS} steps"
    found: dict[str, Any] = {"about": about, "parts": {}}
    if target.exists() and (before := json.loads(target.read_text()))["about"] == about:
        found = before
    for name, measure in todo.items():
        if name not in found["parts"]:
            start = time.perf_counter()
            found["parts"][name] = measure()
            write_text(target, json.dumps(found, indent=1) + "\n")
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return found


if __name__ == "__main__":
    device = best_device()
    every = {"memory": memory_parts, "scale": scale_parts, "loading": loading_parts, "bench": parts}
    for name in sys.argv[1:] or every:
        run(every[name](device), RESULTS / f"{name}.json", device)
