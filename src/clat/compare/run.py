"""Runs a comparison: which units are left, several at a time, each after the one that it starts from."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from clat.compare.images import Load, measured_on
from clat.compare.plan import Comparison
from clat.compare.result import Entry, read_entries, write_result
from clat.compare.table import findings
from clat.compare.unit import STARTS, Unit, check_folder, fingerprints, identity, matches
from clat.errors import InputError
from clat.files import digest_of, read_text, write_text
from clat.text import plain
from clat.training.claims import take_lock

POLL = 0.2  # seconds between two looks at the running units
RESULT = "result.json"


class Running(Protocol):
    """A unit at work; a ``subprocess.Popen`` is one."""

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def terminate(self) -> None: ...


@dataclass
class Progress:
    """A comparison in its folder: what is done, what is left, and what failed.

    Args:
        comparison: the plan
        out: its folder
        data: digest of the training images
        wanted: the ``identity`` of each evaluation
        arms: those that run, with all that they start from
        entries: what is done, by the unit's name
        failed: why a unit ended, by its name
    """

    comparison: Comparison
    out: Path
    data: str
    wanted: Sequence[Mapping[str, Any]]
    arms: Sequence[str]
    entries: dict[str, Entry] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def units(self) -> list[Unit]:
        """All units of the arms that run, each after the one that it starts from."""
        return [Unit(self.out, arm, seed) for arm, seed in self.comparison.runs() if arm.name in self.arms]

    def before(self, unit: Unit) -> Unit | None:
        """The unit that this one starts from."""
        return Unit(self.out, self.comparison.arm(unit.arm.start), unit.seed) if unit.arm.start else None

    def done(self, unit: Unit) -> bool:
        """Whether there is an entry of this very unit."""
        entry, before = self.entries.get(unit.name), self.before(unit)
        start = self.entries.get(before.name) if before else None
        return entry is not None and matches(entry, unit, self.data, start, self.wanted)

    def left(self) -> list[Unit]:
        """The units to run, each after the one that it starts from.

        One that is done runs again where its checkpoint is gone and another has to start from it.
        """
        left: dict[str, Unit] = {}
        for unit in reversed(self.units()):
            if unit.name in left or not self.done(unit):
                left[unit.name] = unit
                before = self.before(unit)
                if before is not None and not unit.trained and not unit.can_start:
                    left[before.name] = before
        return [unit for unit in self.units() if unit.name in left]

    def read(self) -> None:
        """Takes over what result.json and the units' own files hold. Raises InputError if one is damaged."""
        for path in (self.out / RESULT, *sorted((self.out / "units").glob("*.json"))):
            for entry in read_entries(path):
                self.entries[_name(entry)] = entry

    def check_starts(self) -> None:
        """Raises InputError unless each file in starts/ is a checkpoint that the result names."""
        known = {
            f"{name}-{checkpoint}": weights
            for name, entry in self.entries.items()
            for checkpoint, weights in entry["weights"].items()
        }
        for path in sorted((self.out / STARTS).glob("*")):
            if path.suffix != ".safetensors" or known.get(path.stem) != digest_of(fingerprints(path)):
                raise InputError(
                    f"{plain(path)} is no checkpoint that {RESULT} names, such as base-0-best.safetensors with the "
                    "weights of that unit; remove it, or bring the result that it belongs to."
                )

    def finished(self) -> list[Entry]:
        """The entries that belong to the comparison, those of arms and seeds that this call leaves out among them."""
        seeds = sorted({entry["seed"] for entry in self.entries.values()})
        every = [Unit(self.out, arm, seed) for arm, seed in replace(self.comparison, seeds=tuple(seeds)).runs()]
        found: dict[str | None, Entry] = {}
        for unit in every:  # each after the one that it starts from
            before = self.before(unit)
            if self.done(unit) and (before is None or before.name in found):
                found[unit.name] = self.entries[unit.name]
        return list(found.values())

    def write(self, say: Callable[[str], object]) -> None:
        """Writes result.json; a former one with units that are asked for no more is kept beside it."""
        entries, path = self.finished(), self.out / RESULT
        gone = {_name(entry) for entry in read_entries(path)} - {_name(entry) for entry in entries}
        if gone:
            text = read_text(path)
            copy = path.with_name(f"result-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json")
            write_text(copy, text)
            say(f"{', '.join(sorted(gone))}: of another recipe, start or evaluation; the result is kept as {copy.name}")
        write_result(self.out / RESULT, self.comparison, entries, findings(self.comparison, entries))


def _name(entry: Entry) -> str:
    return f"{entry['arm']}-{entry['seed']}"


def begin(
    comparison: Comparison,
    out: Path,
    load: Load,
    build: Callable[[str], nn.Module],
    *,
    only: Sequence[str] | None = None,
) -> Progress:
    """Looks at what is there, and refuses what does not belong to the comparison.

    Args:
        load: gives a split of the data
        build: gives a new network by name
        only: these arms, and all that they start from
    Raises:
        InputError: an unknown arm, too few images, a damaged result, or a foreign run folder in a unit's place
    """
    names = [comparison.arm(name).name for name in only] if only else [arm.name for arm in comparison.arms]
    for name in names:  # grows as it goes
        start = comparison.arm(name).start
        if start is not None and start not in names:
            names.append(start)
    wanted = [identity(each, measured_on(comparison, each, load)) for each in comparison.evaluations]
    progress = Progress(comparison, out, load("train").digest(), wanted, names)
    progress.read()
    progress.check_starts()
    for unit in progress.units():
        if unit.run.exists:
            check_folder(unit, progress.data, start_of(unit, build))
    return progress


def start_of(unit: Unit, build: Callable[[str], nn.Module]) -> dict[str, str] | None:
    """Fingerprints of the weights that a unit begins with; None if they are not there yet."""
    if unit.origin is None:
        torch.manual_seed(unit.seed)
        return fingerprints(build(unit.arm.model))
    return fingerprints(unit.origin) if unit.can_start and unit.origin.is_file() else None


def carry_out(
    progress: Progress, start: Callable[[Unit], Running], *, jobs: int = 1, say: Callable[[str], object] = print
) -> None:
    """Runs what is left, ``jobs`` units at a time; result.json is written after each.

    A unit that fails is named with its log, those that start from it are left out, and all others run.

    Args:
        start: begins to train and evaluate a unit
        say: is told what happens
    """
    running: dict[str, tuple[Unit, Running, float]] = {}
    began: set[str] = set()
    progress.write(say)
    left = progress.left()
    try:
        while True:
            for unit in [unit for unit in left if _may_start(progress, unit, running)][: jobs - len(running)]:
                if unit.name in began:
                    progress.failed[unit.name] = "what it found is not what the plan asks for, such as another start"
                    continue
                began.add(unit.name)
                say(f"{unit.name}: {'evaluating' if unit.trained else 'training'} ...")
                running[unit.name] = unit, start(unit), time.monotonic()
            ended = [name for name, (_, process, _) in running.items() if process.poll() is not None]
            for name in ended:
                unit, process, since = running.pop(name)
                _end(progress, unit, process.wait(), time.monotonic() - since, say)
            if ended:
                left = progress.left()
            elif running:
                time.sleep(POLL)
            elif not any(_may_start(progress, unit, running) for unit in left):
                break
    finally:
        for _, process, _ in running.values():
            process.terminate()
    for unit in progress.left():
        before = progress.before(unit)
        if unit.name not in progress.failed and before is not None:
            progress.failed[unit.name] = f"{before.name}, which it goes on from, is not there"


def _may_start(progress: Progress, unit: Unit, running: Mapping[str, object]) -> bool:
    """Whether a unit neither runs nor failed, and the unit that it starts from is there."""
    if unit.name in running or unit.name in progress.failed:
        return False
    before = progress.before(unit)
    return before is None or unit.trained or (unit.can_start and before.name not in running)


def _end(progress: Progress, unit: Unit, code: int, seconds: float, say: Callable[[str], object]) -> None:
    """Takes over what a unit found, or why it failed."""
    if code == 0:
        entries = read_entries(unit.entry)
        for entry in entries:
            progress.entries[unit.name] = entry
        progress.write(say)
        robust = ", ".join(
            f"{each['checkpoint']} {100 * each['clean'] / each['evaluation']['images']:.1f} / "
            f"{100 * each['robust'] / each['evaluation']['images']:.1f}"
            for entry in entries
            for each in entry["evaluations"]
        )
        say(f"{unit.name}: done in {seconds:.0f} s; clean / robust {robust}")
    else:
        progress.failed[unit.name] = f"{_reason(unit.log, code)} (log: {plain(unit.log)})"
        say(f"{unit.name}: failed: {progress.failed[unit.name]}")


def _reason(log: Path, code: int) -> str:
    """The last words of a log."""
    with suppress(OSError):
        lines = [
            line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        said = [line for line in lines if line.startswith("clat: ")] or lines
        if said:
            return plain(said[-1].removeprefix("clat: ").rstrip("."))[:500]
    return f"it ended with code {code}"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds the comparison's folder: one process at a time.

    Raises:
        InputError: another one runs there, or there can be no such folder
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "a")  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise InputError(f"{plain(out)} cannot hold a comparison ({plain(error)}); choose another --out.") from error
    with file:
        if not take_lock(file.fileno()):
            raise InputError(
                f"Another clat compare is at work in {plain(out)}; wait until it ends, or choose another --out."
            )
        yield
