"""Checks that the attack is as strong as it could be, and of the loss surface and the arithmetic."""

from itertools import pairwise

import torch

from clat.attacks import restarts
from clat.compute import autocast, native_precision
from clat.evaluation.accuracy import Accuracy
from clat.evaluation.trust.check import FORWARD, OURS, POINTS, Check, Outcome, Skip, Status, grade, improbable
from clat.evaluation.trust.subject import STEPS, Subject, cross_entropy

STARTS = 5
DIRECTIONS = 20
CONVERGED = 0.5  # percentage points of the images that a stronger attack may still break


def large_eps(s: Subject, *, points: float) -> Outcome:
    whole = 1.0 if s.threat.norm == "linf" else float(s.x[0].numel()) ** 0.5
    half, none = (int((s.right & ~s.pgd(radius).fooled).sum()) for radius in (whole / 2, whole))
    chance = 1 / s.scores.shape[1]
    text = f"{half} of {s.n} images withstand PGD at eps {whole / 2:.3g}, {none} at {whole:.3g}"
    evidence = {"half": half, "unbounded": none, "n": s.n, "chance": chance}
    if improbable(half, s.n, chance):
        return "fail", text, evidence
    return grade(none, s.n, points / 100), text, evidence


LARGE_EPS = Check(
    id="large-eps",
    title="no accuracy is left in a ball as large as the box",
    threshold="fail if significantly above chance at linf 0.5 (or half the diagonal), or above {points:g} points at 1",
    source="C19 (chance, 0 %); IoAF, indicator 6; the tolerance after AA, check_square_sr",
    flaw="an attack without a bound does not succeed",
    run=large_eps,
    passes=2 * (STEPS + 1),
    limits={"points": POINTS},
    needs=("attack",),
)


def more_steps(s: Subject, *, points: float) -> Outcome:
    s.pgd()
    left = s.standing
    more = int((s.pgd(steps=2 * STEPS).fooled & left).sum())
    text = f"{2 * STEPS} steps break {more} of the {int(left.sum())} images left standing by {STEPS}"
    return grade(more, s.n, points / 100), text, {"more": more, "standing": int(left.sum()), "n": s.n}


MORE_STEPS = Check(
    id="steps",
    title="twice the steps break no more",
    threshold=f"fail if {2 * STEPS} steps break significantly more than {{points:g}} points over {STEPS}, warn "
    "above {points:g}",
    source="C19 (none); the tolerance is ours",
    flaw="the attack has not converged: twice the steps break more",
    run=more_steps,
    passes=2 * STEPS + 1,
    limits={"points": CONVERGED},
    needs=("attack",),
)


def optimised(s: Subject, *, images: float, rise: float, last: int) -> Outcome:
    found = s.pgd(steps=2 * STEPS)
    curve = found.curve[:, s.right & ~found.fooled].cummax(0).values
    if not curve.shape[1]:
        raise Skip("the attack leaves no image standing")
    span = (curve[-1] - curve[0]).clamp_min(1e-12)
    rising = (curve[-1] - curve[-1 - last]) / span > rise / 100
    share = float(rising.float().mean())
    text = f"the loss of {int(rising.sum())} of {len(rising)} standing images still rises in the last {last} steps"
    return "warn" if share > images / 100 else "pass", text, {"rising": int(rising.sum()), "standing": len(rising)}


OPTIMISED = Check(
    id="optimised",
    title="the loss no longer rises when the attack ends",
    threshold="warn if, for over {images:g} % of the standing images, over {rise:g} % of the rise falls in the "
    "last {last} steps",
    source="IoAF, indicator 4 (5 % of an image's loss); the share of the images is ours",
    flaw="the loss still rises when the attack ends",
    run=optimised,
    passes=0,
    limits={"images": 10, "rise": 5, "last": 10},
    needs=("steps",),
)


def monotone(s: Subject, *, points: float) -> Outcome:
    radius = s.threat.radius
    largest = 1.0 if s.threat.norm == "linf" else float("inf")
    radii = [radius / 4, radius / 2, radius, min(2 * radius, largest)]
    correct = [int((s.right & ~s.pgd(each).fooled).sum()) for each in radii]
    rise = max(0, *(b - a for a, b in pairwise(correct)))
    text = "correct at eps/4, eps/2, eps, 2 eps: " + ", ".join(map(str, correct))
    return grade(rise, s.n, points / 100), text, {"eps": radii, "correct": correct, "n": s.n}


MONOTONE = Check(
    id="monotone",
    title="robust accuracy falls as eps grows",
    threshold="fail if it rises by significantly more than {points:g} points, warn above",
    source="C19 (any); the tolerance after AA, check_square_sr",
    flaw="robust accuracy rises with eps",
    run=monotone,
    passes=3 * (STEPS + 1),
    limits={"points": POINTS},
    needs=("attack",),
)


def more_starts(s: Subject, *, points: float) -> Outcome:
    late, starts = 0, restarts(s.threat, 2 * STARTS, s.seed)
    for number, attack in enumerate(starts[1:], 2):
        broken = s.attack(attack, s.standing, white_box=True)
        late += int(broken.sum()) if number > STARTS else 0
    text = f"starts {STARTS + 1} to {2 * STARTS} break {late} images that no gradient attack before broke"
    return grade(late, s.n, points / 100), text, {"more": late, "standing": int(s.standing.sum()), "n": s.n}


MORE_STARTS = Check(
    id="restarts",
    title="twice the random starts break no more",
    threshold=f"fail if starts {STARTS + 1} to {2 * STARTS} break significantly over {{points:g}} points, warn above "
    "{points:g}",
    source="C19 (none, of 10 and 20 starts); the tolerance is ours",
    flaw="the attack has not converged: more random starts break more",
    run=more_starts,
    passes=(2 * STARTS - 1) * (STEPS + 1),
    limits={"points": CONVERGED},
    needs=("attack",),
)


def landscape(s: Subject, *, percent: float) -> Outcome:
    x, y, scores = s.x[s.right], s.y[s.right], s.scores[s.right]
    here = cross_entropy(scores, y)
    changes = []
    for _ in range(DIRECTIONS):
        there = cross_entropy(s.score(s.threat.project(x + (s.threat.first(x) - x) / 2, x)), y)
        changes.append(((there - here).abs() / here.clamp_min(1e-12)).clamp_max(1))
    change = float(torch.stack(changes).mean())
    text = f"the loss changes by {100 * change:.0f} % on average in random directions of eps/2"
    return "warn" if change > percent / 100 else "pass", text, {"relative_change": change}


LANDSCAPE = Check(
    id="landscape",
    title="the loss is smooth around the images",
    threshold=f"warn if it changes by over {{percent:g}} % on average in {DIRECTIONS} directions of eps/2",
    source="IoAF, indicator 2, which reports the value; the threshold is ours",
    flaw="the loss surface is rough",
    run=landscape,
    passes=DIRECTIONS * FORWARD,
    limits={"percent": 10},
    needs=("attack",),
)


def precision(s: Subject) -> Outcome:
    if native_precision(s.x.device) == "fp32":
        raise Skip("the device does not compute in bf16")
    images = s.pgd().images
    full = Accuracy(int((s.predict(images) == s.y).sum()), s.n)
    with autocast(s.x.device, "bf16"):
        half = Accuracy(int((s.predict(images) == s.y).sum()), s.n)
    low, high = full.interval
    text = f"attacked images: {full.correct} of {s.n} right in fp32, {half.correct} in bf16"
    status: Status = "pass" if low <= half.value <= high else "warn"
    return status, text, {"fp32": full.to_json(), "bf16": half.to_json()}


PRECISION = Check(
    id="precision",
    title="bf16 predicts attacked images as fp32 does",
    threshold="warn if the accuracy in bf16 leaves the 95 % interval of that in fp32",
    source=f"AutoAttack issue 51; {OURS}",
    flaw="robust accuracy depends on the arithmetic",
    run=precision,
    passes=2 * FORWARD,
    needs=("attack",),
)
