"""The record of an evaluation, from which an interrupted one continues."""

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clat.attacks import Attack
from clat.errors import InputError
from clat.evaluation.accuracy import Accuracy, AttackResult, Balanced, Result
from clat.evaluation.measured import Measured
from clat.files import digest_of, parse_json, read_text, write_text
from clat.text import plain

ADVICE = "remove it, or keep records in another folder (--out)"


@dataclass
class _State:
    """An evaluation in progress, as its record holds it."""

    record: Path | None
    measured: Measured
    ball: dict[str, Any]  # eps, norm
    attacks: list[dict[str, Any]]  # name, seed, settings, note
    labels: list[int]  # of the images
    outcomes: list[int]
    done: list[int]  # images, of each attack
    seconds: list[float]  # of each attack
    from_record: str = ""

    @classmethod
    def begin(
        cls, folder: Path | None, measured: Measured, attacks: Sequence[Attack], labels: Sequence[int]
    ) -> "_State":
        described = [{"name": a.name, "seed": a.seed, "settings": dict(a.settings), "note": a.note} for a in attacks]
        ball = {"eps": attacks[0].threat.radius, "norm": attacks[0].threat.norm}
        state = cls(None, measured, ball, described, list(labels), [], [0] * len(attacks), [0.0] * len(attacks))
        if folder is None or os.environ.get("RANK", "0") != "0":
            return state
        name = re.sub(r"[^\w.+-]+", "-", state.result().attack.lower().replace(", ", "-"))[:80]
        identity = hashlib.sha256(json.dumps(state.identity).encode()).hexdigest()[:12]
        state.record = Path(folder) / f"{name}-{identity}.json"
        if os.path.lexists(state.record):
            state._take_over(state.record)
        return state

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies the record: everything that determines the result."""
        return {"measured": self.measured.to_json(), **self.ball, "attacks": self.attacks}

    @property
    def finished(self) -> bool:
        return self.done[-1] == sum(outcome in (0, len(self.done)) for outcome in self.outcomes)

    def _take_over(self, record: Path) -> None:
        """Continues from a record. Raises InputError if it is damaged or belongs to another evaluation."""
        content = _content(record)
        read = content["state"]
        same = _json(self.identity) == read.get("identity")
        if not same or not _consistent(read, self.measured.images, len(self.attacks)):
            raise InputError(f"{plain(record)} is not a valid record of this evaluation; {ADVICE}.")
        self.outcomes, self.done, self.seconds = read["outcomes"], read["done"], read["seconds"]
        self.from_record = (
            f"read from the record {plain(record)}; nothing was attacked again"
            if self.finished
            else f"continued from the record {plain(record)}, with {sum(self.done):,} attacked images"
        )

    def write(self) -> None:
        if self.record is not None:
            state = {key: getattr(self, key) for key in ("identity", "labels", "outcomes", "done", "seconds")}
            content = {"state": state, "result": self.result().to_json()}
            write_text(self.record, json.dumps({**content, "digest": digest_of(content)}) + "\n")

    def result(self) -> Result:
        n = len(self.outcomes)
        labels = self.labels[:n]  # before the first pass there are no outcomes
        wrong = self.outcomes.count(-1)
        robust, attacks = n - wrong, []
        for number, described in enumerate(self.attacks, 1):
            broken = self.outcomes.count(number)
            robust -= broken
            attacks.append(
                AttackResult(
                    **described,
                    attacked=self.done[number - 1],
                    broken=broken,
                    robust=Accuracy(robust, n),
                    seconds=round(self.seconds[number - 1], 2),
                )
            )
        return Result(
            clean=Accuracy(n - wrong, n),
            robust=Accuracy(robust, n),
            balanced_clean=Balanced.of([outcome >= 0 for outcome in self.outcomes], labels),
            balanced_robust=Balanced.of([outcome == 0 for outcome in self.outcomes], labels),
            attacks=tuple(attacks),
            **self.ball,
            measured=self.measured,
            seconds=round(sum(self.seconds), 2),
            outcomes=tuple(self.outcomes),
            from_record=self.from_record,
        )


def read_record(path: Path) -> tuple[Result, bool]:
    """The result in a record, and whether its evaluation was finished.

    Raises:
        InputError: no record of an evaluation, or one that is damaged or impossible
    """
    content = _content(path)
    try:
        read, identity = content["state"], content["state"]["identity"]
        measured, attacks = Measured.from_json(identity["measured"]), identity["attacks"]
        state = _State(
            path, measured, {key: identity[key] for key in ("eps", "norm")}, attacks, read["labels"], [], [], []
        )
        valid = _json(state.identity) == identity and _consistent(read, measured.images, len(attacks))
        valid = valid and len(state.labels) == measured.images and all(type(label) is int for label in state.labels)
        words = (state.ball["norm"], *(attack["name"] for attack in attacks))
        if not valid or type(state.ball["eps"]) is not float or not all(isinstance(word, str) for word in words):
            raise ValueError
        state.outcomes, state.done, state.seconds = read["outcomes"], read["done"], read["seconds"]
        return state.result(), state.finished
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{plain(path)} is not a valid record of an evaluation; {ADVICE}.") from error


def _content(record: Path) -> dict[str, Any]:
    """What a record holds, without its digest. Raises InputError if it is none, or was changed."""
    try:
        content = parse_json(read_text(record), record)
    except InputError as error:
        raise InputError(f"{plain(record)} is not the record of an evaluation; {ADVICE}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("state"), dict) or "digest" not in content:
        raise InputError(f"{plain(record)} is not the record of an evaluation; {ADVICE}.")
    if content.pop("digest") != digest_of(content):
        raise InputError(f"{plain(record)} was changed after clat wrote it: its digest does not match; {ADVICE}.")
    return content


def _json(value: Any) -> Any:
    """The value as it comes back from JSON."""
    return json.loads(json.dumps(value))


def _consistent(read: dict[str, Any], n: int, attacks: int) -> bool:
    """Whether the content of a record fits n images and this number of attacks."""
    lists: list[list[Any]] = [read.get(key) or [] for key in ("outcomes", "done", "seconds")]
    if not all(isinstance(value, list) for value in lists):
        return False
    outcomes, done, seconds = lists
    if len(outcomes) != n or len(done) != attacks or len(seconds) != attacks:
        return False
    if any(type(value) is not int for value in (*outcomes, *done)):
        return False
    if any(not -1 <= outcome <= attacks for outcome in outcomes):
        return False
    if any(type(value) not in (int, float) or not 0 <= value < math.inf for value in seconds):
        return False
    before_is_done = True
    for number, count in enumerate(done, 1):
        todo = [outcome for outcome in outcomes if outcome == 0 or outcome >= number]
        if not 0 <= count <= len(todo) or (count and not before_is_done) or number in todo[count:]:
            return False
        before_is_done = before_is_done and count == len(todo)
    return True
