"""The record of a verdict, which a report shows."""

from pathlib import Path
from typing import Any

from clat.errors import InputError
from clat.evaluation.accuracy import Accuracy
from clat.evaluation.measured import Measured
from clat.evaluation.trust import Verdict
from clat.evaluation.trust.check import STATUSES, Finding
from clat.files import digest_of, read_sealed, write_sealed
from clat.text import plain


def write_verdict(folder: Path, verdict: Verdict) -> Path:
    """Writes a verdict into the folder; it replaces one that was measured in the same way."""
    identity = {"measured": verdict.measured.to_json(), "eps": verdict.eps, "norm": verdict.norm}
    path = folder / f"trust-{digest_of(identity)[:12]}.json"
    write_sealed(path, {"verdict": verdict.to_json()})
    return path


def read_verdict(path: Path) -> Verdict:
    """Reads what ``write_verdict`` wrote. Raises InputError if it is damaged or something else."""
    content = read_sealed(path)
    try:
        said = dict(content["verdict"])
        findings = tuple(Finding(**finding) for finding in said.pop("findings"))
        clean, robust, measured = (said.pop(key) for key in ("clean", "robust", "measured"))
        _check(said, findings)
        return Verdict(
            **said,
            findings=findings,
            clean=_accuracy(clean),
            robust=_accuracy(robust) if robust else None,
            measured=Measured.from_json(measured),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{plain(path)} is not the record of a verdict; remove it, and give clat trust again."
        ) from error


def _check(said: dict[str, Any], findings: tuple[Finding, ...]) -> None:
    """Raises ValueError for a value of another kind."""
    words = [said["text"], said["norm"], *(word for each in findings for word in (each.check, each.measured))]
    numbers = [said["eps"], said["budget"], said["seconds"], *(each.seconds for each in findings)]
    if not all(isinstance(word, str) for word in words) or not all(type(n) in (int, float) for n in numbers):
        raise ValueError("words and numbers are of another type")
    if type(said["ok"]) is not bool or any(each.status not in STATUSES for each in findings):
        raise ValueError("no verdict, or no status of a check")


def _accuracy(said: dict[str, Any]) -> Accuracy:
    found = Accuracy(said["correct"], said["n"])
    if type(found.correct) is not int or type(found.n) is not int or not 0 <= found.correct <= found.n or not found.n:
        raise ValueError("no accuracy")
    return found
