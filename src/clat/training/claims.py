"""Who may write to a run folder: one run at a time, and only over what a run wrote."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from clat.errors import InputError
from clat.files import parse_json, read_text
from clat.text import plain
from clat.training.runs import Run

BEGUN = ("start.json", "environment.json", "recipe.yaml")  # in the order in which a run begins to write
FILES = (
    *BEGUN,
    "metrics.jsonl",
    "selections.jsonl",
    "result.json",
    "last.safetensors",
    "best.safetensors",
    "averaged.safetensors",
)
LOCK = ".lock"
EVENTS = "tensorboard"  # the folder of that tracker
RECORD = re.compile(r"\.?[\w.+-]+-[0-9a-f]{12}\.json(\.partial)?")  # of an evaluation


@contextmanager
def claim(run: Run, *, resume: bool, overwrite: bool) -> Iterator[bool]:
    """Makes sure that a run may write here and, inside the block, that no other process does.

    Yields whether there is a run to resume. A folder that a run was killed in before its recipe was written holds
    nothing to resume, and is free.

    Raises:
        InputError: there is a run already and neither flag is given, or other files, or another process trains here
    """
    if resume and overwrite:
        raise InputError("Both --resume and --overwrite are given; continue the run or replace it, not both.")
    _check_free(run, resume, overwrite)  # before anything is touched
    with _locked(run.folder):
        _check_free(run, resume, overwrite)
        yield run.exists and resume


def clear(run: Run) -> None:
    """Removes the files of an earlier run and no others.

    What a resumed run needs goes first, recipe and environment last: a folder that a kill leaves half cleared may
    be replaced, and is never resumed.
    """
    order = (BEGUN[0], *FILES[3:], BEGUN[2], BEGUN[1])
    for path in sorted(_files(run.folder), key=lambda path: order.index(path.name) if path.name in order else 1):
        if path.name == "evaluations":
            _clear_records(path)
        elif path.name == EVENTS:
            _clear_events(path)
        elif _is_own(path) and path.name != LOCK:
            path.unlink(missing_ok=True)


def _check_free(run: Run, resume: bool, overwrite: bool) -> None:
    there = [path for path in _files(run.folder) if path.name != LOCK]
    foreign = [path for path in there if not _is_own(path)]
    is_run = run.exists and any((run.folder / name).is_file() for name in BEGUN[:2])
    if is_run and not (resume or overwrite):
        raise InputError(
            f"{plain(run.folder)} already holds a run; continue it with --resume, replace it with --overwrite, or "
            "choose another --out."
        )
    if foreign and not (is_run and resume):
        raise InputError(
            f"{plain(run.folder)} holds other files than a run's, such as {plain(foreign[0].name)}; choose "
            "another --out."
        )
    rest = [path.name for path in there if _written(path.name) not in BEGUN]
    if not is_run and (rest or run.exists):
        raise InputError(
            f"{plain(run.folder)} is not empty and is not a complete run folder: it holds "
            f"{plain(rest[0] if rest else 'recipe.yaml')} but no "
            f"{'environment.json' if run.exists else 'recipe.yaml'}; move its files away, or choose another --out."
        )


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir()) if os.path.lexists(folder) else []
    except (OSError, ValueError) as error:
        raise _no_folder(folder, error) from error


def _is_own(path: Path) -> bool:
    if path.name in ("evaluations", EVENTS):
        return path.is_dir() and not path.is_symlink()
    name = _written(path.name)
    own = name in (*FILES, LOCK) or re.fullmatch(r"optimizer-\d+\.safetensors", name) is not None
    return own and (path.is_file() or path.is_symlink())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock; the system releases it when the process ends.

    A folder made for the lock is removed if nothing was written. Where the file system has no locks, nothing
    is held.
    """
    path, made = folder / LOCK, []
    try:
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            _held.add(lock)
            taken = take_lock(lock)
            if not taken or _same_file(lock, path):  # another process may have ended and removed it in between
                break
            _let_go(lock)
    except (OSError, ValueError) as error:
        _remove_empty(made)
        raise _no_folder(folder, error) from error
    if not taken:
        _let_go(lock)
        raise InputError(
            f"Another process is training in {plain(folder)}; wait until it ends, or choose another --out."
        )
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        _let_go(lock)
        _remove_empty(made)


_held: set[int] = set()  # descriptors of the locks that this process holds


def _close_held() -> None:
    """Closes the locks in a forked process, such as a data loader: it can outlive its parent and must not lock."""
    for lock in _held:
        with suppress(OSError):
            os.close(lock)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_held)


def take_lock(lock: int) -> bool:
    """Whether the file could be locked; not if another process has it."""
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
    with suppress(OSError, ValueError):  # the folder is not empty, or could not be made
        for folder in folders:
            folder.rmdir()


def _clear_records(folder: Path) -> None:
    """Removes the records of evaluations, recognised by name and content, and the folder if it is then empty."""
    for path in folder.iterdir():
        if RECORD.fullmatch(path.name) and path.is_file() and not path.is_symlink() and _is_record(path):
            path.unlink()
    with suppress(OSError):
        folder.rmdir()


def _clear_events(folder: Path) -> None:
    """Removes what TensorBoard's writer made, and the folder if it is then empty."""
    for path in folder.glob("events.out.tfevents.*"):
        path.unlink()
    _remove_empty([folder])


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
