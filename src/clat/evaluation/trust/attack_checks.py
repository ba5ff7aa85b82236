"""Checks of the attack itself, and attacks that should break nothing which gradient attacks left standing."""

from collections.abc import Callable

import torch
from torch import nn

from clat.attacks import Attack, apgd_ce, apgd_targeted, square, square_takes, through_layers
from clat.criticality import layer_criticality
from clat.evaluation.trust.check import FORWARD, OURS, POINTS, Check, Outcome, Skip, grade, improbable
from clat.evaluation.trust.subject import STEPS, Subject
from clat.network import Images, Labels, NoGradientError, logits
from clat.threat import Threat, attack_output
from clat.tuners.order import top

DRAWS = 100  # of noise
TARGETS = 3
QUERIES = 500


def attack_valid(s: Subject, *, outside: float, points: float) -> Outcome:
    if not s.right.any():
        raise Skip("no image is classified correctly")
    if s.draws:
        raise Skip("the network draws random numbers, so that no two attacks on an image compare")
    if isinstance(s.gradients, str):
        raise Skip("the network has no backward pass")
    if not all(torch.isfinite(gradient).all() for gradient in s.gradients.values()):
        raise Skip("gradients are not finite")
    found = s.pgd()
    distance = float(s.threat.distance(found.images, s.x).max())
    low, high = (value.item() for value in torch.aminmax(found.images))
    fooled = found.fooled & s.right
    again = int((fooled & (s.predict(found.images) != s.y)).sum())
    lost = int(fooled.sum()) - again
    evidence = {"distance": distance, "low": low, "high": high, "broken": int(fooled.sum()), "broken_again": again}
    text = f"moves by at most {distance:.4g}; breaks {int(fooled.sum())} images, {again} of them on a fresh pass"
    if distance > s.threat.radius * (1 + 1e-5) + outside or low < 0 or high > 1:
        return "fail", text, evidence
    return grade(lost, s.n, points / 100), text, evidence


ATTACK = Check(
    id="attack",
    title="attacked images are in ball and box and fool the network again",
    threshold="fail if one leaves the ball by {outside:g}, or significantly more than {points:g} points do not "
    "fool it again",
    source="AA and RobustBench issue 7; the tolerance after AA, check_square_sr",
    flaw="the attacked images are not valid or do not fool the network again",
    run=attack_valid,
    passes=STEPS + 1 + FORWARD,
    limits={"outside": 1e-6, "points": POINTS},
    needs=("gradients",),
    invalid=True,
)


def loss_gap(s: Subject, *, warns: float, fails: float) -> Outcome:
    classes, radius, norm = s.scores.shape[1], s.threat.radius, s.threat.norm
    s.attack(apgd_ce(radius, norm, steps=STEPS, seed=s.seed), s.standing, white_box=True)
    left = int(s.standing.sum())
    targeted = apgd_targeted(radius, classes, norm, steps=STEPS, targets=TARGETS, seed=s.seed)
    more = int(s.attack(targeted, s.standing, white_box=True).sum())
    evidence = {"after_cross_entropy": left, "broken_by_margin_only": more, "n": s.n, "note": targeted.note}
    text = f"targeted APGD breaks {more} of the {left} images that PGD and APGD-CE left ({100 * more / s.n:.1f} points)"
    if improbable(more, s.n, fails / 100):
        return "fail", text, evidence
    return "warn" if more > warns / 100 * s.n else "pass", text, evidence


LOSS_GAP = Check(
    id="loss-gap",
    title="the cross-entropy attacks as well as the margin",
    threshold="warn if APGD-T breaks over {warns:g} points beyond PGD and APGD-CE, fail if significantly over "
    "{fails:g}",
    source=f"the rationale of AA; {OURS}",
    flaw="the cross-entropy misleads attacks: those on the margin break far more",
    run=loss_gap,
    passes=(1 + TARGETS) * (STEPS + 1),
    limits={"warns": 6, "fails": 10},
    needs=("attack",),
)


def one_step(s: Subject) -> Threat:
    """The ball, crossed in one step."""
    return Threat(eps=s.threat.radius, step=s.threat.radius, steps=1, norm=s.threat.norm, start="zero")


def fgsm(s: Subject) -> Attack:
    threat = one_step(s)

    def perturb(model: nn.Module, x: Images, y: Labels) -> Images:
        return attack_output(model, x, y, threat)

    return Attack(name="FGSM", perturb=perturb, threat=threat, passes=1)


def overfitting(s: Subject, *, warns: float, left: float) -> Outcome:
    single, pgd_broken = s.attack(fgsm(s), s.right, white_box=False), s.pgd().fooled & s.right
    clean, after_one, after_many = (int(mask.sum()) for mask in (s.right, s.right & ~single, s.right & ~pgd_broken))
    evidence = {"clean": clean, "after_fgsm": after_one, "after_pgd": after_many, "n": s.n}
    text = f"of {clean} right images FGSM leaves {after_one}, PGD-{STEPS} {after_many}"
    if after_one - after_many <= warns / 100 * s.n:
        return "pass", text, evidence
    return "fail" if after_one > left / 100 * clean else "warn", text, evidence


OVERFITTING = Check(
    id="catastrophic-overfitting",
    title="PGD breaks little more than a single step",
    threshold="warn if PGD breaks over {warns:g} points more than FGSM; fail if FGSM also leaves over {left:g} % of "
    "the images",
    source="FA (a drop of 20 points); the share left is ours",
    flaw="the network withstands a single step but not iterations, so that FGSM overstates its robustness",
    run=overfitting,
    passes=1 + FORWARD,
    limits={"warns": 20, "left": 50},
    needs=("attack",),
)


def beaten_by(make: Callable[[Subject], Attack]) -> Callable[[Subject], Outcome]:
    """The check that an attack breaks no image that the gradient attacks so far have left standing."""

    def run(s: Subject, *, points: float = POINTS) -> Outcome:
        attack, left = make(s), s.standing
        broken = int(s.attack(attack, left, white_box=False).sum())
        evidence = {"standing": int(left.sum()), "broken": broken, "n": s.n, "settings": dict(attack.settings)}
        text = f"{attack.name} breaks {broken} of {int(left.sum())} images that white-box attacks left standing"
        return grade(broken, s.n, points / 100), text, evidence

    return run


ITERATIVE = Check(
    id="iterative",
    title="a single step breaks nothing that iterations do not",
    threshold="fail if significantly more than {points:g} points, warn above",
    source="C19 (any); the tolerance after AA, check_square_sr",
    flaw="a single step breaks what iterative attacks do not",
    run=beaten_by(fgsm),
    passes=1 + FORWARD,
    limits={"points": POINTS},
    needs=("loss-gap",),
)


def noise(s: Subject) -> Attack:
    def perturb(model: nn.Module, x: Images, y: Labels) -> Images:
        found = x.clone()
        with torch.no_grad():
            for _ in range(DRAWS):
                drawn = s.threat.first(x)
                wrong = logits(model(drawn)).argmax(1) != y
                found[wrong] = drawn[wrong]
        return found

    settings = {"draws": DRAWS}
    return Attack(
        name="noise", perturb=perturb, threat=s.threat, passes=DRAWS * FORWARD, seed=s.seed, settings=settings
    )


NOISE = Check(
    id="noise",
    title="noise breaks nothing that gradients do not",
    threshold=f"fail if {DRAWS} draws break significantly more than {{points:g}} points, warn above",
    source="C19 (any, and 10,000 draws); the tolerance after AA, check_square_sr",
    flaw="random noise breaks what gradient attacks do not",
    run=beaten_by(noise),
    passes=DRAWS * FORWARD,
    limits={"points": POINTS},
    needs=("loss-gap",),
)


def few_queries(s: Subject) -> Attack:
    if not square_takes(s.x.shape[2], s.threat.norm):
        raise Skip(f"pyautoattack's l2 Square does not take images of {s.x.shape[2]} pixels", excused=True)
    return square(s.threat.radius, s.threat.norm, queries=QUERIES, seed=s.seed)


SQUARE = Check(
    id="square",
    title="an attack without gradients breaks nothing that gradients do not",
    threshold=f"fail if {QUERIES} queries break significantly more than {{points:g}} points, warn above",
    source="AA, check_square_sr; C19",
    flaw="an attack without gradients (Square) breaks what gradient attacks do not",
    run=beaten_by(few_queries),
    passes=QUERIES * FORWARD,
    limits={"points": POINTS},
    needs=("loss-gap",),
)


def transfer(s: Subject) -> Attack:
    base = s.base
    if base is None:
        raise Skip("no surrogate network was given")

    def perturb(_: nn.Module, x: Images, y: Labels) -> Images:
        try:
            return attack_output(base, x, y, s.threat, keep="best")
        except NoGradientError as error:
            raise Skip("the surrogate network has no gradient to the pixels") from error

    return Attack(name="transferred PGD", perturb=perturb, threat=s.threat, passes=STEPS + 1, seed=s.seed)


TRANSFER = Check(
    id="transfer",
    title="images attacked on a surrogate break nothing that gradients do not",
    threshold="fail if significantly more than {points:g} points, warn above",
    source="C19 (any); the tolerance after AA, check_square_sr",
    flaw="attacks on another network break what attacks on this one do not",
    run=beaten_by(transfer),
    passes=STEPS + 1 + FORWARD,
    limits={"points": POINTS},
    needs=("loss-gap",),
)


def adaptive(s: Subject) -> Attack:
    """Through the layers that were named, or else the 5 % that are most critical under the attack."""
    layers = s.layers or top(layer_criticality(s.model, s.x[: s.batch_size], s.pgd().images[: s.batch_size]), 0.05)
    return through_layers(layers, s.threat.radius, s.threat.norm, steps=STEPS, seed=s.seed)


ADAPTIVE = Check(
    id="adaptive",
    title="an attack through the critical layers breaks nothing that attacks on the output do not",
    threshold="fail if significantly more than {points:g} points, warn above",
    source="the advice of Tramer et al. 2020 (arXiv 2002.08347); the tolerance after AA, check_square_sr",
    flaw="attacks through the layers that training made steady break what attacks on the output do not",
    run=beaten_by(adaptive),
    passes=3 * (STEPS + 1),
    limits={"points": POINTS},
    needs=("loss-gap",),
)
