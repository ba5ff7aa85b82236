"""Speed and memory, side by side; writes results/bench.json, results/memory.json and the tables of docs/performance.md.

    python bench/run.py            every part, about 30 minutes on two cores; leave the machine alone meanwhile
    python bench/run.py memory     the memory of a step in fp32 and bf16 alone, which a busy machine does not disturb
    python bench/run.py tables     prints the tables again

Contestants of a row run in turn in one process, in alternating order, after a round that warms up; a ratio is the
median over the rounds of the ratio within a round. What was measured in the same environment is not measured again.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from page import tables
from steps import (
    FEATURE,
    LABEL,
    PEERS,
    PGD_AT,
    SELECTIONS,
    STEPS,
    Step,
    clat_floor,
    images,
    network,
    ours,
    pgd_at_floor,
)
from torch import nn

from clat.compute import Precision, best_device, native_precision
from clat.criticality import layer_criticality
from clat.data.dataset import to_unit
from clat.files import write_text
from clat.threat import Threat, attack_output
from clat.training.environment import environment

TARGET = Path(__file__).parents[1] / "results/bench.json"
MEMORY = TARGET.with_name("memory.json")
BATCH = {"rn18": 16, "rn50": 4, "dn121": 4, "vgg19": 16, "preactrn18": 16, "wrn34-10": 2}  # a step takes some seconds
REPEATS = 3
EPOCH = 50_000  # images
STEP_KINDS = ("pgd-at", "clat feature", "clat label")
Rounds = dict[str, list[float]]


def timed(contestants: dict[str, Step], repeats: int) -> Rounds:
    """Seconds of each contestant in each round."""
    found: Rounds = {name: [] for name in contestants}
    for number in range(repeats + 1):
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            contestants[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                found[name].append(round(time.perf_counter() - start, 4))
    return found


def ratio(rounds: Rounds, first: str, second: str) -> dict[str, float]:
    """How many times as long the first one takes: the median, the lowest and the highest of the rounds."""
    ratios = [a / b for a, b in zip(rounds[first], rounds[second], strict=True)]
    return {"median": round(statistics.median(ratios), 3), "low": round(min(ratios), 3), "high": round(max(ratios), 3)}


def row(rounds: Rounds, ratios: dict[str, tuple[str, str]], **facts: Any) -> dict[str, Any]:
    found = {name: ratio(rounds, *pair) for name, pair in ratios.items()}
    return {**facts, "seconds": rounds, **found}


# a, b: the steps beside their floors


def steps_and_floors(name: str, device: str, batch: int, repeats: int, **options: Any) -> dict[str, Any]:
    """Each contestant has a copy of the network, so that what one freezes does not concern another."""
    pixels, y = images(batch, device)
    selected = SELECTIONS[name]
    made = partial(network, name, device, **options)
    contestants = {
        "pgd-at": ours(PGD_AT, made(), pixels, y),
        "pgd-at floor": pgd_at_floor(made(), pixels, y),
        "clat feature": ours(FEATURE, made(), pixels, y, selected),
        "clat feature floor": clat_floor(made(), pixels, y, selected, feature=True),
        "clat label": ours(LABEL, made(), pixels, y, selected),
        "clat label floor": clat_floor(made(), pixels, y, selected, feature=False),
    }
    ratios = {
        "pgd-at / floor": ("pgd-at", "pgd-at floor"),
        "clat feature / floor": ("clat feature", "clat feature floor"),
        "clat label / floor": ("clat label", "clat label floor"),
        "clat feature / pgd-at": ("clat feature", "pgd-at"),
        "clat label / pgd-at": ("clat label", "pgd-at"),
        "floors feature": ("clat feature floor", "pgd-at floor"),
    }
    facts = {"network": name, "batch": batch, "precision": native_precision(device), "layers": list(selected)}
    return row(timed(contestants, repeats), ratios, **facts)


# c: other libraries


def peers(device: str, batch: int, repeats: int, **options: Any) -> dict[str, Any]:
    """PGD-AT with each library; theirs train the network in torch's default layout, as a user of theirs would.

    Contestants are made anew for each round: how their tensors happen to lie in memory makes several percent.
    """
    pixels, y = images(batch, device)

    def made() -> dict[str, Step]:
        contestants = {"clat": ours(PGD_AT, network("rn18", device, **options), pixels, y)}
        for name, peer in PEERS.items():
            plain = network("rn18", device, **options).to(memory_format=torch.contiguous_format)
            contestants[name] = peer(plain, pixels, y)
        same = ours(replace(PGD_AT, precision="fp32"), network("rn18", device, **options), pixels, y)
        return {**contestants, "clat fp32": same}

    rounds: Rounds = {}
    for number in range(repeats):
        contestants = list(made().items())
        for name, seconds in timed(dict(contestants[:: 1 if number % 2 else -1]), 1).items():
            rounds[name] = [*rounds.get(name, []), *seconds]
    ratios = {f"{name} / clat": (name, "clat") for name in PEERS} | {
        f"{name} / clat fp32": (name, "clat fp32") for name in PEERS
    }
    versions = {name: version(name) for name in PEERS}
    return row(rounds, ratios, network="rn18", batch=batch, versions=versions)


def convolutions(device: str, batch: int, **options: Any) -> dict[str, Any]:
    """The share of PGD-AT's time that no library can save: that of the convolutions themselves."""
    pixels, y = images(batch, device)
    step = ours(PGD_AT, network("rn18", device, **options), pixels, y)
    step()
    with torch.profiler.profile() as profile:
        step()
    on_gpu = torch.cuda.is_available()
    own = {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in profile.key_averages()
    }
    share = sum(time for name, time in own.items() if "conv" in name) / sum(own.values())
    return {"network": "rn18", "batch": batch, "share": round(share, 3)}


# d: the criticality of all layers


def criticality_cost(device: str, batch: int, repeats: int, **options: Any) -> dict[str, Any]:
    """The attack and the ranking on 100 images, beside PGD-AT's step, which an epoch has 50,000 images of."""
    model = network("dn121", device, **options)
    pixels, y = images(100, device)
    x = to_unit(pixels)
    step = ours(PGD_AT, network("dn121", device, **options), pixels[:batch], y[:batch])
    contestants: dict[str, Step] = {
        "criticality": lambda: layer_criticality(model, x, attack_output(model, x, y, Threat())),
        "pgd-at": step,
    }
    rounds = timed(contestants, repeats)
    share = statistics.median(rounds["criticality"]) / (statistics.median(rounds["pgd-at"]) / batch * EPOCH)
    return {"network": "dn121", "batch": batch, "seconds": rounds, "share_of_epoch": round(share, 6)}


def plain_stack(depth: int) -> nn.Module:
    """As many convolutions of one size."""
    layers = [nn.Conv2d(3 if i == 0 else 32, 32, 3, padding=1) for i in range(depth)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


# e and the second half of d: peak memory, each in a process of its own


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


def memory_of(what: str, size: int, precision: Precision, device: str, **options: Any) -> int:
    """Two attack steps in place of ten: each one's memory is free again before the next."""
    if what in ("criticality", "forward"):
        model = plain_stack(size).to(device).eval()
        x = to_unit(images(64, device)[0])
        if what == "criticality":
            return used(lambda: layer_criticality(model, x, x + 0.0), device)
        return used(lambda: passed(model, x), device)
    return used(short_step(what, size, precision, device, **options), device)


def short_step(what: str, size: int, precision: Precision, device: str, **options: Any) -> Step:
    recipe = {"pgd-at": PGD_AT, "clat feature": FEATURE, "clat label": LABEL}[what]
    recipe = replace(recipe, threat=Threat(steps=2), precision=precision)
    model = network("rn18", device, **options)
    pixels, y = images(size, device)
    return ours(recipe, model, pixels, y, () if what == "pgd-at" else SELECTIONS["rn18"])


@torch.no_grad()
def passed(model: nn.Module, x: torch.Tensor) -> None:
    model(torch.cat([x, x]))


def in_own_process(what: str, size: int, precision: Precision = "fp32") -> int:
    command = [sys.executable, __file__, "memory", what, str(size), precision]
    # Freed memory goes back to the system at once; else the gaps in the C library's heap would count too.
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=variables).stdout
    return int(printed.split()[-1])


def memory(batch: int, precision: Precision) -> dict[str, Any]:
    found = {what: in_own_process(what, batch, precision) for what in STEP_KINDS}
    return {"network": "rn18", "batch": batch, "precision": precision, "bytes": found}


def kept_memory(batch: int, precision: Precision, device: str, **options: Any) -> dict[str, Any]:
    found = {what: kept(short_step(what, batch, precision, device, **options)) for what in STEP_KINDS}
    return {"network": "rn18", "options": options, "batch": batch, "precision": precision, "bytes": found}


def memory_by_layers(depths: Sequence[int]) -> dict[str, Any]:
    return {what: {depth: in_own_process(what, depth) for depth in depths} for what in ("forward", "criticality")}


# f: what a step's cost depends on


def by_batch(sizes: Sequence[int], device: str, repeats: int, **options: Any) -> dict[str, Any]:
    contestants: dict[str, Step] = {}
    for size in sizes:
        pixels, y = images(size, device)
        contestants[f"pgd-at {size}"] = ours(PGD_AT, network("rn18", device, **options), pixels, y)
        clat = ours(FEATURE, network("rn18", device, **options), pixels, y, SELECTIONS["rn18"])
        contestants[f"clat feature {size}"] = clat
    rounds = timed(contestants, repeats)
    return {"seconds": rounds, "sizes": list(sizes)}


def by_steps(counts: Sequence[int], device: str, batch: int, repeats: int, **options: Any) -> dict[str, Any]:
    """CLAT with fewer attack steps, as a share of PGD-AT's step of ten."""
    pixels, y = images(batch, device)
    contestants = {"pgd-at": ours(PGD_AT, network("rn18", device, **options), pixels, y)}
    for attack, recipe in {"feature": FEATURE, "label": LABEL}.items():
        for count in counts:
            shorter = replace(recipe, threat=Threat(steps=count))
            model = network("rn18", device, **options)
            contestants[f"clat {attack} {count}"] = ours(shorter, model, pixels, y, SELECTIONS["rn18"])
    ratios = {f"{name} / pgd-at": (name, "pgd-at") for name in contestants if name != "pgd-at"}
    return row(timed(contestants, repeats), ratios, network="rn18", batch=batch)


def by_depth(indices: Sequence[int], device: str, batch: int, repeats: int, **options: Any) -> dict[str, Any]:
    """CLAT with one layer selected, as a share of PGD-AT's step."""
    pixels, y = images(batch, device)
    contestants = {"pgd-at": ours(PGD_AT, network("rn18", device, **options), pixels, y)}
    for index in indices:
        model = network("rn18", device, **options)
        contestants[f"clat feature, layer {index}"] = ours(FEATURE, model, pixels, y, (index,))
    ratios = {f"{name} / pgd-at": (name, "pgd-at") for name in contestants if name != "pgd-at"}
    return row(timed(contestants, repeats), ratios, network="rn18", batch=batch)


def by_processes(counts: Sequence[int]) -> dict[str, Any]:
    """Seconds of an epoch of PGD-AT on 512 embedded images, the cores shared out among the processes."""
    found: dict[str, list[float]] = {f"{count} processes": [] for count in counts}
    for number in range(2):
        for count in counts[:: 1 if number % 2 else -1]:
            with TemporaryDirectory() as folder:
                command = ["-m", "accelerate.commands.launch", "--num_processes", str(count), "--num_machines", "1"]
                command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]
                command += ["--num_cpu_threads_per_process", str(max(1, torch.get_num_threads() // count))]
                command += ["-m", "clat", "train", "pgd-at", "--model", "rn18,width=16", "--data", "fashion-mnist-mini"]
                command += ["--out", f"{folder}/run", "--epochs", "1", "--images", "512", "--holdout", "10"]
                subprocess.run([sys.executable, *command], check=True, capture_output=True)
                entry = json.loads((Path(folder) / "run/metrics.jsonl").read_text().splitlines()[-1])
                found[f"{count} processes"].append(entry["seconds"])
    return {"network": "rn18,width=16", "seconds": found}


# Layout and compilation


def variants(name: str, device: str, batch: int, repeats: int, **options: Any) -> dict[str, Any]:
    """PGD-AT's step with the weights in either layout of memory."""
    pixels, y = images(batch, device)
    contestants = {}
    for layout in ("channels_last", "contiguous_format"):
        model = network(name, device, **options).to(memory_format=getattr(torch, layout))
        contestants[layout] = ours(PGD_AT, model, pixels, y)
    ratios = {"contiguous / channels-last": ("contiguous_format", "channels_last")}
    return row(timed(contestants, repeats), ratios, network=name, batch=batch)


def compiled(device: str, batch: int, repeats: int, **options: Any) -> dict[str, Any]:
    """PGD-AT's step with the network compiled, beside the same uncompiled; the first step compiles."""
    pixels, y = images(batch, device)
    model = network("rn18", device, **options)
    model.compile()
    contestants = {
        "compiled": ours(PGD_AT, model, pixels, y),
        "eager": ours(PGD_AT, network("rn18", device, **options), pixels, y),
    }
    start = time.perf_counter()
    contestants["compiled"]()
    first = time.perf_counter() - start
    ratios = {"eager / compiled": ("eager", "compiled")}
    return row(timed(contestants, repeats), ratios, network="rn18", batch=batch, first_step_seconds=round(first, 1))


def parts(device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    each = {
        f"steps {name}": lambda name=name, batch=batch: steps_and_floors(name, device, batch, REPEATS)
        for name, batch in BATCH.items()
    }
    layouts = {
        f"layout {name}": lambda name=name, batch=batch: variants(name, device, max(1, batch // 2), REPEATS)
        for name, batch in BATCH.items()
    }
    return {
        **each,
        "peers": lambda: peers(device, 16, 2 * REPEATS),
        "convolutions": lambda: convolutions(device, 16),
        "criticality": lambda: criticality_cost(device, 8, 1),
        "memory by layers": lambda: memory_by_layers((4, 16, 64)),
        "by batch": lambda: by_batch((4, 16, 64), device, 3),
        "by attack steps": lambda: by_steps((1, 2, 3, 4, 5, 10), device, 16, 3),
        "by depth": lambda: by_depth((2, 6, 11, 14, 17), device, 16, 3),
        "by processes": lambda: by_processes((1, 2)),
        **layouts,
        "compiled": lambda: compiled(device, 16, REPEATS),
    }


def memory_parts(device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    return {
        **{f"kept {p}": lambda p=p: kept_memory(32, p, device, width=16) for p in precisions},
        **{f"memory {p}": lambda p=p: memory(64, p) for p in precisions},
    }


def run(todo: dict[str, Callable[[], dict[str, Any]]], target: Path, device: str) -> dict[str, Any]:
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
    arguments = sys.argv[1:]
    if len(arguments) == 4:  # a process of ``in_own_process``
        _, what, size, precision = arguments
        print(memory_of(what, int(size), cast(Precision, precision), device))
    else:
        memory_found = (
            json.loads(MEMORY.read_text()) if "tables" in arguments else run(memory_parts(device), MEMORY, device)
        )
        found = json.loads(TARGET.read_text()) if arguments else run(parts(device), TARGET, device)
        for name, lines in tables(found["parts"] | memory_found["parts"]).items():
            print(f"\n{name}\n", *lines, sep="\n")
