"""Tables for a terminal, 80 columns wide or more."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from clat.attacks import Attack
from clat.criticality import LayerScore
from clat.evaluation.accuracy import Accuracy, Result
from clat.evaluation.sweep import Curve
from clat.evaluation.transfer import Transfer
from clat.evaluation.trust import Verdict
from clat.layer_names import WRAPPER
from clat.report.words import duration, strength
from clat.text import plain
from clat.training.integrity import LayerStatus
from clat.training.runs import Run
from clat.tuners.order import ranked

NARROWEST = 16  # columns that a name is folded to at most


@dataclass(frozen=True)
class Name:
    """A name in one line, shortened from the left to fit the column, e.g. ``...layer4.1.conv2``."""

    text: str
    style: str = ""

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        width = Text(self.text).cell_len
        return Measurement(min(width, NARROWEST), width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        shown = Text(self.text, style=self.style)
        if shown.cell_len > options.max_width:
            shown = Text("..." + self.text[-max(1, options.max_width - 3) :], style=self.style)
        shown.truncate(options.max_width)
        yield shown


def layer_name(name: str) -> Name:
    """A layer's name as a cell, without ``network.``, which ``build_model`` puts before every one."""
    return Name(plain(name.removeprefix(WRAPPER)))


def apart(names: Sequence[str]) -> list[Name]:
    """Networks' names as cells, without the folders and the file name that all of them share."""
    parts = [PurePath(name).parts for name in names]
    first = last = 0
    if len(names) > 1:
        shortest = min(map(len, parts)) - 1
        while first < shortest and len({part[first] for part in parts}) == 1:
            first += 1
        while first + last < shortest and len({part[-1 - last] for part in parts}) == 1:
            last += 1
    return [Name(plain(PurePath(*part[first : len(part) - last])) if part else ".") for part in parts]


def plan(attacks: Sequence[Attack]) -> list[str]:
    """What each attack of an evaluation will do, a line each; random starts of one attack share a line."""
    starts: dict[str, list[Attack]] = {}
    for attack in attacks:
        starts.setdefault(attack.name.split(", start")[0], []).append(attack)
    lines = []
    for name, same in starts.items():
        settings = {**same[0].settings, **({"starts": len(same)} if len(same) > 1 else {})}
        words = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                          for key, value in settings.items())  # fmt: skip
        lines.append(f"{name}: {words}{f' ({same[0].note})' if same[0].note else ''}")
    return lines


def evaluation_table(result: Result, *, balanced: bool = False) -> Table:
    """An evaluation for a terminal: what was left after each attack, with counts and 95 % Wilson intervals.

    Args:
        balanced: show the balanced accuracies, too
    """
    table = Table(box=None, header_style="bold", title_justify="left")
    for heading in ("", "accuracy", "broken", "time"):
        table.add_column(heading, justify="right" if heading in ("broken", "time") else "left")
    table.add_row("clean", str(result.clean), "", "")
    for attack in result.attacks:
        broken = f"{attack.broken} of {attack.attacked}"
        table.add_row(plain(attack.name), str(attack.robust), broken, duration(attack.seconds))
    table.add_row("robust", str(result.robust), style="bold")
    if balanced:
        table.add_row("balanced clean", str(result.balanced_clean), "", "")
        table.add_row("balanced robust", str(result.balanced_robust), style="bold")
    return table


def transfer_table(found: Transfer) -> Table:
    """A row for each network that was attacked, a column for each that was measured; white-box is bold."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("attacked")
    names = apart(found.networks)
    for name in names:
        table.add_column(name)
    table.add_row("none (clean)", *map(_cell, found.clean))
    for i, (name, row) in enumerate(zip(names, found.attacked, strict=True)):
        table.add_row(name, *(_cell(cell, "bold" if i == j else "") for j, cell in enumerate(row)))
    return table


def sweep_table(curves: Mapping[str, Curve]) -> Table:
    """Curves over the same strengths: a row for each strength, a column for each network."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    first = next(iter(curves.values()))
    table.add_column("eps" if first.over == "eps" else "steps", justify="right")
    for name in apart(list(curves)):
        table.add_column(name)
    for number, point in enumerate(first.points):
        table.add_row(strength(first, point), *(_cell(curve.points[number].accuracy) for curve in curves.values()))
    return table


def _cell(accuracy: Accuracy, style: str = "") -> Text:
    low, high = accuracy.interval
    return Text(f"{100 * accuracy.value:.2f} % ({accuracy.correct})\n[{100 * low:.2f}, {100 * high:.2f}]", style=style)


def trust_table(verdict: Verdict, title: str, *, thresholds: bool = False) -> Table:
    """The findings of a verdict for a terminal."""
    table = Table(title=_title(title), title_justify="left", box=None, header_style="bold")
    columns = [("check", None), ("", None), ("measured", 40), ("threshold (source)", 40), ("time", None)]
    for heading, width in columns if thresholds else [*columns[:3], columns[4]]:
        table.add_column(heading, ratio=width, no_wrap=width is None, justify="right" if heading == "time" else "left")
    style = {"pass": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}
    for finding in verdict.findings:
        status = Text(finding.status, style=style[finding.status])
        row_style = "dim" if finding.status == "skipped" else None
        threshold = [Text(finding.threshold, style="dim")] if thresholds else []
        measured = Text(plain(finding.measured))
        table.add_row(finding.check, status, measured, *threshold, duration(finding.seconds), style=row_style)
    return table


def _title(text: str) -> Text:
    return Text(plain(text), style="table.title")


def layer_rows(scores: list[LayerScore], measure: str = "criticality") -> list[dict[str, Any]]:
    """The layers by rank, with what they were ranked by under its name; below, unranked, those never selected."""
    first = ranked(scores)
    others = [score for score in scores if score not in first]
    rows = [{"rank": rank, **asdict(score), "note": ""} for rank, score in enumerate(first, 1)]
    notes = {True: "shortcut", False: "head"}
    rows += [{"rank": None, **asdict(score), "note": notes[score.index is None]} for score in others]
    return [{measure if key == "criticality" else key: value for key, value in row.items()} for row in rows]


def layer_table(rows: list[dict[str, Any]], size: int, title: str, measure: str = "criticality") -> Table:
    """The rows of ``layer_rows`` for a terminal; ``size`` is the number of parameters of the whole network."""
    table = Table(title=_title(title), title_justify="left", box=None, header_style="bold")
    for heading in ("rank", "index", "layer", "C" if measure == "criticality" else measure, "W", "parameters", "share"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for row in rows:
        table.add_row(
            str(row["rank"] or row["note"]),
            str(row["index"] or ""),
            layer_name(row["name"]),
            f"{row[measure]:.4g}",
            f"{row['weakness']:.2e}",
            f"{row['parameters']:,}",
            f"{100 * row['parameters'] / size:.2f} %",
            style=None if row["rank"] else "dim",
        )
    return table


def status_table(found: list[LayerStatus], run: Run) -> Table:
    """The layers of a run as trained, frozen or irregular, for a terminal."""
    table = Table(title=_title(f"Layers of {run.folder} after epoch {run.epoch}"), title_justify="left", box=None)
    for name in ("layer", "state", "selected before", "parameters", ""):
        table.add_column(name, justify="right" if name == "parameters" else "left")
    style = {"trained": "green", "frozen": "dim", "irregular": "bold red"}
    for layer in found:
        epochs = ", ".join(str(s.epoch) for s in run.selections if layer.name in s.layers)
        reason = Text(plain(layer.reason))
        table.add_row(
            layer_name(layer.name), layer.state, epochs, f"{layer.parameters:,}", reason, style=style[layer.state]
        )
    return table
