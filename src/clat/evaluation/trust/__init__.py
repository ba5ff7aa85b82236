"""Whether a robust accuracy can be trusted: checks for gradient masking and for a broken evaluation."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from clat.compute import placed, seeded
from clat.data.arrays import as_dataset
from clat.data.dataset import to_unit
from clat.errors import InputError
from clat.evaluation.accuracy import Accuracy
from clat.evaluation.fits import check_fits
from clat.evaluation.measured import Measured
from clat.evaluation.trust.battery import CHECKS, NEEDED
from clat.evaluation.trust.check import STATUSES, Check, Finding, Outcome, Skip
from clat.evaluation.trust.subject import BATCH, Subject
from clat.inputs import check_least
from clat.layer_names import named_layers
from clat.layers import trace
from clat.threat import Lp

IMAGES = 200
BUDGET = 10.0  # minutes
REFERENCE = "attack"  # the check whose attack others are compared with


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict of all checks together.

    text: in words; ok: no check failed, and those that it needs ran (``NEEDED``); clean: accuracy without attack;
    robust: accuracy in the worst case over all attacks in the ball, None if there was none; budget: minutes; seconds:
    all of it.
    """

    text: str
    ok: bool
    findings: tuple[Finding, ...]
    clean: Accuracy
    robust: Accuracy | None
    eps: float
    norm: str
    budget: float
    measured: Measured
    seconds: float

    def to_json(self) -> dict[str, Any]:
        robust = self.robust and self.robust.to_json()
        return {**asdict(self), "clean": self.clean.to_json(), "robust": robust}


def trust(
    model: nn.Module,
    data: Any,
    eps: float | str = "8/255",
    norm: Lp = "linf",
    *,
    base: nn.Module | None = None,
    layers: Sequence[str] = (),
    limit: int | None = IMAGES,
    budget: float = BUDGET,
    seed: int = 0,
    batch_size: int = BATCH,
    device: torch.device | str | None = None,
    checks: Sequence[Check] = CHECKS,
    progress: Callable[[Check], None] = lambda _: None,
) -> Verdict:
    """Looks for signs that robustness in a ball is overstated, or that its evaluation is broken.

    A network that is merely not robust passes. So may one that masks its gradients in a way that no check looks for:
    the list is neither necessary nor sufficient (Carlini et al. 2019), and the verdict never says more than that
    nothing was found.

    Args:
        model: takes pixels in [0, 1], returns class scores (batch, classes)
        data: a ``Dataset``, or anything that ``as_dataset`` takes
        eps, norm: the ball
        base: a surrogate for transfer attacks, such as the network before fine-tuning
        layers: dotted names of those that CLAT selected, for the attack through them; default the most critical 5 %
        limit: use this many images, drawn at random by ``seed``; None is all
        budget: minutes; a check that is estimated not to fit in what is left is skipped, and the verdict says so
        batch_size: images that run together
        device: where the networks are moved for the call, and then back; default where ``model`` is
        checks: those to run, in this order
        progress: is told before each check
    Raises:
        InputError: data that does not fit the network, class scores that are not finite, or a budget that is too
            short for the attack that the other checks are compared with
    """
    data = as_dataset(data)
    began = time.perf_counter()
    check_least(1, batch_size=batch_size)
    check_least(0.0, budget=budget)
    data = data.sample(limit, seed)
    networks = [model] if base is None else [model, base]
    with placed(networks, device) as place:
        for network in networks:
            check_fits(network, data, place, warn=False)  # a check of its own finds probabilities
        measured = Measured.of(networks, data, seed=seed, batch_size=batch_size, device=place)
        pixels, y = next(data.to(place).batches(len(data), workers=0))
        x = to_unit(pixels)
        through = list(named_layers(model, x, layers)) if layers else []
        trace(model, x[:1])  # there is a layer for the attack through layers
        with seeded(seed, place):
            subject = Subject(
                model,
                x,
                y,
                data.statistics(),
                eps,
                norm,
                base=base,
                layers=through,
                seed=seed,
                batch_size=batch_size,
            )
            findings = _run(subject, checks, began + 60 * budget, progress)
    text, ok = _verdict(findings, checks)
    attacked = any(finding.check == REFERENCE and finding.status != "skipped" for finding in findings)
    return Verdict(
        text=text,
        ok=ok,
        findings=findings,
        clean=Accuracy(int(subject.right.sum()), subject.n),
        robust=Accuracy(int((subject.right & ~subject.broken).sum()), subject.n) if attacked else None,
        eps=subject.threat.radius,
        norm=norm,
        budget=budget,
        measured=measured,
        seconds=round(time.perf_counter() - began, 2),
    )


def _run(s: Subject, checks: Sequence[Check], end: float, progress: Callable[[Check], None]) -> tuple[Finding, ...]:
    ids = [check.id for check in checks]
    first = checks[: ids.index(REFERENCE) + 1] if REFERENCE in ids else ()
    needed, left = sum(check.passes for check in first) * s.n * s.pass_seconds, end - time.perf_counter()
    if needed > left:
        raise InputError(
            f"All checks up to the first attack need {needed / 60:.1f} min here, and {max(left, 0) / 60:.1f} min of "
            "the budget are left; raise budget or lower limit."
        )
    findings: list[Finding] = []
    for check in checks:
        progress(check)
        start = time.perf_counter()
        status, measured, evidence = _ask(check, s, end - start, findings)
        findings.append(
            Finding(
                check=check.id,
                measured=measured,
                threshold=f"{check.words} ({check.source})",
                status=status,
                evidence=evidence,
                seconds=round(time.perf_counter() - start, 2),
            )
        )
    return tuple(findings)


def _ask(check: Check, s: Subject, left: float, findings: Sequence[Finding]) -> Outcome:
    """Runs a check, unless one that it needs has not run or too little time is left."""
    ran = {finding.check for finding in findings if finding.status != "skipped"}
    missing = [need for need in check.needs if need not in ran]
    if missing:
        return "skipped", f"needs {', '.join(missing)}, which did not run", {}
    needed = check.passes * s.n * s.pass_seconds
    if needed > left:
        return "skipped", f"needs {needed / 60:.1f} min, {max(left, 0) / 60:.1f} min left", {}
    try:
        return check.ask(s)
    except Skip as reason:
        return "skipped", str(reason), {"excused": reason.excused}
    except InputError as error:  # attacked images can make scores that are not finite
        return "fail", str(error), {}


def _verdict(findings: Sequence[Finding], checks: Sequence[Check]) -> tuple[str, bool]:
    """The findings in words, and whether no check failed and all that a verdict needs ran."""
    named = {status: [finding.check for finding in findings if finding.status == status] for status in STATUSES}
    failed = [check for check in checks if check.id in named["fail"]]
    ran = {finding.check for finding in findings if finding.status != "skipped" or finding.evidence.get("excused")}
    missing = [check for check in NEEDED if check not in ran]
    parts = []
    for invalid, opening in ((True, "the evaluation is not valid"), (False, "robustness is overstated")):
        flaws = [f"{check.flaw} ({check.id})" for check in failed if check.invalid == invalid]
        if flaws:
            parts.append(f"{opening}, because {'; '.join(flaws)}")
    skipped = len(named["skipped"])
    if not failed and missing:
        parts = [f"not enough was checked: {', '.join(missing)} skipped; raise the budget or lower the limit"]
    elif not failed:
        parts = [f"no sign of masking found by {len(findings) - skipped} checks ({skipped} skipped)"]
    if named["warn"]:
        parts.append(f"look at {', '.join(named['warn'])}")
    text = ". ".join(part[0].upper() + part[1:] if number else part for number, part in enumerate(parts))
    return text, not failed and not missing
