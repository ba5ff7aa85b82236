"""Checks that an image gets the same scores whenever and beside whatever it runs."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clat.evaluation.trust.check import FORWARD, OURS, POINTS, Check, Outcome, Skip, grade
from clat.evaluation.trust.network_checks import titled
from clat.evaluation.trust.subject import FORWARDS, SAME, Subject
from clat.network import Images, class_scores, first_tensor, held, same_bits

NEIGHBOURS = 4  # of each image, that a network sees before it is asked
APART = 0.01  # the distance of scores, normalised, from which on they are others


def deterministic(s: Subject) -> Outcome:
    correct = [int((run.argmax(1) == s.y).sum()) for run in s.runs]
    evidence = {"correct": correct, "distance": s.spread}
    if not s.draws:
        return "pass", f"scores of {FORWARDS} runs differ by at most {s.spread:.0e}", evidence
    evidence["module"] = module = random_module(s)
    text = f"scores of {FORWARDS} runs differ by up to {s.spread:.1g}; random numbers enter in {module}"
    return "fail", text, evidence


DETERMINISTIC = Check(
    id="deterministic",
    title="the same images get the same scores",
    threshold=f"fail if in {FORWARDS} runs the number right differs or normalised scores by over {SAME:g} (l2)",
    source="AA, check_randomized",
    flaw="the network draws random numbers, on which single gradients mislead",
    run=deterministic,
    passes=FORWARDS * FORWARD,
)


def random_module(s: Subject) -> str:
    """The first module to return something else for the same input, by dotted name and type."""

    def run() -> list[tuple[str, Tensor, Tensor]]:
        calls: list[tuple[str, Tensor, Tensor]] = []

        def hook(name: str) -> Callable[..., None]:
            def keep(module: nn.Module, inputs: Any, output: Any) -> None:
                if inputs:
                    calls.append((titled(name, module), first_tensor(inputs[0]).clone(), first_tensor(output).clone()))

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


def alone(s: Subject, *, apart: float) -> Outcome:
    few = min(8, s.n // 2)
    if not few:
        raise Skip("there is one image only")
    if s.draws:
        raise Skip("the network draws random numbers")
    shift = nn.functional.normalize(s.score(s.x[:few])) - nn.functional.normalize(s.scores[:few])
    distance = float(shift.norm(dim=1).max())
    text = f"scores of {few} images by themselves and in a batch of {min(s.batch_size, s.n)} differ by {distance:.0e}"
    return "fail" if distance > apart else "pass", text, {"distance": distance}


BATCH = Check(
    id="batch",
    title="an image's scores do not depend on its batch",
    threshold="fail if normalised scores differ by over {apart:g} (l2)",
    source=OURS,
    flaw="an image's scores depend on the other images of its batch",
    run=alone,
    passes=FORWARD,
    limits={"apart": APART},
)


def state(s: Subject, *, points: float, apart: float, repeats: float) -> Outcome:
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
    changed = int(((F.normalize(after) - F.normalize(alone)).norm(dim=1) > apart).sum())
    own = (alone[:, None] == alone).all(2).sum(1) == 1  # far images too may get the same, as of an argmax
    repeated = int(((seen[0] == alone).all(1) & own).sum())
    evidence = {"changed": changed, "repeated": repeated, "images": len(x)}
    text = (
        f"of {len(x)} images, {changed} get other scores after their neighbours than without them, and {repeated} the "
        "very same scores as a neighbour"
    )
    if repeated > repeats / 100 * len(x):
        return "fail", text, evidence
    return grade(changed, len(x), points / 100), text, evidence


STATE = Check(
    id="state",
    title="an image's scores do not depend on the images that came before",
    threshold="fail if significantly more than {points:g} points of scores, normalised, differ by over {apart:g} (l2) "
    "from those of a copy that saw no neighbours, or if over {repeats:g} % repeat a neighbour's",
    source=OURS,
    flaw="the network's answers depend on what it saw before, or repeat themselves around an image",
    run=state,
    passes=(NEIGHBOURS + 3) * FORWARD,
    limits={"points": POINTS, "apart": APART, "repeats": 50},
)


def _copied(model: nn.Module) -> nn.Module:
    """A copy of the network, or the network itself if it cannot be copied."""
    try:
        return copy.deepcopy(model)
    except Exception:  # an object that cannot be copied may raise anything
        return model
