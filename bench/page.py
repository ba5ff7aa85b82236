"""The tables of docs/performance.md, made from results/bench.json."""

import statistics
from typing import Any

Parts = dict[str, Any]


def tables(parts: Parts) -> dict[str, list[str]]:
    """Each table by name, line by line."""
    return {
        "steps": steps(parts),
        "peers": peers(parts["peers"]),
        "attack steps": by_steps(parts["by attack steps"]),
        "depth": by_depth(parts["by depth"]),
        "batch": by_batch(parts["by batch"]),
        "layout": layouts(parts),
    }


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
    )
    lines = [
        "| network, batch | layers | PGD-AT s | PGD-AT / floor | CLAT feature / floor | CLAT label / floor "
        "| CLAT feature / PGD-AT | CLAT label / PGD-AT |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in parts.items():
        if name.startswith("steps "):
            cells = " | ".join(span(row[key]) for key in ratios)
            layers = ", ".join(map(str, row["layers"]))
            lines.append(f"| {row['network']}, {row['batch']} | {layers} | {seconds(row, 'pgd-at'):.2f} | {cells} |")
    return lines


def peers(row: dict[str, Any]) -> list[str]:
    lines = ["| library | version | s | times as long as clat |", "|---|---|---|---|"]
    lines.append(f"| clat | | {seconds(row, 'clat'):.2f} | 1 |")
    for name, number in row["versions"].items():
        lines.append(f"| {name} | {number} | {seconds(row, name):.2f} | {span(row[f'{name} / clat'])} |")
    return lines


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


def by_batch(row: dict[str, Any]) -> list[str]:
    lines = ["| batch | " + " | ".join(map(str, row["sizes"])) + " |", "|---|" + "---|" * len(row["sizes"])]
    for name, title in {"pgd-at": "PGD-AT", "clat feature": "CLAT feature"}.items():
        cells = [f"{1000 * seconds(row, f'{name} {size}') / size:.0f}" for size in row["sizes"]]
        lines.append(f"| {title}, ms an image | " + " | ".join(cells) + " |")
    return lines


def layouts(parts: Parts) -> list[str]:
    found = [row for name, row in parts.items() if name.startswith("layout ")]
    lines = ["| network | " + " | ".join(row["network"] for row in found) + " |", "|---|" + "---|" * len(found)]
    cells = [span(row["contiguous / channels-last"]) for row in found]
    return [*lines, "| default layout / channels-last | " + " | ".join(cells) + " |"]
