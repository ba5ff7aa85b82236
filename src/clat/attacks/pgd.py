"""Projected gradient descent on the cross-entropy, with random restarts."""

from torch import nn

from clat.attacks.attack import Attack, finite_scores
from clat.errors import InputError
from clat.network import Images, Labels
from clat.threat import Lp, Threat, attack_output


def pgd_threat(eps: float | str, steps: int, norm: Lp = "linf") -> Threat:
    """The threat model of PGD in evaluations: random start, steps of eps / 4."""
    radius = Threat(eps=eps, norm=norm).radius
    return Threat(eps=radius, step=radius / 4, steps=steps, norm=norm)


def restarts(threat: Threat, starts: int = 1, seed: int = 0) -> tuple[Attack, ...]:
    """PGD from so many random starts, each an attack of its own with the next seed.

    Raises:
        InputError: fewer than one start
    """
    if starts < 1:
        raise InputError(f"The number of random starts is {starts}; it must be 1 or more.")
    name = f"PGD-{threat.steps}"

    def perturb(model: nn.Module, x: Images, y: Labels) -> Images:
        with finite_scores(model) as scores:
            return attack_output(model, x, y, threat, keep="best", scores=scores)

    return tuple(
        Attack(
            name=name if starts == 1 else f"{name}, start {start + 1}",
            perturb=perturb,
            threat=threat,
            passes=threat.steps + 1,
            seed=seed + start,
            settings={"steps": threat.steps, "step": float(threat.step), "from": threat.start},
        )
        for start in range(starts)
    )
