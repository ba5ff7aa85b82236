"""The command that runs a comparison: clat compare."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from rich.table import Table
from torch import nn

from clat.cli.shared import console, data_named, device_named, is_beside_the_first, network_named, say_page
from clat.cli.tables import Name
from clat.cli.unit import PLAN
from clat.compare.estimate import HOW, pass_times, unit_seconds
from clat.compare.file import load_comparison
from clat.compare.plan import Comparison
from clat.compare.response import layers_alone
from clat.compare.run import RESULT, Progress, begin, carry_out, locked
from clat.compare.table import columns, lines_of, markdown, measured_how, rows, validated_how, verdicts
from clat.compare.unit import Unit
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.files import write_text
from clat.report.pictures import draw_learning
from clat.report.words import duration
from clat.text import plain

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def compare(
    file: str,
    *,
    data: str,
    out: str,
    scale: str = "full",
    seeds: list[int] | None = None,
    only: list[str] | None = None,
    jobs: int = 1,
    model: str | None = None,
    device: str | None = None,
    dry_run: bool = False,
) -> int:
    """Runs a comparison, a base and several arms with several seeds, and tests the contrasts fixed in its file.

    If a comparison is interrupted, the same command continues it. docs/compare.md shows a file.

    Args:
        file: a YAML file, or the name of a comparison that ships with clat, e.g. random-or-critical
        data: the data: a Hugging Face name, folder, parquet or CSV file; options after commas, e.g. photos,size=64
        out: the comparison's folder: run folders, result.json, table.md and curves.png
        scale: full, or one of the file's scales, such as small
        seeds: in place of the file's
        only: run only these arms, and those that they start from
        jobs: units at a time; with more than one, each has one thread
        model: the network in place of the base's; only here may it be a factory of yours, such as file.py:factory
        device: where to train, e.g. cpu or cuda:1; the fastest kind of device here if not given
        dry_run: print the plan and what it will take, and stop there
    """
    if is_beside_the_first():
        return 0
    if jobs < 1:
        raise InputError(f"jobs is {jobs}; run 1 or more units at a time.")
    comparison = load_comparison(file, scale, model=model, seeds=seeds)
    device_named(device)

    @cache
    def load(split: str) -> Dataset:
        return data_named(data, split)

    def build(name: str) -> nn.Module:
        return network_named(name, load("train"))

    folder = Path(out)
    if dry_run:
        _show_plan(begin(comparison, folder, load, build, only=only), load("train"), build, jobs, device)
        return 0
    with locked(folder):
        progress = begin(comparison, folder, load, build, only=only)
        if progress.left():
            _show_plan(progress, load("train"), build, jobs, device)
        plan = {"comparison": comparison.to_json(), "data": data, "model": model, "device": device}
        write_text(folder / PLAN, json.dumps(plan) + "\n")
        load.cache_clear()  # the units read it for themselves

        def start(unit: Unit) -> subprocess.Popen[bytes]:
            return _start(unit, one_thread=jobs > 1)

        carry_out(progress, start, jobs=jobs, say=lambda line: console.print(plain(line), soft_wrap=True))
        _report(progress)
    if progress.failed:
        raise UnitError(progress)
    return 0


class UnitError(InputError):
    """Some units failed; all others are done."""

    def __init__(self, progress: Progress):
        first, why = next(iter(progress.failed.items()))
        more = f", and {len(progress.failed) - 1} more failed" if len(progress.failed) > 1 else ""
        super().__init__(
            f"{first} failed: {why}{more}; the others are done, and the same command tries again what is left."
        )


def _start(unit: Unit, *, one_thread: bool) -> subprocess.Popen[bytes]:
    """A process that trains and evaluates the unit, and ends when this one does."""
    threads = dict.fromkeys(THREADS, "1") if one_thread else {}
    unit.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "clat.cli.unit", str(unit.out), unit.arm.name, str(unit.seed)]
    with open(unit.log, "ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **threads}
        )


def _show_plan(
    progress: Progress, data: Dataset, build: Callable[[str], nn.Module], jobs: int, device: str | None
) -> None:
    """What runs, from where, and for how long."""
    comparison, left = progress.comparison, progress.left()
    times = pass_times(comparison, data, build, device_named(device), one_thread=jobs > 1)
    console.print(plain(comparison.question), style="bold", highlight=False)
    for note in comparison.notes:
        console.print(plain(f"  {note}"), highlight=False, style="dim")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("arm", "recipe", "from", "epochs", "seeds left", "each"):
        table.add_column(heading, justify="left" if heading in ("arm", "recipe", "from") else "right")
    total = 0.0
    for arm in (arm for arm in comparison.arms if arm.name in progress.arms):
        waiting = [unit for unit in left if unit.arm.name == arm.name]
        seconds = partial(unit_seconds, comparison, arm, times, len(data), len(data.classes))
        total += sum(seconds(trained=unit.epochs) for unit in waiting)
        origin = arm.model if arm.start is None else f"{arm.start}/{arm.checkpoint}"
        cells = [Name(plain(arm.name)), Name(plain(arm.recipe)), Name(plain(origin))]
        seeds = ", ".join(str(unit.seed) for unit in waiting) or "none"
        table.add_row(*cells, str(arm.keys.get("epochs", "")), seeds, duration(seconds()))
    console.print(table, highlight=False)
    for each, wanted in zip(comparison.evaluations, progress.wanted, strict=True):
        how = f"{each.tier} tier, eps {255 * each.eps:.3g}/255, {wanted['evaluation']['images']:,} {each.of} images"
        console.print(f"Evaluation: {how}", highlight=False)
    runs = {unit.arm.name for unit in left} or set(progress.arms)
    known = runs | {entry["arm"] for entry in progress.finished()}
    answered = [pair for pair in comparison.contrasts if (arms := {side.arm for side in pair}) <= known and arms & runs]
    pairs = ", ".join(f"{one} against {two}" for one, two in answered)
    console.print(plain(f"Contrasts: {pairs or 'none'}"), highlight=False)
    beside = f", {jobs} at a time" if jobs > 1 else ""
    console.print(
        f"{len(left)} unit{'' if len(left) == 1 else 's'} left{beside}: about {duration(total / jobs)}. {HOW}",
        highlight=False,
    )


def _report(progress: Progress) -> None:
    """The tables on the terminal, table.md and curves.png."""
    comparison: Comparison = progress.comparison
    entries = progress.finished()
    if not entries:
        return
    for evaluation in comparison.evaluations:
        console.print(plain(measured_how(comparison, entries, evaluation)), highlight=False)
        table = Table(box=None, header_style="bold", pad_edge=False)
        for heading in columns(comparison):
            table.add_column(heading, justify="left" if heading == "arm" else "right")
        for row in rows(comparison, entries, evaluation):
            table.add_row(Name(row[0]), *row[1:])
        console.print(table, highlight=False)
    if how := validated_how(entries):
        console.print(plain(how), highlight=False)
    for verdict in verdicts(comparison, entries):
        first, *rest = lines_of(verdict)
        console.print(plain(first), highlight=False)
        for line in rest:
            console.print(plain(f"  {line}"), highlight=False, style="dim")
    write_text(progress.out / "table.md", markdown(comparison, entries, layers_alone(comparison, entries)))
    draw_learning(entries, progress.out / "curves.png")
    files = f"{plain(progress.out / RESULT)}, table.md and curves.png"
    console.print(f"Written: {files}", highlight=False)
    say_page(console, [str(progress.out)])
