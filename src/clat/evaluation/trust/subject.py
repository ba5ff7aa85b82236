"""The network under test, the images it is tested on, and the attacks that several checks share."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clat.attacks import Attack, pgd_threat
from clat.attacks.features import cross_entropy, margin
from clat.compute import seeded
from clat.evaluation.cost import seconds_of_images
from clat.network import Images, Labels, NoGradientError, check_gradient, class_scores, held, logits, per_image, predict
from clat.threat import Lp, Threat, ascend

BATCH = 100  # images that run together
STEPS = 20  # of the attack that others are compared with
FORWARDS = 5  # of the same images, after AutoAttack's check_randomized
SAME = 1e-4  # the distance of scores that it tolerates

Loss = Callable[[Tensor, Labels], Tensor]  # class scores and labels -> one value per image


LOSSES: dict[str, Loss] = {"cross-entropy": cross_entropy, "margin": margin}


@dataclass(frozen=True)
class Attacked:
    """The result of PGD on all images. An iterate that was misclassified is kept.

    images: of each image the last iterate that was misclassified, or else the one with the highest loss; fooled:
    which were misclassified at some step, bool (n,); curve: the loss after each step, (steps + 1, n).
    """

    images: Images
    fooled: Tensor
    curve: Tensor


class Subject:
    """A network with the images it is tested on, and which of these it still classifies correctly.

    Args:
        x, y: images with pixels in [0, 1] and their labels, on the network's device
        statistics: mean and standard deviation of the data's pixels, per channel
        base: a surrogate network for transfer attacks
        layers: dotted names of those that the adaptive attack goes through
        batch_size: images that run together
    """

    def __init__(
        self,
        model: nn.Module,
        x: Images,
        y: Labels,
        statistics: tuple[Sequence[float], Sequence[float]],
        eps: float | str,
        norm: Lp,
        *,
        base: nn.Module | None = None,
        layers: Sequence[str] = (),
        seed: int = 0,
        batch_size: int = BATCH,
    ):
        self.layers, self.batch_size = layers, batch_size
        self.model, self.x, self.y, self.statistics, self.base, self.seed = model, x, y, statistics, base, seed
        self.threat = pgd_threat(eps, STEPS, norm)
        self.right = self.predict(x) == y
        self.white_box = torch.zeros_like(self.right)  # broken by an attack with gradients, in the ball
        self.broken = torch.zeros_like(self.right)  # broken by any attack, in the ball
        self._pgd: dict[Threat, Attacked] = {}

    @property
    def n(self) -> int:
        return len(self.y)

    @property
    def standing(self) -> Tensor:
        """The images that no attack with gradients has broken so far, bool (n,)."""
        return self.right & ~self.white_box

    @property
    def scores(self) -> Tensor:
        """The class scores of all images, (n, classes)."""
        return self.runs[0]

    def score(self, x: Images) -> Tensor:
        """Class scores in eval mode, (batch, classes)."""
        return torch.cat([class_scores(self.model, part) for part in x.split(self.batch_size)])

    def predict(self, x: Images) -> Tensor:
        """The predicted classes (batch,). Raises InputError if a score is not finite."""
        return torch.cat([predict(self.model, part) for part in x.split(self.batch_size)])

    @cached_property
    def runs(self) -> list[Tensor]:
        """The class scores of all images in so many forward passes."""
        return [self.score(self.x) for _ in range(FORWARDS)]

    @cached_property
    def spread(self) -> float:
        """The largest l2 distance of an image's scores, at length 1, between two forward passes."""
        unit = [F.normalize(run, eps=1e-10) for run in self.runs]
        return max(float((a - b).norm(dim=1).max()) for a, b in combinations(unit, 2))

    @property
    def draws(self) -> bool:
        """Whether the network draws random numbers, so that the same image may get other scores."""
        correct = {int((run.argmax(1) == self.y).sum()) for run in self.runs}
        return len(correct) > 1 or self.spread > SAME

    @cached_property
    def gradients(self) -> dict[str, Tensor] | str:
        """The gradient of each loss at the images, or the reason why there is none."""
        try:
            return {name: self._gradient(loss) for name, loss in LOSSES.items()}
        except (RuntimeError, NoGradientError) as error:  # raised by autograd and by what has no derivative
            return " ".join(str(error).split())[:200]

    def _gradient(self, loss: Loss) -> Tensor:
        """The gradient of a loss at the images."""
        parts: list[Tensor] = []
        with held(self.model), torch.enable_grad():
            for images, labels in zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True):
                images = images.clone().requires_grad_()
                value = loss(logits(self.model(images)), labels).sum()
                check_gradient(value)
                parts += torch.autograd.grad(value, images)
        return torch.cat(parts)

    @cached_property
    def pass_seconds(self) -> float:
        """Seconds of a forward and backward pass for an image here; a forward pass alone counts as a third of one."""
        return seconds_of_images(self.model, self.x[: self.batch_size], self.y[: self.batch_size])

    def pgd(self, radius: float | None = None, steps: int = STEPS) -> Attacked:
        """PGD on the cross-entropy of all images, run once for each radius (default eps) and number of steps."""
        threat = pgd_threat(self.threat.radius if radius is None else radius, steps, self.threat.norm)
        if threat not in self._pgd:
            with seeded(self.seed, self.x.device):
                batches = zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True)
                parts = [_pgd(self.model, x, y, threat) for x, y in batches]
            images, fooled, curves = zip(*((part.images, part.fooled, part.curve) for part in parts), strict=True)
            self._pgd[threat] = Attacked(torch.cat(images), torch.cat(fooled), torch.cat(curves, 1))
            if threat.radius == self.threat.radius:
                self.note(self._pgd[threat].fooled, white_box=True)
        return self._pgd[threat]

    def attack(self, attack: Attack, where: Tensor, *, white_box: bool) -> Tensor:
        """Which of the images of a mask (n,) an attack in the ball breaks, bool (n,)."""
        broken = torch.zeros_like(where)
        for part in where.nonzero()[:, 0].split(self.batch_size) if where.any() else ():
            x, y = self.x[part], self.y[part]
            with seeded(attack.seed, x.device), held(self.model), warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="pyautoattack")  # of zero gradients, which have their check
                x_adv = attack.perturb(self.model, x, y).detach()
            broken[part] = self.predict(attack.threat.project(x_adv, x)) != y
        self.note(broken, white_box=white_box)
        return broken

    def note(self, broken: Tensor, *, white_box: bool) -> None:
        """Remembers which images an attack in the ball broke."""
        self.broken |= broken & self.right
        if white_box:
            self.white_box |= broken & self.right


def _pgd(model: nn.Module, x: Images, y: Labels, threat: Threat) -> Attacked:
    kept, fooled, curve = x.clone(), torch.zeros_like(y, dtype=torch.bool), []

    def cost(iterate: Images) -> Tensor:
        scores = logits(model(iterate))
        now = scores.argmax(1) != y
        kept[now] = iterate.detach()[now]
        fooled.logical_or_(now)
        curve.append(cross_entropy(scores.detach(), y))
        return cross_entropy(scores, y)

    highest = ascend(cost, x, threat, model=model, keep="best")
    return Attacked(torch.where(per_image(fooled, x), kept, highest), fooled, torch.stack(curve))
