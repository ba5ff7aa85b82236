"""Tables for a terminal."""

from dataclasses import asdict
from typing import Any

from rich.table import Table

from clat.criticality import LayerScore, ranked
from clat.integrity import LayerStatus
from clat.runs import Run
from clat.threat import Threat


def attack_name(name: str, threat: Threat) -> str:
    """An attack with its ball, e.g. PGD-20 linf eps 8/255."""
    grey = threat.radius * 255
    eps = f"{round(grey)}/255" if abs(grey - round(grey)) < 1e-9 and threat.norm == "linf" else f"{threat.radius:g}"
    return f"{name} {threat.norm} eps {eps}"


def ranking(scores: list[LayerScore]) -> list[dict[str, Any]]:
    """The layers by rank; below them, unranked, those that are never selected."""
    ranking = ranked(scores)
    others = [score for score in scores if score not in ranking]
    rows = [{"rank": rank, **asdict(score), "note": ""} for rank, score in enumerate(ranking, 1)]
    notes = {True: "shortcut", False: "head"}
    return rows + [{"rank": None, **asdict(score), "note": notes[score.index is None]} for score in others]


def layer_table(rows: list[dict[str, Any]], size: int, title: str) -> Table:
    """The rows of ``ranking`` for a terminal; ``size`` is the number of parameters of the whole network."""
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for heading in ("rank", "index", "layer", "C", "W", "parameters", "share"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for row in rows:
        table.add_row(
            str(row["rank"] or row["note"]),
            str(row["index"] or ""),
            row["name"],
            f"{row['criticality']:.4g}",
            f"{row['weakness']:.2e}",
            f"{row['parameters']:,}",
            f"{100 * row['parameters'] / size:.2f} %",
            style=None if row["rank"] else "dim",
        )
    return table


def status_table(found: list[LayerStatus], run: Run) -> Table:
    """The layers of a run as trained, frozen or irregular, for a terminal."""
    table = Table(title=f"Layers of {run.folder} after epoch {run.epoch}", title_justify="left", box=None)
    for name in ("layer", "state", "selected before epoch", "parameters", ""):
        table.add_column(name, justify="right" if name == "parameters" else "left")
    style = {"trained": "green", "frozen": "dim", "irregular": "bold red"}
    for layer in found:
        epochs = ", ".join(str(s.epoch) for s in run.selections if layer.name in s.layers)
        table.add_row(layer.name, layer.state, epochs, f"{layer.parameters:,}", layer.reason, style=style[layer.state])
    return table
