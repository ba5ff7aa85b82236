"""A check and its finding."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import exp, lgamma, log, log1p
from typing import Any, Literal, get_args

from clat.evaluation.trust.subject import Subject

Status = Literal["pass", "warn", "fail", "skipped"]
STATUSES: tuple[Status, ...] = get_args(Status)
Outcome = tuple[Status, str, dict[str, Any]]  # what was measured in a short sentence, and the figures behind it

LEVEL = 0.05  # of the exact binomial test that tells a count from its tolerance
FEWEST = 3  # images that a check fails on: one or two may be chance in any sample
POINTS = 0.2  # percentage points of the images that a count may be off by, after AutoAttack's check_square_sr
FORWARD = 1 / 3  # what a forward pass costs, of a forward-and-backward pass
OURS = "no published threshold; ours"


class Skip(Exception):
    """Raised by a check that can say nothing about this network; the message says why.

    Args:
        excused: the check cannot run on such images, so that a verdict does without it
    """

    def __init__(self, reason: str, *, excused: bool = False):
        super().__init__(reason)
        self.excused = excused


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question to a network and its evaluation.

    Args:
        id: a short name
        title: what a sound network does
        threshold: when it fails or warns, in words; the limits stand in it by their names, such as {points:g}
        source: where the threshold comes from
        flaw: what a failure means, a clause that goes after "because"
        run: asks the question; it is given the subject, and the limits by their names
        limits: the numbers of the threshold, by name
        passes: forward-and-backward passes it costs an image at most; a forward pass alone is a third of one
        needs: checks that must have run before
        invalid: a failure means that nothing was measured, rather than that robustness is overstated
    """

    id: str
    title: str
    threshold: str
    source: str
    flaw: str
    run: Callable[..., Outcome]
    passes: float
    limits: Mapping[str, float] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    invalid: bool = False

    @property
    def words(self) -> str:
        """The threshold with its limits."""
        return self.threshold.format(**self.limits) if self.limits else self.threshold

    def ask(self, subject: Subject) -> Outcome:
        """Asks the question. Raises Skip if it can say nothing about this network."""
        return self.run(subject, **self.limits)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of a check; ``evidence`` is for programs, the rest for people."""

    check: str
    measured: str
    threshold: str
    status: Status
    evidence: dict[str, Any]
    seconds: float


def grade(count: int, n: int, tolerance: float) -> Status:
    """Whether ``count`` of n images is too many where a share of ``tolerance`` is tolerated.

    None passes, as does any share up to the tolerance. Above it the exact one-sided binomial test decides: it fails if
    so many would turn up in fewer than one of 20 samples and they are 3 or more, and warns otherwise. A tolerance of
    0.2 points fails from 3 of 200 images on and from 6 of 1,000; one of 0.5 points from 4 and 10.
    """
    if count <= tolerance * n:
        return "pass"
    return "fail" if count >= FEWEST and improbable(count, n, tolerance) else "warn"


def improbable(count: int, n: int, share: float) -> bool:
    """Whether ``count`` or more of n are significantly more than a share, by the exact binomial test at 5 %."""
    every = lgamma(n + 1)
    fewer = sum(
        exp(every - lgamma(k + 1) - lgamma(n - k + 1) + k * log(share) + (n - k) * log1p(-share)) for k in range(count)
    )
    return 1 - fewer < LEVEL
