"""Fast adversarial training: one long step from a random start (Wong et al. 2020)."""

from dataclasses import dataclass

from torch import Tensor, nn

from clat.attacks import pgd_threat
from clat.errors import InputError
from clat.inputs import check_fields
from clat.network import Images, Labels, predict
from clat.objectives.base import check_one_step
from clat.objectives.pgd_at import PgdAt
from clat.threat import Threat, attack_output

PROBE_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class FastAt(PgdAt):
    """Cross-entropy on images attacked by one step, and a guard against catastrophic overfitting.

    Against one step a network can learn to be robust to that step alone: within an epoch its accuracy under PGD
    collapses. So after each epoch the training loop runs ``probe`` on the epoch's first batch, and if the accuracy
    fell by more than ``largest_drop`` since the epoch before, it ends the run with the weights of that epoch.

    Args:
        largest_drop: between two epochs, of the accuracy under the probe, a share of the images; 1 lets the run go on

    Source: locuslab/fast_adversarial, whose guard probes in train mode and is off by default.
    """

    name = "fast-at"
    largest_drop: float = 0.2

    def __post_init__(self) -> None:
        check_fields(self, "fast_at.")
        if not 0 < self.largest_drop <= 1:
            raise InputError(f"fast_at.largest_drop is {self.largest_drop}; it must be above 0 and at most 1.")

    def perturb(self, model: nn.Module, x: Images, y: Labels, threat: Threat) -> Images:
        check_one_step(threat, "fast-at", "1.25 eps")
        return attack_output(model, x, y, threat)

    def probe(self, model: nn.Module, x: Images, y: Labels, threat: Threat) -> Tensor:
        """Which images, bool (batch,), the network in eval mode still gets right under PGD-5 with steps of eps / 4."""
        x_adv = attack_output(model, x, y, pgd_threat(threat.radius, PROBE_STEPS, threat.norm), keep="best")
        return predict(model, x_adv) == y
