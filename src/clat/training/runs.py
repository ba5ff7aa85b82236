"""A run folder: everything a run was told and everything it found, written so that a kill at any moment is harmless.

recipe.yaml            the resolved recipe
environment.json       data, model, versions, hardware, command
start.json             fingerprint of each tensor before the first step
metrics.jsonl          one line an epoch
selections.jsonl       one line a selection, with the criticality of every layer
last.safetensors       the network after the last finished epoch: writing it commits the epoch
best.safetensors       the network after the epoch with the best validation accuracy
optimizer-N.safetensors  the optimizer after epoch N, for --resume, with the network if ``last`` has it merged
result.json            the summary, once the run is finished
evaluations/           what clat evaluate found, a file an evaluation
.lock                  there while a process trains here

What is read back is checked here, each file by itself and all against each other, so that a folder that is damaged or
incomplete is refused with the name of the file and never trained on from.
"""

import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from clat.checkpoint import load_tensors
from clat.criticality import LayerScore
from clat.errors import InputError
from clat.files import parse_json, parse_yaml, read_text, write_text
from clat.source import commit
from clat.text import plain
from clat.tuners.selection import Selection

BEGUN = ("start.json", "environment.json", "recipe.yaml")  # in the order in which a run begins to write
FILES = (*BEGUN, "metrics.jsonl", "selections.jsonl", "result.json", "last.safetensors", "best.safetensors")
LOCK = ".lock"
RECORD = re.compile(r"\.?[\w.+-]+-[0-9a-f]{12}\.json(\.partial)?")  # of an evaluation
COPY = "put it back from a copy, or train the run anew"

Content = TypeVar("Content")


@dataclass(frozen=True)
class Run:
    """A run folder and what it holds.

    What a property reads is checked; InputError says in one sentence which file is missing or damaged, and how.
    """

    folder: Path

    @property
    def last(self) -> Path:
        return self.folder / "last.safetensors"

    @property
    def best(self) -> Path:
        return self.folder / "best.safetensors"

    def optimizer(self, epoch: int) -> Path:
        return self.folder / f"optimizer-{epoch}.safetensors"

    @property
    def exists(self) -> bool:
        return os.path.isfile(self.folder / "recipe.yaml")  # False too where there can be no such path

    @property
    def finished(self) -> bool:
        return os.path.isfile(self.folder / "result.json")

    @property
    def epoch(self) -> int:
        """The last finished epoch, 0 before the first."""
        return self.epoch_of(self.last) if self.last.exists() else 0

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return self._read("metrics.jsonl", _metrics) if (self.folder / "metrics.jsonl").exists() else []

    @property
    def selections(self) -> list[Selection]:
        return self._read("selections.jsonl", _selections) if (self.folder / "selections.jsonl").exists() else []

    @property
    def selected(self) -> list[str]:
        """The layers that were selected so far, each once."""
        return list(dict.fromkeys(name for selection in self.selections for name in selection.layers))

    @property
    def start(self) -> dict[str, str]:
        return self._read("start.json", _start)

    @property
    def environment(self) -> dict[str, Any]:
        return self._read("environment.json", _environment)

    @property
    def recipe(self) -> dict[str, Any]:
        return self._read("recipe.yaml", _recipe)

    @property
    def result(self) -> dict[str, Any]:
        return self._read("result.json", _result, "give the run's command again with --resume, which writes it anew")

    def progress(self) -> tuple[list[dict[str, Any]], list[Selection]]:
        """Metrics and selections up to the last finished epoch, which a resumed run goes on from.

        Raises:
            InputError: a file is missing or damaged, or they are not of one run
        """
        metrics, selections = self.metrics, self.selections
        if not self.last.exists():
            if self.best.exists() or self.finished or len(metrics) > 1:  # more than a kill in the first epoch leaves
                raise self.unusable(self.last.name, "is missing", self.rescue())
            return [], []
        try:
            _, facts = load_tensors(self.last)
            epoch = _epoch(facts)
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise self.unusable(self.last.name, f"is damaged ({_reason(error)})", self.rescue()) from error
        for name in ("metrics.jsonl", "selections.jsonl"):
            if not (self.folder / name).exists():
                raise self.unusable(name, f"is missing, and {self.last.name} holds epoch {epoch}")
        if len(metrics) not in (epoch, epoch + 1):  # one more where a kill came between the two files
            raise self.unusable(
                "metrics.jsonl", f"ends with epoch {len(metrics)}, but {self.last.name} holds epoch {epoch}"
            )
        if any(facts.get("validation", {}).get(key) != metrics[epoch - 1][key] for key in ("clean", "robust")):
            raise self.unusable("metrics.jsonl", f"tells another accuracy of epoch {epoch} than {self.last.name}")
        return metrics[:epoch], [selection for selection in selections if selection.epoch <= epoch]

    def epoch_of(self, path: Path) -> int:
        """The epoch that a checkpoint of the run holds. Raises InputError if it is missing or damaged."""
        try:
            return _epoch(load_tensors(path)[1])
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise self.unusable(path.name, f"is damaged ({_reason(error)})") from error

    def rescue(self) -> str:
        """What to do where ``last`` is lost."""
        try:
            epoch = self.epoch_of(self.best)
        except InputError:
            return COPY
        return (
            f"{self.best.name} holds epoch {epoch} and is intact: start from it with clat finetune RECIPE --from "
            f"{plain(self.best)} --out ANOTHER, or put {self.last.name} back from a copy"
        )

    def unusable(self, name: str, why: str, remedy: str = COPY) -> InputError:
        """The error that a file of the folder cannot be used: ``why`` continues its name."""
        return InputError(f"{plain(self.folder)} is not a complete run folder: {name} {why}; {remedy}.")

    def write(self, name: str, content: Any) -> None:
        """Writes a JSON, JSONL or YAML file of the folder atomically."""
        if name.endswith(".yaml"):
            text = yaml.safe_dump(content, sort_keys=False)
        elif name.endswith(".jsonl"):
            text = "".join(json.dumps(entry) + "\n" for entry in content)
        else:
            text = json.dumps(content, indent=2) + "\n"
        write_text(self.folder / name, text)

    @contextmanager
    def claim(self, *, resume: bool, overwrite: bool) -> Iterator[bool]:
        """Makes sure that a run may write here and, inside the block, that no other process does.

        Yields whether there is a run to resume. A folder that a run was killed in before its recipe was written holds
        nothing to resume, and is free.

        Raises:
            InputError: there is a run already and neither flag is given, or other files, or another process trains here
        """
        if resume and overwrite:
            raise InputError("Both --resume and --overwrite are given; continue the run or replace it, not both.")
        self._check_free(resume, overwrite)  # before anything is touched
        with self._locked():
            self._check_free(resume, overwrite)
            yield self.exists and resume

    def clear(self) -> None:
        """Removes the files of an earlier run and no others.

        What a resumed run needs goes first, recipe and environment last: a folder that a kill leaves half cleared may
        be replaced, and is never resumed.
        """
        order = (BEGUN[0], *FILES[3:], BEGUN[2], BEGUN[1])
        for path in sorted(self._files(), key=lambda path: order.index(path.name) if path.name in order else 1):
            if path.name == "evaluations":
                _clear_records(path)
            elif self._is_own(path) and path.name != LOCK:
                path.unlink(missing_ok=True)

    def _check_free(self, resume: bool, overwrite: bool) -> None:
        there = [path for path in self._files() if path.name != LOCK]
        foreign = [path for path in there if not self._is_own(path)]
        is_run = self.exists and any((self.folder / name).is_file() for name in BEGUN[:2])
        if is_run and not (resume or overwrite):
            raise InputError(
                f"{plain(self.folder)} already holds a run; continue it with --resume, replace it with --overwrite, or "
                "choose another --out."
            )
        if foreign and not (is_run and resume):
            raise InputError(
                f"{plain(self.folder)} holds other files than a run's, such as {plain(foreign[0].name)}; choose "
                "another --out."
            )
        rest = [path.name for path in there if _written(path.name) not in BEGUN]
        if not is_run and (rest or self.exists):
            raise InputError(
                f"{plain(self.folder)} is not empty and is not a complete run folder: it holds "
                f"{plain(rest[0] if rest else 'recipe.yaml')} but no "
                f"{'environment.json' if self.exists else 'recipe.yaml'}; move its files away, or choose another --out."
            )

    def _files(self) -> list[Path]:
        try:
            return sorted(self.folder.iterdir()) if os.path.lexists(self.folder) else []
        except (OSError, ValueError) as error:
            raise _no_folder(self.folder, error) from error

    @staticmethod
    def _is_own(path: Path) -> bool:
        if path.name == "evaluations":
            return path.is_dir() and not path.is_symlink()
        name = _written(path.name)
        own = name in (*FILES, LOCK) or re.fullmatch(r"optimizer-\d+\.safetensors", name) is not None
        return own and (path.is_file() or path.is_symlink())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the folder's lock, which ends with the process however that ends.

        The folder is made for it, and goes again if nothing was written. Where the file system has no locks, nothing
        is held.
        """
        path, made = self.folder / LOCK, []
        try:
            made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            while True:
                lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                _held.add(lock)
                taken = _take_lock(lock)
                if not taken or _same_file(lock, path):  # another process may have ended and removed it meanwhile
                    break
                _let_go(lock)
        except (OSError, ValueError) as error:
            _remove_empty(made)
            raise _no_folder(self.folder, error) from error
        if not taken:
            _let_go(lock)
            raise InputError(
                f"Another process is training in {plain(self.folder)}; wait until it ends, or choose another --out."
            )
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()
            _let_go(lock)
            _remove_empty(made)

    def _read(self, name: str, parse: Callable[[str], Content], remedy: str = COPY) -> Content:
        path = self.folder / name
        if not os.path.lexists(path):
            raise self.unusable(name, "is missing", remedy)
        try:
            return parse(read_text(path))
        except KeyError as error:
            raise self.unusable(name, f"is damaged (it lacks {plain(error.args[0])})", remedy) from error
        except (TypeError, ValueError) as error:
            raise self.unusable(name, f"is damaged ({_reason(error)})", remedy) from error


_held: set[int] = set()  # descriptors of the locks that this process holds


def _close_held() -> None:
    """In a process that was forked off, such as one that loads data: it may outlive its parent and must not lock."""
    for lock in _held:
        with suppress(OSError):
            os.close(lock)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_held)


def _take_lock(lock: int) -> bool:
    """Whether the file could be locked; another process may not have it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _let_go(lock: int) -> None:
    _held.discard(lock)
    os.close(lock)


def _same_file(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_empty(folders: Sequence[Path]) -> None:
    with suppress(OSError, ValueError):  # something was written, or there can be no such folder
        for folder in folders:
            folder.rmdir()


def _clear_records(folder: Path) -> None:
    """Removes the records of evaluations, told by name and content, and the folder if it is empty then."""
    for path in folder.iterdir():
        if RECORD.fullmatch(path.name) and path.is_file() and not path.is_symlink() and _is_record(path):
            path.unlink()
    with suppress(OSError):
        folder.rmdir()


def _is_record(path: Path) -> bool:
    if path.name.endswith(".partial"):
        return True
    try:
        content = parse_json(read_text(path), path)
    except InputError:
        return False
    return isinstance(content, dict) and isinstance(content.get("state"), dict)


def _written(name: str) -> str:
    """The file that a temporary one was to become."""
    return name.removesuffix(".partial").removeprefix(".") if name.endswith(".partial") else name


def _no_folder(folder: Path, error: Exception) -> InputError:
    return InputError(f"{plain(folder)} cannot be a run folder ({plain(error)}); choose another --out.")


def _reason(error: Exception) -> str:
    """What an error says, as a part of a sentence."""
    said = f"it lacks {error.args[0]}" if isinstance(error, KeyError) else str(error)
    return plain(" ".join(said.split())).rstrip(".")


# What the files must hold


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and least <= value <= most


def _count(value: Any, least: int = 0) -> bool:
    return type(value) is int and value >= least


def _mapping(content: Any) -> dict[str, Any]:
    _require(isinstance(content, dict) and all(isinstance(key, str) for key in content), "it holds no keys and values")
    return content


def _sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _lines(text: str) -> list[dict[str, Any]]:
    _require(not text or text.endswith("\n"), "its last line is cut")
    return [_mapping(parse_json(line, f"line {i}", "entry")) for i, line in enumerate(text.split("\n")[:-1], 1)]


def _epoch(facts: dict[str, Any]) -> int:
    _require(_count(facts["epoch"], 1), "its epoch is no number from 1 on")
    return int(facts["epoch"])


def _metrics(text: str) -> list[dict[str, Any]]:
    entries = _lines(text)
    for epoch, entry in enumerate(entries, 1):
        _require(entry["epoch"] == epoch and _count(entry["epoch"]), f"line {epoch} is not that of epoch {epoch}")
        _accuracies(entry, f"line {epoch}: ")
        for key in ("validation_images", "trainable"):
            _require(_count(entry[key]), f"line {epoch}: {key} is no count")
        for key, value in entry.items():
            _require(_number(value), f"line {epoch}: {plain(key)} is no finite number")
        _require(entry["seconds"] >= 0 and "loss" in entry, f"line {epoch}: no loss, or seconds below 0")
    return entries


def _accuracies(entry: dict[str, Any], where: str = "") -> None:
    for key in ("clean", "robust", *({"probe"} & entry.keys())):
        _require(_number(entry[key], 0, 1), f"{where}{key} is not between 0 and 1")


def _selections(text: str) -> list[Selection]:
    names = tuple(field.name for field in fields(LayerScore))
    entries = _lines(text)
    for line, entry in enumerate(entries, 1):
        _require(_count(entry["epoch"], 1), f"line {line}: epoch is no number from 1 on")
        for key in ("layers", "trainable", "training"):
            listed = isinstance(entry[key], list) and all(isinstance(name, str) for name in entry[key])
            _require(listed, f"line {line}: {key} is no list of names")
        _require(isinstance(entry["scores"], list), f"line {line}: scores is no list")
        for score in entry["scores"]:
            _require(isinstance(score, dict) and set(score) == set(names), f"line {line}: a score is no layer's")
            _require(isinstance(score["name"], str), f"line {line}: a score has no layer's name")
            _require(score["index"] is None or _count(score["index"]), f"line {line}: a layer's index is no number")
            values = (score["weakness"], score["criticality"], score["parameters"])
            _require(all(type(value) in (int, float) for value in values), f"line {line}: a score is no number")
    epochs = [entry["epoch"] for entry in entries]
    _require(epochs == sorted(set(epochs)), "its epochs do not ascend")
    return [Selection.from_json(entry) for entry in entries]


def _start(text: str) -> dict[str, str]:
    content = _mapping(parse_json(text, "it"))
    _require(bool(content) and all(map(_sha256, content.values())), "it holds no fingerprints")
    return content


def _environment(text: str) -> dict[str, Any]:
    content = _mapping(parse_json(text, "it"))
    _require(_sha256(_mapping(content["data"])["sha256"]), "the digest of the data is no digest")
    if content.get("extra") is not None:
        _require(_sha256(_mapping(content["extra"])["sha256"]), "the digest of the extra data is no digest")
    return content


def _recipe(text: str) -> dict[str, Any]:
    content = _mapping(parse_yaml(text, "it", "recipe"))
    _require(content["precision"] in ("fp32", "bf16"), "precision is neither fp32 nor bf16")
    content.setdefault("layout", "default")  # of a run before there was a choice
    _require(content["layout"] in ("default", "channels-last"), "layout is neither default nor channels-last")
    return content


def _result(text: str) -> dict[str, Any]:
    content = _mapping(parse_json(text, "it"))
    for key in ("best", "last"):
        _accuracies(_mapping(content[key]))
        _require(_count(content[key]["epoch"], 1), f"the epoch of {key} is no number from 1 on")
    for key in ("epochs", "trainable", "parameters"):
        _require(_count(content[key]), f"{key} is no count")
    _require(_number(content["seconds"], 0), "seconds is no number")
    return content


def environment(device: torch.device, processes: int = 1, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Versions, hardware and command of this process."""
    packages = ("torch-clat", "torch", "torchvision", "timm", "accelerate", "datasets", "safetensors")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(argv if argv is not None else sys.argv),
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
