"""The memory of a step: what autograd keeps, and by how much a process of its own grows.

python bench/memory.py WHAT SIZE PRECISION     the bytes that this process grows by at its peak, for ``in_own_process``
"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from steps import FEATURE, LABEL, PGD_AT, SELECTIONS, Step, images, network, ours
from torch import nn

from clat.compute import Precision, best_device
from clat.criticality import layer_criticality
from clat.data.dataset import to_unit
from clat.threat import Threat

STEP_KINDS = {"pgd-at": PGD_AT, "clat feature": FEATURE, "clat label": LABEL}


def used(run: Step, device: str) -> int:
    """Bytes that the process grew by at its peak while ``run`` ran."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    """Bytes, from Linux's account of this process; that of getrusage has its parent's in it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def kept(run: Step) -> int:
    """Bytes that autograd keeps for its backward passes at their peak while ``run`` runs; weights count too."""
    alive: Counter[tuple[int, int]] = Counter()
    most = 0

    class Kept:
        def __init__(self, tensor: torch.Tensor):
            nonlocal most
            storage = tensor.untyped_storage()
            self.tensor, self.storage = tensor, (storage.data_ptr(), storage.nbytes())
            alive[self.storage] += 1
            most = max(most, sum(size for (_, size), count in alive.items() if count))

        def __del__(self) -> None:
            alive[self.storage] -= 1

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda entry: entry.tensor):
        run()
    return most


def memory_of(what: str, size: int, precision: Precision, device: str) -> int:
    """Bytes of a step on ``size`` images, or of a pass through, or the criticality of, ``size`` convolutions."""
    if what in STEP_KINDS:
        return used(short_step(what, size, precision, device), device)
    model = plain_stack(size).to(device).eval()
    x = to_unit(images(64, device)[0])
    if what == "criticality":
        return used(lambda: layer_criticality(model, x, x + 0.0), device)
    return used(lambda: passed(model, x), device)


def in_own_process(what: str, size: int, precision: Precision = "fp32") -> int:
    command = [sys.executable, __file__, what, str(size), precision]
    # Freed memory goes back to the system at once; else the gaps in the C library's heap would count too.
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=variables).stdout
    return int(printed.split()[-1])


def peak_memory(batch: int, precision: Precision) -> dict[str, Any]:
    found = {what: in_own_process(what, batch, precision) for what in STEP_KINDS}
    return {"network": "rn18", "batch": batch, "precision": precision, "bytes": found}


def short_step(what: str, size: int, precision: Precision, device: str, **options: Any) -> Step:
    """Two attack steps in place of ten: the memory of each is free again before the next."""
    training = replace(STEP_KINDS[what], threat=Threat(steps=2), precision=precision)
    model = network("rn18", device, **options)
    pixels, y = images(size, device)
    return ours(training, model, pixels, y, () if what == "pgd-at" else SELECTIONS["rn18"])


def plain_stack(depth: int) -> nn.Module:
    """As many convolutions of one size."""
    layers = [nn.Conv2d(3 if i == 0 else 32, 32, 3, padding=1) for i in range(depth)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@torch.no_grad()
def passed(model: nn.Module, x: torch.Tensor) -> None:
    model(torch.cat([x, x]))


def kept_memory(batch: int, precision: Precision, device: str, **options: Any) -> dict[str, Any]:
    found = {what: kept(short_step(what, batch, precision, device, **options)) for what in STEP_KINDS}
    return {"network": "rn18", "options": options, "batch": batch, "precision": precision, "bytes": found}


def memory_by_layers(depths: Sequence[int]) -> dict[str, Any]:
    return {what: {depth: in_own_process(what, depth) for depth in depths} for what in ("forward", "criticality")}


if __name__ == "__main__":
    print(memory_of(sys.argv[1], int(sys.argv[2]), cast(Precision, sys.argv[3]), best_device()))
