"""AutoAttack and its parts, by pyautoattack, for any number of classes: Croce and Hein 2020."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from clat.attacks.attack import Attack, finite_scores
from clat.errors import InputError
from clat.network import Images, Labels
from clat.threat import Lp, Threat

NAMES = {"linf": "Linf", "l2": "L2"}
TARGETS = 9  # of AutoAttack, which was made for ten classes
RHO = 0.75


class _MarginAPGD(APGDAttack_targeted):  # type: ignore[misc]
    """Targeted APGD on the plain margin, for fewer than the four classes that the targeted DLR loss divides by."""

    def dlr_loss_targeted(self, x: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(len(x), device=x.device)
        return x[rows, self.y_target] - x[rows, y]


def apgd_ce(
    eps: float | str, norm: Lp = "linf", *, steps: int = 100, starts: int = 1, expectation: int = 1, seed: int = 0
) -> Attack:
    """Auto-PGD on the cross-entropy; ``expectation`` gradients are averaged at each step, for networks that draw."""

    def make(model: Any, threat: Threat) -> APGDAttack:
        return APGDAttack(
            model,
            n_iter=steps,
            n_restarts=starts,
            eps=threat.radius,
            norm=NAMES[norm],
            eot_iter=expectation,
            rho=RHO,
            seed=seed,
        )

    settings = {"steps": steps, "starts": starts, "expectation": expectation}
    return _attack("APGD-CE", make, eps, norm, seed, starts * (steps + 1) * expectation, settings)


def apgd_targeted(
    eps: float | str, classes: int, norm: Lp = "linf", *, steps: int = 100, targets: int = TARGETS, seed: int = 0
) -> Attack:
    """Auto-PGD on the targeted DLR loss, against each of the ``targets`` likeliest other classes.

    There are at most ``classes - 1``; below four classes, where that loss is not defined, the margin takes its place.
    """
    count = min(targets, classes - 1)
    kind = APGDAttack_targeted if classes >= 4 else _MarginAPGD

    def make(model: Any, threat: Threat) -> APGDAttack:
        return kind(
            model, n_iter=steps, eps=threat.radius, norm=NAMES[norm], n_target_classes=count, rho=RHO, seed=seed
        )

    note = _few(count, targets, classes)
    if classes < 4:
        note = f"{note}; margin loss, as the targeted DLR loss needs 4 classes"
    settings = {"steps": steps, "targets": count, "loss": "targeted DLR" if classes >= 4 else "targeted margin"}
    return _attack("APGD-T", make, eps, norm, seed, count * (steps + 1), settings, note)


def fab_targeted(
    eps: float | str, classes: int, norm: Lp = "linf", *, steps: int = 100, targets: int = TARGETS, seed: int = 0
) -> Attack:
    """The targeted Fast Adaptive Boundary attack (Croce and Hein 2020), which looks for the nearest other class."""
    count = min(targets, classes - 1)

    def make(model: Any, threat: Threat) -> FABAttack_PT:
        return FABAttack_PT(
            model,
            n_iter=steps,
            eps=threat.radius,
            norm=NAMES[norm],
            targeted=True,
            n_target_classes=count,
            seed=seed,
        )

    note = _few(count, targets, classes)
    return _attack("FAB-T", make, eps, norm, seed, count * steps * 4 / 3, {"steps": steps, "targets": count}, note)


def square(eps: float | str, norm: Lp = "linf", *, queries: int = 5000, seed: int = 0) -> Attack:
    """The Square attack (Andriushchenko et al. 2020), which uses no gradients."""

    def make(model: Any, threat: Threat) -> SquareAttack:
        return SquareAttack(
            model,
            n_queries=queries,
            eps=threat.radius,
            norm=NAMES[norm],
            p_init=0.8,
            resc_schedule=False,
            seed=seed,
        )

    attack = _attack("Square", make, eps, norm, seed, queries / 3, {"queries": queries})

    def perturb(model: nn.Module, x: Images, y: Labels) -> Images:
        if not square_takes(x.shape[2], norm):
            raise InputError(
                f"pyautoattack's l2 Square does not take images of {x.shape[2]} pixels; resize them, e.g. with size=32 "
                "after the data's name, or choose another tier."
            )
        return attack.perturb(model, x, y)

    return replace(attack, perturb=perturb)


def square_takes(edge: int, norm: Lp) -> bool:
    """Whether pyautoattack's Square works on images of this many pixels a side: its l2 form fails on 12, 14, 18, ..."""
    tile = edge // 5
    return norm == "linf" or tile == 1 or (tile > 1 and (edge - 5 * tile) // 2 + edge // tile * tile <= edge)


def autoattack(eps: float | str, classes: int, norm: Lp = "linf", *, seed: int = 0) -> tuple[Attack, ...]:
    """The standard version: APGD-CE, targeted APGD, targeted FAB and Square, in this order."""
    return (
        apgd_ce(eps, norm, seed=seed),
        apgd_targeted(eps, classes, norm, seed=seed),
        fab_targeted(eps, classes, norm, seed=seed),
        square(eps, norm, seed=seed),
    )


def _attack(
    name: str,
    make: Callable[[Any, Threat], Any],
    eps: float | str,
    norm: Lp,
    seed: int,
    passes: float,
    settings: dict[str, Any],
    note: str = "",
) -> Attack:
    threat = Threat(eps=eps, norm=norm)

    def perturb(model: nn.Module, x: Images, y: Labels) -> Images:
        with finite_scores(model) as scores:
            return make(scores, threat).perturb(x, y)

    return Attack(name=name, perturb=perturb, threat=threat, passes=passes, seed=seed, settings=settings, note=note)


def _few(count: int, targets: int, classes: int) -> str:
    return f"{count} of {targets} targets, as there are {classes} classes" if count < targets else ""
