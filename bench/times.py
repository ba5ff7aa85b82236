"""What the bench times, each part a function that returns what results/bench.json holds of it.

Contestants of a row run in turn in one process, in alternating order, after a round that warms up; a ratio is the
median over the rounds of the ratio within a round.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from libraries import PEERS
from steps import FEATURE, LABEL, PGD_AT, SELECTIONS, Step, clat_floor, images, network, ours, pgd_at_floor

from clat.compute import native_precision
from clat.criticality import layer_criticality
from clat.data.dataset import to_unit
from clat.threat import Threat, attack_output

EPOCH = 50_000  # images
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

    Contestants are made again for each round: how their tensors happen to lie in memory makes several percent.
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


# f: what a step's cost depends on


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
