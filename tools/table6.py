"""Trainable parameters under CLAT for the paper's selections (Tables 3 and 6) beside the printed figures.

    python tools/table6.py        writes results/table6.json and prints the table of docs/baselines.md

Layers are counted as in the paper: convolutions in execution order from 1, projection shortcuts left out. The selection
is the first k of Table 3 with the k of Section 4.1, except where other entries fit Table 6 better, which is said.
"""

import json
from pathlib import Path
from typing import Any

import torch

from clat import build_model
from clat.layers import trace

# network: (k of Section 4.1, Table 3 for CIFAR-10, total and CLAT of Table 6 as printed)
PAPER: dict[str, tuple[int, list[int], str, str]] = {
    "dn121": (5, [39, 14, 1, 3, 88], "6.96M", "217K"),
    "wrn70-16": (4, [4, 17, 1, 59, 62], "267M", "8.29M"),
    "rn50": (3, [34, 41, 48, 3, 36], "23.7M", "823K"),
    "wrn34-10": (2, [26, 1, 30, 3, 28], "46.16M", "1.24M"),  # printed "26,130,3,28": a comma is lost
    "rn18": (1, [11, 10, 4, 2, 12], "11.2M", "590K"),
    "vgg19": (1, [9, 11, 5, 3, 1], "39.3M", "236K"),
}
TARGET = Path(__file__).parents[1] / "results/table6.json"


def rows() -> list[dict[str, Any]]:
    found = []
    for name, (k, listed, total, clat) in PAPER.items():
        with torch.device("meta"):
            network = build_model(name, 10).network
        sizes = {call.index: call.parameters for call in trace(network, torch.empty(1, 3, 32, 32, device="meta"))}
        found.append(
            {
                "network": name,
                "parameters": sum(parameter.numel() for parameter in network.parameters()),
                "k": k,
                "listed": {index: sizes[index] for index in listed},
                "first_k": sum(sizes[index] for index in listed[:k]),
                "fits": _fit(sizes, listed, k, _number(clat)),
                "printed_total": total,
                "printed_clat": clat,
            }
        )
    return found


def _fit(sizes: dict[int | None, int], listed: list[int], k: int, printed: float) -> list[int] | None:
    """The k (or fewer) listed layers whose sizes add up to the printed figure within its rounding, if any do."""
    from itertools import combinations

    for count in range(k, 0, -1):
        for chosen in combinations(listed, count):
            if abs(sum(sizes[index] for index in chosen) - printed) <= 0.006 * printed:
                return list(chosen)
    return None


def _number(text: str) -> float:
    return float(text[:-1]) * {"K": 1e3, "M": 1e6}[text[-1]]


def markdown(found: list[dict[str, Any]]) -> list[str]:
    """The table in docs/baselines.md, line by line."""
    lines = ["| network | parameters | printed | k | first k of Table 3 | printed in Table 6 | layers that fit it |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in found:
        first = f"{row['first_k']:,} ({100 * row['first_k'] / row['parameters']:.1f} %)"
        fits = ", ".join(map(str, row["fits"])) if row["fits"] else "none"
        total = f"{row['parameters']:,} | {row['printed_total']}"
        lines.append(f"| {row['network']} | {total} | {row['k']} | {first} | {row['printed_clat']} | {fits} |")
    return lines


if __name__ == "__main__":
    table = rows()
    TARGET.write_text(json.dumps(table, indent=1) + "\n")
    print("\n".join(markdown(table)))
