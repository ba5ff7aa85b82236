"""The checks of ``clat trust``, in the order they run: what is cheap or tells most comes first.

Sources: C19 is Carlini et al. 2019 (arXiv 1902.06705), AA the flags of AutoAttack (Croce and Hein 2020), IoAF the
indicators of attack failure (Pintor et al. 2022, arXiv 2106.09947), FA locuslab/fast_adversarial (Wong et al. 2020).
"""

from clat.evaluation.trust import attack_checks, network_checks, repeat_checks, strength_checks
from clat.evaluation.trust.check import Check

CHECKS: tuple[Check, ...] = (
    network_checks.CLEAN_ACCURACY,
    network_checks.NORMALISATION,
    network_checks.MODE,
    repeat_checks.DETERMINISTIC,
    repeat_checks.BATCH,
    repeat_checks.STATE,
    network_checks.LOGITS,
    network_checks.STATIC,
    network_checks.GRADIENTS,
    attack_checks.ATTACK,
    attack_checks.LOSS_GAP,
    attack_checks.OVERFITTING,
    attack_checks.ITERATIVE,
    attack_checks.NOISE,
    attack_checks.SQUARE,
    attack_checks.TRANSFER,
    attack_checks.ADAPTIVE,
    strength_checks.LARGE_EPS,
    strength_checks.MORE_STEPS,
    strength_checks.OPTIMISED,
    strength_checks.MONOTONE,
    strength_checks.MORE_STARTS,
    strength_checks.LANDSCAPE,
    strength_checks.PRECISION,
)

# What a verdict needs. Left out are transfer, which needs another network; precision, which needs a device with bf16;
# optimised, which needs images that the attack leaves standing; and those that refine what others find.
NEEDED: tuple[str, ...] = (
    "clean-accuracy",
    "normalisation",
    "mode",
    "deterministic",
    "batch",
    "state",
    "logits",
    "static",
    "gradients",
    "attack",
    "loss-gap",
    "iterative",
    "noise",
    "square",
    "adaptive",
    "large-eps",
    "steps",
)
