"""What each check of ``clat trust`` does; ``battery`` says when it fails and why."""

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clat.attacks import Attack, apgd_ce, apgd_targeted, pgd_attack, restarts, square, square_takes, through_layers
from clat.compute import autocast, native_precision
from clat.criticality import layer_criticality, top
from clat.evaluation.accuracy import Accuracy
from clat.evaluation.trust.check import Outcome, Skip, Status, grade, improbable
from clat.evaluation.trust.subject import FORWARDS, STEPS, Subject, cross_entropy
from clat.network import Images, Labels, class_scores, first_tensor, held, logits, same_bits
from clat.threat import NoGradientError, Threat, ascend
from clat.training.health import CHANCE

DRAWS = 100  # of noise
TARGETS = 3
QUERIES = 500
STARTS = 5
DIRECTIONS = 20
NEIGHBOURS = 4  # of each image, that a network sees before it is asked
COLOUR_STATISTICS = {
    "mean and std of ImageNet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "mean and std of CIFAR-10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
}
SQUARE_TOLERANCE = 0.002  # AA's
CONVERGED = 0.005
FORWARD = 1 / 3  # of a forward-and-backward pass


# The network as it is given


def clean_accuracy(s: Subject) -> Outcome:
    accuracy = Accuracy(int(s.right.sum()), s.n)
    chance = 1 / s.scores.shape[1]
    status: Status = "fail" if accuracy.value <= CHANCE * chance else "pass"
    return status, f"{accuracy} clean; chance is {100 * chance:.0f} %", {**accuracy.to_json(), "chance": chance}


def normalisation(s: Subject) -> Outcome:
    """Compares the accuracy with that after each usual normalisation, done or undone outside the network."""
    channels = s.x.shape[1]
    known = {"mean and std of the data": s.statistics, "range [-1, 1]": ([0.5] * channels, [0.5] * channels)}
    if channels == 3:
        known |= COLOUR_STATISTICS
    inputs: dict[str, Tensor] = {}
    for name, statistics in known.items():
        mean, std = (s.x.new_tensor(values).view(-1, 1, 1) for values in statistics)
        inputs[f"normalised to {name}; if so, do that in the network"] = (s.x - mean) / std
        inputs[f"whose normalisation to {name} is undone: the network seems to normalise twice"] = s.x * std + mean
    inputs["normalised to range [0, 255]; if so, do that in the network"] = 255 * s.x
    gains = {}
    for name, x in inputs.items():
        right = s.score(x).argmax(1) == s.y
        gains[name] = int((right & ~s.right).sum()), int((s.right & ~right).sum())
    best = max(gains, key=lambda name: gains[name][0] - gains[name][1])
    gained, lost = gains[best]
    gain, evidence = gained - lost, {"gained_and_lost": gains}
    if gain > 0.05 * s.n and improbable(gained, gained + lost, 0.5):
        text = f"{gain} of {s.n} images more are right with inputs {best}"
        return "fail" if gain > 0.15 * s.n else "warn", text, evidence
    return "pass", f"no usual normalisation, done or undone, gains over {max(gain, 0)} of {s.n} images", evidence


def mode(s: Subject) -> Outcome:
    with held(s.model), torch.no_grad():
        training = {_titled(name, module): module for name, module in s.model.named_modules() if module.training}
        before = {name: buffer.clone() for name, buffer in s.model.named_buffers()}
        s.model(s.x[: s.batch_size])
        moved = [name for name, buffer in s.model.named_buffers() if not same_bits(buffer, before[name])]
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    active = [name for name, module in training.items() if isinstance(module, kinds)]
    evidence = {"training": list(training), "moved_buffers": moved}
    if moved or active:
        return "fail", f"in train mode after eval(): {_listed(active)}; buffers that change: {_listed(moved)}", evidence
    if training:
        return "warn", f"in train mode after eval(): {_listed(list(training))}", evidence
    return "pass", f"all modules in eval mode, {len(before)} buffers unmoved", evidence


def _titled(name: str, module: nn.Module) -> str:
    return f"{name or 'the network'} ({type(module).__name__})"


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "none"


def deterministic(s: Subject) -> Outcome:
    correct = [int((run.argmax(1) == s.y).sum()) for run in s.runs]
    evidence = {"correct": correct, "distance": s.spread}
    if not s.draws:
        return "pass", f"scores of {FORWARDS} runs differ by at most {s.spread:.0e}", evidence
    evidence["module"] = module = random_module(s)
    text = f"scores of {FORWARDS} runs differ by up to {s.spread:.1g}; random numbers enter in {module}"
    return "fail", text, evidence


def random_module(s: Subject) -> str:
    """The first module to return something else for the same input, by dotted name and type."""

    def run() -> list[tuple[str, Tensor, Tensor]]:
        calls: list[tuple[str, Tensor, Tensor]] = []

        def hook(name: str) -> Callable[..., None]:
            def keep(module: nn.Module, inputs: Any, output: Any) -> None:
                if inputs:
                    calls.append((_titled(name, module), first_tensor(inputs[0]).clone(), first_tensor(output).clone()))

            return keep

        handles = [module.register_forward_hook(hook(name)) for name, module in s.model.named_modules()]
        try:
            with held(s.model), torch.no_grad():
                s.model(s.x[:8])
        finally:
            for handle in handles:
                handle.remove()
        return calls

    for _ in range(FORWARDS):
        for (name, x, output), (_, again_x, again) in zip(run(), run(), strict=False):
            if same_bits(x, again_x) and not same_bits(output, again):
                return name
    return "the network"


def alone(s: Subject) -> Outcome:
    few = min(8, s.n // 2)
    if not few:
        raise Skip("there is one image only")
    if s.draws:
        raise Skip("the network draws random numbers")
    apart = nn.functional.normalize(s.score(s.x[:few])) - nn.functional.normalize(s.scores[:few])
    distance = float(apart.norm(dim=1).max())
    text = f"scores of {few} images by themselves and in a batch of {min(s.batch_size, s.n)} differ by {distance:.0e}"
    return "fail" if distance > 0.01 else "pass", text, {"distance": distance}


def state(s: Subject) -> Outcome:
    """Compares an image's scores in a network that saw its neighbours before with those in a copy that did not.

    The images are mirrored, so that the network has not seen them. Their neighbours are drawn in the ball, a quarter of
    them at each of four distances. The copies share what copying does not reach, such as a list that a function holds:
    a network that answers from there gives an image and its neighbour the very same scores.
    """
    if s.draws:
        raise Skip("the network draws random numbers")
    x = s.x[: s.batch_size].flip(-1)
    scale = 0.5 ** (torch.arange(len(x), device=x.device) % 4).to(x.dtype)

    def neighbour() -> Images:
        return x + (s.threat.first(x) - x) * scale.view(-1, 1, 1, 1)

    asked = neighbour()
    alone = class_scores(_copied(s.model), asked)
    used = _copied(s.model)
    seen = [class_scores(used, images) for images in (x, *(neighbour() for _ in range(NEIGHBOURS)))]
    after = class_scores(used, asked.flip(0)).flip(0)
    changed = int(((F.normalize(after) - F.normalize(alone)).norm(dim=1) > 0.01).sum())
    own = (alone[:, None] == alone).all(2).sum(1) == 1  # far images too may get the same, as of an argmax
    repeated = int(((seen[0] == alone).all(1) & own).sum())
    evidence = {"changed": changed, "repeated": repeated, "images": len(x)}
    text = (
        f"of {len(x)} images, {changed} get other scores after their neighbours than without them, and {repeated} the "
        "very same scores as a neighbour"
    )
    if 2 * repeated > len(x):
        return "fail", text, evidence
    return grade(changed, len(x), SQUARE_TOLERANCE), text, evidence


def _copied(model: nn.Module) -> nn.Module:
    """A copy of the network, or the network itself if it cannot be copied."""
    try:
        return copy.deepcopy(model)
    except Exception:  # whatever an object raises that cannot be copied
        return model


def logits_range(s: Subject) -> Outcome:
    low, high = float(s.scores.min()), float(s.scores.max())
    off = float((s.scores.sum(1) - 1).abs().max())
    evidence = {"min": low, "max": high, "sum_off_one": off}
    if high < 1 + 1e-5 and low > -1e-5 and off < 1e-5:
        return "fail", "the scores of each image lie in [0, 1] and sum to 1: they are probabilities", evidence
    return "pass", f"scores lie in [{low:.3g}, {high:.3g}]", evidence


class _Differentiations(TorchFunctionMode):
    """Counts the calls of autograd."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
        return func(*args, **(kwargs or {}))


def static(s: Subject) -> Outcome:
    with held(s.model), _Differentiations() as seen:
        s.model(s.x[:2])
    text = f"a forward pass calls autograd {seen.count} times"
    return "fail" if seen.count else "pass", text, {"calls": seen.count}


def gradients(s: Subject) -> Outcome:
    if isinstance(s.gradients, str):
        return "fail", f"the backward pass fails: {s.gradients}", {"error": s.gradients}
    evidence: dict[str, Any] = {"images": int(s.right.sum())}
    words, worst = [], 0
    for name, gradient in s.gradients.items():
        flat = gradient[s.right].flatten(1)
        bad = ~torch.isfinite(flat).all(1)
        zero = (flat == 0).all(1)
        zeros = int((flat == 0).sum()) / max(flat.numel(), 1)
        evidence[name] = {"zero": int(zero.sum()), "not_finite": int(bad.sum()), "zero_entries": zeros}
        words.append(f"{name} {int(zero.sum())} zero, {int(bad.sum())} not finite")
        worst = max(worst, int((zero | bad).sum()))
    status = grade(worst, s.n, SQUARE_TOLERANCE)
    return status, f"of {evidence['images']} images' gradients: {'; '.join(words)}", evidence


# The attack itself


def attack_valid(s: Subject) -> Outcome:
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
    if distance > s.threat.radius * (1 + 1e-5) + 1e-6 or low < 0 or high > 1:
        return "fail", text, evidence
    return grade(lost, s.n, SQUARE_TOLERANCE), text, evidence


def loss_gap(s: Subject) -> Outcome:
    classes, radius, norm = s.scores.shape[1], s.threat.radius, s.threat.norm
    s.attack(apgd_ce(radius, norm, steps=STEPS, seed=s.seed), s.standing, white_box=True)
    left = int(s.standing.sum())
    targeted = apgd_targeted(radius, classes, norm, steps=STEPS, targets=TARGETS, seed=s.seed)
    more = int(s.attack(targeted, s.standing, white_box=True).sum())
    evidence = {"after_cross_entropy": left, "broken_by_margin_only": more, "n": s.n, "note": targeted.note}
    text = f"targeted APGD breaks {more} of the {left} images that PGD and APGD-CE left ({100 * more / s.n:.1f} points)"
    if improbable(more, s.n, 0.1):
        return "fail", text, evidence
    return "warn" if more > 0.06 * s.n else "pass", text, evidence


def beaten_by(make: Callable[[Subject], Attack]) -> Callable[[Subject], Outcome]:
    """The check that an attack breaks no image that the gradient attacks so far have left standing."""

    def run(s: Subject) -> Outcome:
        attack, left = make(s), s.standing
        broken = int(s.attack(attack, left, white_box=False).sum())
        evidence = {"standing": int(left.sum()), "broken": broken, "n": s.n, "settings": dict(attack.settings)}
        text = f"{attack.name} breaks {broken} of {int(left.sum())} images that white-box attacks left standing"
        return grade(broken, s.n, SQUARE_TOLERANCE), text, evidence

    return run


def one_step(s: Subject) -> Threat:
    return Threat(eps=s.threat.radius, step=s.threat.radius, steps=1, norm=s.threat.norm, start="zero")


def fgsm(s: Subject) -> Attack:
    threat = one_step(s)

    def perturb(model: nn.Module, x: Images, y: Labels) -> Images:
        return ascend(lambda z: cross_entropy(logits(model(z)), y), x, threat, model=model)

    return Attack(name="FGSM", perturb=perturb, threat=threat, passes=1)


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


def transfer(s: Subject) -> Attack:
    base = s.base
    if base is None:
        raise Skip("no surrogate network was given")

    def perturb(_: nn.Module, x: Images, y: Labels) -> Images:
        try:
            return pgd_attack(base, x, y, s.threat)
        except NoGradientError as error:
            raise Skip("the surrogate network has no gradient to the pixels") from error

    return Attack(name="transferred PGD", perturb=perturb, threat=s.threat, passes=STEPS + 1, seed=s.seed)


def adaptive(s: Subject) -> Attack:
    """Through the layers that were named, or else the 5 % that are most critical under the attack."""
    layers = s.layers or top(layer_criticality(s.model, s.x[: s.batch_size], s.pgd().images[: s.batch_size]), 0.05)
    return through_layers(layers, s.threat.radius, s.threat.norm, steps=STEPS, seed=s.seed)


def few_queries(s: Subject) -> Attack:
    if not square_takes(s.x.shape[2], s.threat.norm):
        raise Skip(f"pyautoattack's l2 Square does not take images of {s.x.shape[2]} pixels", excused=True)
    return square(s.threat.radius, s.threat.norm, queries=QUERIES, seed=s.seed)


def overfitting(s: Subject) -> Outcome:
    single, pgd_broken = s.attack(fgsm(s), s.right, white_box=False), s.pgd().fooled & s.right
    clean, after_one, after_many = (int(mask.sum()) for mask in (s.right, s.right & ~single, s.right & ~pgd_broken))
    evidence = {"clean": clean, "after_fgsm": after_one, "after_pgd": after_many, "n": s.n}
    text = f"of {clean} right images FGSM leaves {after_one}, PGD-{STEPS} {after_many}"
    if after_one - after_many <= 0.2 * s.n:
        return "pass", text, evidence
    return "fail" if after_one > clean / 2 else "warn", text, evidence


# Whether the attack is as strong as it could be


def more_steps(s: Subject) -> Outcome:
    s.pgd()
    left = s.standing
    more = int((s.pgd(steps=2 * STEPS).fooled & left).sum())
    text = f"{2 * STEPS} steps break {more} of the {int(left.sum())} images left standing by {STEPS}"
    return grade(more, s.n, CONVERGED), text, {"more": more, "standing": int(left.sum()), "n": s.n}


def more_starts(s: Subject) -> Outcome:
    late, starts = 0, restarts(s.threat, 2 * STARTS, s.seed)
    for number, attack in enumerate(starts[1:], 2):
        broken = s.attack(attack, s.standing, white_box=True)
        late += int(broken.sum()) if number > STARTS else 0
    text = f"starts {STARTS + 1} to {2 * STARTS} break {late} images that no gradient attack before broke"
    return grade(late, s.n, CONVERGED), text, {"more": late, "standing": int(s.standing.sum()), "n": s.n}


def optimised(s: Subject) -> Outcome:
    found = s.pgd(steps=2 * STEPS)
    curve = found.curve[:, s.right & ~found.fooled].cummax(0).values
    if not curve.shape[1]:
        raise Skip("the attack leaves no image standing")
    span = (curve[-1] - curve[0]).clamp_min(1e-12)
    rising = (curve[-1] - curve[-11]) / span > 0.05
    share = float(rising.float().mean())
    text = f"the loss of {int(rising.sum())} of {len(rising)} standing images still rises in the last 10 steps"
    return "warn" if share > 0.1 else "pass", text, {"rising": int(rising.sum()), "standing": len(rising)}


def monotone(s: Subject) -> Outcome:
    radius = s.threat.radius
    largest = 1.0 if s.threat.norm == "linf" else float("inf")
    radii = [radius / 4, radius / 2, radius, min(2 * radius, largest)]
    correct = [int((s.right & ~s.pgd(each).fooled).sum()) for each in radii]
    rise = max(0, *(b - a for a, b in pairwise(correct)))
    text = "correct at eps/4, eps/2, eps, 2 eps: " + ", ".join(map(str, correct))
    return grade(rise, s.n, SQUARE_TOLERANCE), text, {"eps": radii, "correct": correct, "n": s.n}


def large_eps(s: Subject) -> Outcome:
    whole = 1.0 if s.threat.norm == "linf" else float(s.x[0].numel()) ** 0.5
    half, none = (int((s.right & ~s.pgd(radius).fooled).sum()) for radius in (whole / 2, whole))
    chance = 1 / s.scores.shape[1]
    text = f"{half} of {s.n} images withstand PGD at eps {whole / 2:.3g}, {none} at {whole:.3g}"
    evidence = {"half": half, "unbounded": none, "n": s.n, "chance": chance}
    if improbable(half, s.n, chance):
        return "fail", text, evidence
    return grade(none, s.n, SQUARE_TOLERANCE), text, evidence


# The loss surface and the arithmetic


def landscape(s: Subject) -> Outcome:
    x, y, scores = s.x[s.right], s.y[s.right], s.scores[s.right]
    here = cross_entropy(scores, y)
    changes = []
    for _ in range(DIRECTIONS):
        there = cross_entropy(s.score(s.threat.project(x + (s.threat.first(x) - x) / 2, x)), y)
        changes.append(((there - here).abs() / here.clamp_min(1e-12)).clamp_max(1))
    change = float(torch.stack(changes).mean())
    text = f"the loss changes by {100 * change:.0f} % on average in random directions of eps/2"
    return "warn" if change > 0.1 else "pass", text, {"relative_change": change}


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
