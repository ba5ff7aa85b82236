"""For docs/scale.md: what two processes send each other in a step, and what a step keeps in memory at 224 pixels.

python -m torch.distributed.run --standalone --nproc_per_node 2 bench/scale.py NETWORK METHOD
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from memory import kept
from steps import LABEL, PGD_AT, SELECTIONS, images, network, ours

from clat import build_model
from clat.batchnorm import shared_norms
from clat.threat import Threat
from clat.training.processes import Processes, started

METHODS = {"pgd-at": PGD_AT, "clat": LABEL}


def traffic(networks: Sequence[str]) -> dict[str, Any]:
    """Of each network and method: numbers that train, and bytes that a process sends in a step."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    found: dict[str, Any] = {}
    for name in networks:
        for method in METHODS:
            printed = subprocess.run([*launch, name, method], check=True, capture_output=True, text=True).stdout
            found[f"{name} {method}"] = json.loads(printed.splitlines()[-1])
    return found


def of_step(name: str, method: str, processes: Processes, repeats: int = 5) -> dict[str, Any]:
    """With one attack step for ten, as an attack sends nothing. The least of the repeats has no other traffic."""
    training = replace(METHODS[method], threat=Threat(steps=1), precision="fp32")
    model = network(name, "cpu")
    selected = () if method == "pgd-at" else SELECTIONS[name]
    step = ours(training, model, *images(2, "cpu"), selected, share=processes.average_gradients)
    sent = []
    with shared_norms(model, processes.mean, processes.count):
        for _ in range(repeats):
            processes.wait()
            before = loopback()
            step()
            processes.wait()
            sent.append((loopback() - before) / processes.count)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"trainable": trainable, "bytes": round(min(sent))}


def kept_at_224(name: str, selected: Sequence[int]) -> dict[str, Any]:
    """Bytes an image that autograd keeps at its peak in one step in fp32, by method.

    What two images take more than one: weights, which are kept too, are then left out.
    """
    found: dict[str, Any] = {"network": name, "layers": list(selected)}
    for method, training in METHODS.items():
        sizes = []
        for count in (1, 2):
            pixels = torch.randint(256, (count, 3, 224, 224), dtype=torch.uint8)
            model = build_model(name, 1000, normalise="imagenet")
            short = replace(training, threat=Threat(steps=2), precision="fp32")
            chosen = () if method == "pgd-at" else selected
            sizes.append(kept(ours(short, model, pixels, torch.arange(count), chosen)))
        found[method] = sizes[1] - sizes[0]
    return found


def loopback() -> int:
    """Bytes that were sent over it so far, from Linux's account."""
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


if __name__ == "__main__":
    together = started("cpu")
    result = of_step(sys.argv[1], sys.argv[2], together)
    if together.first:
        print(json.dumps(result))
