"""Checks of the network as it is given: its accuracy, its inputs and outputs, its mode and its gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clat.evaluation.accuracy import CHANCE, Accuracy
from clat.evaluation.fits import are_probabilities
from clat.evaluation.trust.check import FORWARD, LEVEL, OURS, POINTS, Check, Outcome, Status, grade, improbable
from clat.evaluation.trust.subject import Subject
from clat.network import held, same_bits

COLOUR_STATISTICS = {
    "mean and std of ImageNet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "mean and std of CIFAR-10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
}


def clean_accuracy(s: Subject, *, times: float) -> Outcome:
    accuracy = Accuracy(int(s.right.sum()), s.n)
    chance = 1 / s.scores.shape[1]
    status: Status = "fail" if accuracy.value <= times * chance else "pass"
    return status, f"{accuracy} clean; chance is {100 * chance:.0f} %", {**accuracy.to_json(), "chance": chance}


CLEAN_ACCURACY = Check(
    id="clean-accuracy",
    title="clean accuracy is above chance",
    threshold="fail at or below {times:g} times chance",
    source="C19 asks for it; the threshold is ours",
    flaw="the network is at chance level on clean images",
    run=clean_accuracy,
    passes=FORWARD,
    limits={"times": CHANCE},
    invalid=True,
)


def normalisation(s: Subject, *, fails: float, warns: float) -> Outcome:
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
    if gain > warns / 100 * s.n and improbable(gained, gained + lost, 0.5):
        text = f"{gain} of {s.n} images more are right with inputs {best}"
        return "fail" if gain > fails / 100 * s.n else "warn", text, evidence
    return "pass", f"no usual normalisation, done or undone, gains over {max(gain, 0)} of {s.n} images", evidence


NORMALISATION = Check(
    id="normalisation",
    title="the network takes pixels in [0, 1]",
    threshold="fail if normalising inputs, or undoing that, gains over {fails:g} points and significantly (sign test, "
    f"{100 * LEVEL:g} %), warn over {{warns:g}}",
    source=OURS,
    flaw="inputs seem to be normalised outside the network, or twice",
    run=normalisation,
    passes=9 * FORWARD,
    limits={"fails": 15, "warns": 5},
    invalid=True,
)


def mode(s: Subject) -> Outcome:
    with held(s.model), torch.no_grad():
        training = {titled(name, module): module for name, module in s.model.named_modules() if module.training}
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


MODE = Check(
    id="mode",
    title="eval() reaches every module, and a forward pass changes no buffer",
    threshold="fail if a buffer changes or a dropout or BatchNorm stays in train mode, warn on other modules",
    source="C19 asks for a fixed network; the threshold is ours",
    flaw="part of the network is not in eval mode",
    run=mode,
    passes=FORWARD,
)


def titled(name: str, module: nn.Module) -> str:
    """A module's dotted name and type."""
    return f"{name or 'the network'} ({type(module).__name__})"


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "none"


def logits_range(s: Subject, *, within: float) -> Outcome:
    low, high = float(s.scores.min()), float(s.scores.max())
    off = float((s.scores.sum(1) - 1).abs().max())
    evidence = {"min": low, "max": high, "sum_off_one": off}
    if are_probabilities(s.scores, within):
        return "fail", "the scores of each image lie in [0, 1] and sum to 1: they are probabilities", evidence
    return "pass", f"scores lie in [{low:.3g}, {high:.3g}]", evidence


LOGITS = Check(
    id="logits",
    title="the network returns logits, not probabilities",
    threshold="fail if all scores lie in [0, 1] and sum to 1, each within {within:g}",
    source="AA, check_range_output",
    flaw="the network returns probabilities, whose cross-entropy has small gradients",
    run=logits_range,
    passes=FORWARD,
    limits={"within": 1e-5},
)


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


STATIC = Check(
    id="static",
    title="a forward pass does not differentiate",
    threshold="fail at any call of autograd",
    source="AA, check_dynamic",
    flaw="the network optimises at inference, which gradient attacks do not see through",
    run=static,
    passes=FORWARD,
)


def gradients(s: Subject, *, points: float) -> Outcome:
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
    status = grade(worst, s.n, points / 100)
    return status, f"of {evidence['images']} images' gradients: {'; '.join(words)}", evidence


GRADIENTS = Check(
    id="gradients",
    title="cross-entropy and margin have a gradient at every image",
    threshold="fail if significantly more than {points:g} points are exactly zero or not finite, warn above",
    source="AA, check_zero_gradients (any); the tolerance after AA, check_square_sr",
    flaw="gradients vanish or are missing, so that gradient attacks do not move",
    run=gradients,
    passes=4,
    limits={"points": POINTS},
)
