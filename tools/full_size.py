"""One forward pass and one CLAT step of each full-size network of the paper; writes results/full-size.json.

    python tools/full_size.py     each network in a process of its own, so that the peak memory is its own

Batch 1 for the two networks of 267 million parameters, 2 for the others; fp32; 10 attack steps; 10 classes, 32x32.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from clat import CLAT, build_model
from clat.training.environment import environment

NETWORKS = {
    "rn18": 1,
    "rn50": 3,
    "dn121": 5,
    "vgg19": 1,
    "preactrn18": 1,
    "wrn34-10": 2,
    "wrn70-16": 4,
    "rawrn70-16": 4,
}
TARGET = Path(__file__).parents[1] / "results/full-size.json"


def measure(name: str) -> dict[str, Any]:
    """Seconds and peak memory of a network; k is the paper's."""
    batch = 1 if "70-16" in name else 2
    torch.manual_seed(0)
    model = build_model(name, 10).eval()
    x, y = torch.rand(batch, 3, 32, 32), torch.arange(batch) % 10
    start = time.perf_counter()
    with torch.no_grad():
        model(x)
    forward = time.perf_counter() - start
    clat = CLAT(model, k=NETWORKS[name])
    start = time.perf_counter()
    optimizer = torch.optim.SGD(clat.select(x, y), lr=0.01)
    select = time.perf_counter() - start
    start = time.perf_counter()
    loss = clat.loss(x, y)
    loss.backward()
    optimizer.step()
    step = time.perf_counter() - start
    clat.verify()
    return {
        "network": name,
        "batch": batch,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "selected": list(clat.layers),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "forward_seconds": round(forward, 3),
        "select_seconds": round(select, 3),
        "step_seconds": round(step, 3),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "loss": loss.item(),
    }


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """The table in docs/baselines.md, line by line."""
    lines = [
        "| network | batch | forward s | selection s | CLAT step s | peak GiB | trainable |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = " | ".join(f"{row[key]:.2f}" for key in ("forward_seconds", "select_seconds", "step_seconds"))
        memory = f"{row['peak_memory_bytes'] / 2**30:.1f}"
        lines.append(f"| {row['network']} | {row['batch']} | {times} | {memory} | {row['trainable']:,} |")
    return lines


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        rows = []
        for name in NETWORKS:
            done = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout))
            print(rows[-1])
        about = environment(torch.device("cpu"), argv=[Path(__file__).name])
        TARGET.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        print("\n".join(markdown(rows)))
