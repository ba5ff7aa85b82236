"""Free adversarial training: one backward pass moves weights and images together (Shafahi et al. 2019)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clat.errors import InputError
from clat.inputs import check_fields
from clat.network import Images, Labels, logits
from clat.objectives.base import Objective, check_one_step
from clat.threat import Threat


@dataclass(frozen=True, kw_only=True)
class FreeAt(Objective):
    """Cross-entropy on x + delta, where each batch is trained on several times and delta moves once each time.

    delta and the weights take their step from the same backward pass: ``loss`` keeps the attacked images, the
    caller's ``backward`` fills their gradient, and the next ``perturb`` makes the step with it. delta is kept from
    replay to replay and from batch to batch, although the images change. It starts again in each epoch (``begin``),
    so a resumed run equals an uninterrupted one.

    An epoch has ``replays`` times the usual number of steps: divide the epochs by ``replays``.

    Args:
        replays: m, how often each batch is trained on

    Source: ashafahi/free_adv_train. As in locuslab/fast_adversarial, delta is cut with the box [0, 1] around the
    images it was used on before it is used again.
    """

    name = "free-at"
    replays: int = 8

    def __post_init__(self) -> None:
        check_fields(self, "free_at.")
        if self.replays < 2:
            raise InputError(f"free_at.replays is {self.replays}; with fewer than 2 no image meets its perturbation.")

    def attacks_pixels(self) -> bool:
        return False

    def takes_soft_labels(self) -> bool:
        return True

    def carries(self) -> bool:
        return True

    def begin(self, start: nn.Module | None = None) -> Objective:
        return _Epoch()

    def perturb(self, model: nn.Module, x: Images, y: Labels, threat: Threat) -> Images:
        return self.begin().perturb(model, x, y, threat)

    def loss(self, model: nn.Module, x: Images, x_adv: Images, y: Labels) -> dict[str, Tensor]:
        return self.begin().loss(model, x, x_adv, y)


class _Epoch(Objective):
    """Free-AT in one epoch: delta, and the clean and attacked images that were trained on last."""

    def __init__(self) -> None:
        self.carried: dict[str, Tensor] = {}

    def perturb(self, model: nn.Module, x: Images, y: Labels, threat: Threat) -> Images:
        check_one_step(threat, "free-at", "eps")
        delta = self._moved(x, threat)
        if len(delta) < len(x):
            new = x[len(delta) :]
            delta = torch.cat([delta, threat.first(new) - new])
        self.carried["delta"] = delta
        return threat.project(x + delta[: len(x)], x)

    def loss(self, model: nn.Module, x: Images, x_adv: Images, y: Labels) -> dict[str, Tensor]:
        attacked = x_adv.detach().requires_grad_()
        self.carried.update(x=x, attacked=attacked)
        return {"cross_entropy": F.cross_entropy(logits(model(attacked)), y)}

    def _moved(self, x: Images, threat: Threat) -> Tensor:
        """delta after the step that the last backward pass allows; a batch smaller than delta moves its first rows."""
        delta = self.carried.get("delta", x[:0])
        last, attacked = self.carried.pop("x", None), self.carried.pop("attacked", None)
        if last is None or attacked is None or attacked.grad is None:
            return delta
        moved = threat.project(threat.move(attacked.detach(), attacked.grad), last) - last
        return torch.cat([moved, delta[len(moved) :]])
