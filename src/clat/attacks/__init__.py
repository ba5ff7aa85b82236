"""Evaluation attacks, and the tiers that group them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from clat.attacks.attack import Attack
from clat.attacks.auto import apgd_ce, apgd_targeted, autoattack, fab_targeted, square, square_takes
from clat.attacks.features import activation, through_layers
from clat.attacks.pgd import pgd_threat, restarts
from clat.errors import InputError
from clat.threat import Lp

TierName = Literal["quick", "standard", "full", "blackbox"]


@dataclass(frozen=True, kw_only=True)
class Tier:
    """A set of attacks and the number of images they are run on; None is all."""

    attacks: Sequence[Attack]
    images: int | None


def tier(
    name: TierName,
    eps: float | str,
    classes: int,
    norm: Lp = "linf",
    *,
    steps: int = 20,
    starts: int = 5,
    seed: int = 0,
) -> Tier:
    """The attacks of a tier, for a network with this many classes.

    quick: PGD with random restarts on 512 images. standard: APGD-CE and targeted APGD on 1,000. full: AutoAttack's
    standard version (APGD-CE, targeted APGD, targeted FAB, Square) on all. blackbox: Square on 1,000, which needs no
    gradients, for networks that have none.

    Args:
        steps, starts: of the quick tier's PGD
    """
    if name == "quick":
        return Tier(attacks=restarts(pgd_threat(eps, steps, norm), starts, seed), images=512)
    if name == "standard":
        both = (apgd_ce(eps, norm, seed=seed), apgd_targeted(eps, classes, norm, seed=seed))
        return Tier(attacks=both, images=1000)
    if name == "full":
        return Tier(attacks=autoattack(eps, classes, norm, seed=seed), images=None)
    if name == "blackbox":
        return Tier(attacks=(square(eps, norm, seed=seed),), images=1000)
    raise InputError(f"There is no tier {name!r}; choose one of {', '.join(get_args(TierName))}.")


__all__ = [
    "Attack",
    "Tier",
    "TierName",
    "activation",
    "apgd_ce",
    "apgd_targeted",
    "autoattack",
    "fab_targeted",
    "pgd_threat",
    "restarts",
    "square",
    "square_takes",
    "through_layers",
    "tier",
]
