"""Atomic writes and safe reads."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from clat.errors import InputError
from clat.text import plain

LARGEST_TEXT = 64 * 2**20  # bytes of a JSON or YAML file
DEEPEST = 50  # levels of nesting in one


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Has ``write`` fill a temporary file beside ``path``, then renames it, so ``path`` is never half-written.

    A link is followed. A device or a pipe is written to directly, not replaced.

    Raises:
        InputError: the disk is full or the folder cannot be written; what was at ``path`` is still there
    """
    temporary = None
    try:
        path = path.resolve() if path.is_symlink() else path
        if path.exists() and not path.is_file():
            _write_through(path, write)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.partial")
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a NUL in the name; RuntimeError: a loop of links
        if temporary is not None:
            with suppress(OSError, ValueError):  # nothing was written, its folder is a file, or a NUL is in the name
                temporary.unlink()
        raise InputError(
            f"{plain(path)} could not be written ({plain(error)}); free some disk space or choose another place."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Writes text atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_text(path: Path, what: str = "file") -> str:
    """The text of a UTF-8 file.

    Args:
        what: what the file should be, for the message
    Raises:
        InputError: no such file, not readable, not UTF-8, or larger than a text file of ours can be
    """
    try:
        if not path.is_file():
            raise InputError(f"There is no {what} at {plain(path)}.")
        if path.stat().st_size > LARGEST_TEXT:
            raise InputError(f"{plain(path)} is too large for a {what}; the limit is {LARGEST_TEXT:,} bytes.")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{plain(path)} is not a readable {what} ({plain(error)}).") from error


def shipped(kind: str) -> dict[str, Path]:
    """The YAML files that come with clat by name, such as ``protocol/clat``; kind is recipes or comparisons."""
    package = Path(__file__).parent
    folders = (package / kind, package.parents[1] / kind)  # installed; in a checkout
    paths = ((path, folder) for folder in folders for path in folder.rglob("*.yaml"))
    return {str(path.relative_to(folder).with_suffix("")): path for path, folder in paths}


def parse_json(text: str, where: object, what: str = "file") -> Any:
    """JSON as values. Raises InputError, naming ``where``, if it is not JSON or nested too deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{plain(where)} is not a readable {what}: it is no valid JSON ({plain(error)}).") from error


def parse_yaml(text: str, where: object, what: str = "file") -> Any:
    """YAML as values, without tags, aliases or deep nesting, which a recipe does not need.

    Raises:
        InputError: naming ``where``, if it is not such YAML
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise InputError(f"{plain(where)} uses YAML aliases, which a {what} may not; write the values out.")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise InputError(f"{plain(where)} is nested too deep for a {what}.")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{plain(where)} is not a readable {what}: it is no valid YAML ({plain(error)}).") from error


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of values as JSON; it finds damage and careless edits, and is no signature."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON with a digest of it, atomically."""
    lines = [f"{json.dumps(key)}: {_line(value)}" for key, value in {**content, "digest": digest_of(content)}.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads what ``write_sealed`` wrote. Raises InputError if it is damaged."""
    remedy = "put it back from a copy, or move it away"
    try:
        content = parse_json(read_text(path, "result"), path, "result")
    except InputError as error:
        raise InputError(f"{str(error).removesuffix('.')}; {remedy}.") from error
    if not isinstance(content, dict) or content.pop("digest", None) != digest_of(content):
        raise InputError(
            f"{plain(path)} is damaged or was changed by hand: its content does not match its digest; {remedy}."
        )
    return content


def _line(value: Any) -> str:
    """JSON on a line, or a line for each of several blocks."""
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        return "[\n" + ",\n".join(json.dumps(entry) for entry in value) + "\n]"
    return json.dumps(value)


def _write_through(path: Path, write: Callable[[Path], object]) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    write(path)


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut; does nothing on systems that cannot sync folders."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
