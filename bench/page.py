"""The tables of docs/performance.md and docs/scale.md, made from results/*.json by `make docs`."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

Parts = dict[str, Any]


def seconds(row: dict[str, Any], name: str) -> float:
    return statistics.median(row["seconds"][name])


def span(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f})"


def steps(parts: Parts) -> list[str]:
    ratios = (
        "pgd-at / floor",
        "clat feature / floor",
        "clat label / floor",
        "clat feature / pgd-at",
        "clat label / pgd-at",
        "floors feature",
    )
    lines = [
        "| network, batch | layers | PGD-AT s | PGD-AT / floor | CLAT feature / floor | CLAT label / floor "
        "| CLAT feature / PGD-AT | CLAT label / PGD-AT | CLAT feature floor / PGD-AT floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in parts.items():
        if name.startswith("steps "):
            cells = " | ".join(span(row[key]) for key in ratios)
            layers = ", ".join(map(str, row["layers"]))
            lines.append(f"| {row['network']}, {row['batch']} | {layers} | {seconds(row, 'pgd-at'):.2f} | {cells} |")
    found = [row for name, row in parts.items() if name.startswith("steps ")]
    medians = " | ".join(f"{statistics.median(row[key]['median'] for row in found):.2f}" for key in ratios)
    return [*lines, f"| median | | | {medians} |"]


def peers(row: dict[str, Any]) -> list[str]:
    lines = ["| library | version | s | times as long as clat |", "|---|---|---|---|"]
    lines.append(f"| clat | | {seconds(row, 'clat'):.2f} | 1 |")
    lines.append(f"| clat in fp32 | | {seconds(row, 'clat fp32'):.2f} | {span(_again(row))} |")
    for name, number in row["versions"].items():
        lines.append(f"| {name} | {number} | {seconds(row, name):.2f} | {span(row[f'{name} / clat'])} |")
    return lines


def _again(row: dict[str, Any]) -> dict[str, float]:
    """The same contestant beside itself: the noise of the machine."""
    ratios = [b / a for a, b in zip(row["seconds"]["clat"], row["seconds"]["clat fp32"], strict=True)]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def by_steps(row: dict[str, Any]) -> list[str]:
    counts = [name.rsplit(" ", 1)[1] for name in row["seconds"] if name.startswith("clat feature")]
    lines = ["| attack steps | " + " | ".join(counts) + " |", "|---|" + "---|" * len(counts)]
    for attack in ("feature", "label"):
        cells = [span(row[f"clat {attack} {count} / pgd-at"]) for count in counts]
        lines.append(f"| CLAT {attack} / PGD-AT of 10 | " + " | ".join(cells) + " |")
    return lines


def by_depth(row: dict[str, Any]) -> list[str]:
    names = [name for name in row["seconds"] if name != "pgd-at"]
    header = " | ".join(name.rsplit(" ", 1)[1] for name in names)
    cells = " | ".join(span(row[f"{name} / pgd-at"]) for name in names)
    return [f"| selected layer | {header} |", "|---|" + "---|" * len(names), f"| CLAT feature / PGD-AT | {cells} |"]


def layouts(parts: Parts) -> list[str]:
    found = [row for name, row in parts.items() if name.startswith("layout ")]
    lines = ["| network | " + " | ".join(row["network"] for row in found) + " |", "|---|" + "---|" * len(found)]
    cells = [span(row["contiguous / channels-last"]) for row in found]
    return [*lines, "| default layout / channels-last | " + " | ".join(cells) + " |"]


def memory(rows: Sequence[dict[str, Any]]) -> list[str]:
    header = " | ".join(f"{row['precision']}, batch {row['batch']}, MiB | share of PGD-AT" for row in rows)
    lines = [f"| step | {header} |", "|---|" + "---|---|" * len(rows)]
    for name in rows[0]["bytes"]:
        used = [(row["bytes"][name] / 2**20, row["bytes"][name] / row["bytes"]["pgd-at"]) for row in rows]
        lines.append(f"| {name} | " + " | ".join(f"{size:.0f} | {share:.2f}" for size, share in used) + " |")
    return lines


def others(parts: Parts) -> list[str]:
    compiled, layers = parts["compiled"], parts["memory by layers"]
    depth = list(layers["criticality"])[-1]
    grown = " and ".join(f"{layers[what][depth] / 2**20:.0f}" for what in ("criticality", "forward"))
    return [
        "| what | measured |",
        "|---|---|",
        "| selection on DenseNet-121 (attack and criticality of all layers, 100 images) / an epoch of PGD-AT on 50,000 "
        f"images | {100 * parts['criticality']['share_of_epoch']:.2f} % |",
        f"| memory of the criticality of {depth} convolutions, and of one forward pass | {grown} MiB |",
        f"| share of PGD-AT's time in convolutions, ResNet-18 | {100 * parts['convolutions']['share']:.0f} % |",
        f"| PGD-AT step uncompiled / compiled, ResNet-18 | {span(compiled['eager / compiled'])} |",
        f"| first compiled step | {compiled['first_step_seconds']:.0f} s |",
    ]


def loading(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["Not measured yet."]
    lines = ["| worker processes | s a step | waiting for images | share |", "|---|---|---|---|"]
    for row in rows:
        whole, waited = (statistics.mean(row[name][1:]) for name in ("seconds", "waited"))
        lines.append(f"| {row['workers']} | {whole:.2f} | {waited:.3f} s | {100 * row['share']:.1f} % |")
    return lines


def traffic(rows: dict[str, Any]) -> list[str]:
    lines = ["| network | PGD-AT trains | sends, MB | CLAT trains | sends, MB | share |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(name.split()[0] for name in rows):
        whole, part = rows[f"{name} pgd-at"], rows[f"{name} clat"]
        cells = [cell for row in (whole, part) for cell in (f"{row['trainable']:,}", f"{row['bytes'] / 1e6:.1f}")]
        lines.append(f"| {' | '.join([name, *cells])} | {100 * part['bytes'] / whole['bytes']:.0f} % |")
    return lines


def kept_at_224(row: dict[str, Any]) -> list[str]:
    lines = ["| step | MiB an image | share of PGD-AT | GiB for 64 images |", "|---|---|---|---|"]
    for method in ("pgd-at", "clat"):
        size = row[method]
        cells = [f"{size / 2**20:.0f}", f"{size / row['pgd-at']:.2f}", f"{64 * size / 2**30:.1f}"]
        lines.append(f"| {' | '.join([method, *cells])} |")
    return lines


IMAGES, GPUS, RATE, BATCH, WIRE = 1_281_167, 8, 1000, 64, 10e9 / 8  # of ImageNet; images a second; bytes a second


def imagenet(parts: Parts) -> list[str]:
    """Of an epoch of ImageNet: passes from their number, CLAT's from its measured ratios, messages from their size."""
    row, fewer = parts["steps rn50"], parts["by attack steps"]
    pgd_at = (2 * 10 + 3) / 3
    clat = pgd_at * row["clat label / pgd-at"]["median"]
    two = clat * fewer["clat label 2 / pgd-at"]["median"] / fewer["clat label 10 / pgd-at"]["median"]
    sent = {name: parts["traffic"][f"rn50 {name}"]["bytes"] * 2 * 15 / 16 for name in ("pgd-at", "clat")}
    lines = [
        "| step | times plain training | minutes an epoch, 8 GPUs | seconds a step | MB sent, 16 GPUs | in seconds |",
        "|---|---|---|---|---|---|",
    ]
    rows = (
        ("PGD-AT", pgd_at, "pgd-at"),
        ("CLAT, 10 attack steps", clat, "clat"),
        ("CLAT, 2 attack steps", two, "clat"),
    )
    for name, times, method in rows:
        minutes, step = times * IMAGES / RATE / GPUS / 60, times * BATCH / RATE
        cells = [f"{times:.1f}", f"{minutes:.0f}", f"{step:.2f}", f"{sent[method] / 1e6:.0f}"]
        lines.append(f"| {' | '.join([name, *cells, f'{sent[method] / WIRE:.2f}'])} |")
    return lines


TABLES: dict[str, Callable[[Parts], list[str]]] = {
    "steps": steps,
    "depth": lambda parts: by_depth(parts["by depth"]),
    "attack steps": lambda parts: by_steps(parts["by attack steps"]),
    "peers": lambda parts: peers(parts["peers"]),
    "layout": layouts,
    "kept": lambda parts: memory([parts["kept fp32"], parts["kept bf16"]]),
    "peak memory": lambda parts: memory([parts["memory fp32"], parts["memory bf16"]]),
    "others": others,
    "loading": lambda parts: loading([row for name, row in parts.items() if name.endswith(" workers")]),
    "traffic": lambda parts: traffic(parts["traffic"]),
    "imagenet": imagenet,
    "kept at 224": lambda parts: kept_at_224(parts["kept at 224"]),
}
