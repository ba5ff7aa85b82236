"""Accuracies with counts and confidence intervals, and what an evaluation found."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from clat.evaluation.measured import Measured

TOLERATED = 0.005  # share of the images by which a weaker attack may seem the stronger one before it counts as a sign
CHANCE = 1.2  # an accuracy up to this many times that of guessing is chance level
Z95 = 1.959963984540054  # normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Accuracy:
    """Correct of n, with the 95 % Wilson score interval (``low``, ``high``)."""

    correct: int
    n: int

    @property
    def value(self) -> float:
        return self.correct / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        p, z2 = self.value, Z95**2
        centre = (p + z2 / (2 * self.n)) / (1 + z2 / self.n)
        half = Z95 / (1 + z2 / self.n) * math.sqrt(p * (1 - p) / self.n + z2 / (4 * self.n**2))
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.2f} % [{100 * low:.2f}, {100 * high:.2f}] ({self.correct}/{self.n})"

    def to_json(self) -> dict[str, Any]:
        low, high = self.interval
        return {"correct": self.correct, "n": self.n, "accuracy": self.value, "low": low, "high": high}


@dataclass(frozen=True)
class Balanced:
    """The mean over classes of the accuracy on each, whatever its number of images.

    The 95 % interval (``low``, ``high``) is that of a stratified mean. In its variance, each class has one more right
    and one more wrong image, so that a class whose images all have the same outcome does not count as certain.

    Args:
        correct, n: of each class that has images
    """

    correct: tuple[int, ...]
    n: tuple[int, ...]

    @classmethod
    def of(cls, right: Sequence[bool], labels: Sequence[int]) -> "Balanced":
        """From the outcome and the label of each image."""
        counts = Counter(labels)
        found = Counter(label for label, each in zip(labels, right, strict=True) if each)
        return cls(tuple(found[label] for label in sorted(counts)), tuple(counts[label] for label in sorted(counts)))

    @property
    def value(self) -> float:
        return sum(c / n for c, n in zip(self.correct, self.n, strict=True)) / len(self.n) if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        shares = [(c + 1) / (n + 2) for c, n in zip(self.correct, self.n, strict=True)]
        half = Z95 * math.sqrt(sum(p * (1 - p) / n for p, n in zip(shares, self.n, strict=True))) / len(self.n)
        return max(0.0, self.value - half), min(1.0, self.value + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.2f} % [{100 * low:.2f}, {100 * high:.2f}] ({len(self.n)} classes)"

    def to_json(self) -> dict[str, Any]:
        low, high = self.interval
        return {"accuracy": self.value, "low": low, "high": high, "classes": len(self.n)}


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """The result of one attack of an evaluation, run on the images that were correct until then."""

    name: str
    seed: int
    settings: dict[str, Any]
    note: str
    attacked: int
    broken: int
    robust: Accuracy  # after this attack and all before it
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of ``evaluate``, and all that is needed to reproduce it.

    ``outcomes`` has one number an image: -1 if it was misclassified clean, 0 if it withstood every attack, else the
    1-based number of the attack that broke it. ``from_record`` says what was not measured now but read from a record,
    in words.
    """

    clean: Accuracy
    robust: Accuracy
    balanced_clean: Balanced
    balanced_robust: Balanced
    attacks: tuple[AttackResult, ...]
    eps: float
    norm: str
    measured: Measured
    seconds: float
    outcomes: tuple[int, ...]
    from_record: str = field(default="", compare=False)

    @property
    def attack(self) -> str:
        """The attacks' names, e.g. "APGD-CE, APGD-T"; random starts of one attack count once."""
        return ", ".join(dict.fromkeys(attack.name.split(", start")[0] for attack in self.attacks))

    def to_json(self) -> dict[str, Any]:
        attacks = [{**asdict(attack), "robust": attack.robust.to_json()} for attack in self.attacks]
        names = ("clean", "robust", "balanced_clean", "balanced_robust")
        accuracies = {name: getattr(self, name).to_json() for name in names}
        return {**asdict(self), **accuracies, "attacks": attacks}


def worst_case(results: Sequence[Result]) -> Accuracy:
    """Accuracy over the images that withstood every attack of every evaluation; all are on the same images."""
    robust = [
        all(outcome == 0 for outcome in outcomes) for outcomes in zip(*(r.outcomes for r in results), strict=True)
    ]
    return Accuracy(sum(robust), len(robust))
