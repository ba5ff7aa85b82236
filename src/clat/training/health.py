"""Checks that stop a run when more epochs would not help, and name the likely cause."""

import math
from collections.abc import Sequence
from typing import Any

from clat.evaluation.accuracy import CHANCE
from clat.training.recipe import Recipe

WEAK = 0.5  # perturbations below this share of eps, on average, mean that the attack does not work


class HealthError(RuntimeError):
    """A run failed in a way that more epochs will not fix; the message names the likely cause."""


def check_finite(loss: float, recipe: Recipe, epoch: int, step: int) -> None:
    """Raises HealthError if the loss so far is not finite."""
    if not math.isfinite(loss):
        raise HealthError(
            f"The loss is not finite in epoch {epoch}, step {step + 1}. Likely cause: the learning rate ({recipe.lr}) "
            "is too high for these layers; lower lr or set clip."
        )


def check_attack(length: float, recipe: Recipe) -> None:
    """Raises HealthError if a training attack hardly moves the images: by this length on average."""
    if recipe.health and length < WEAK * recipe.threat.radius:
        raise HealthError(
            f"The training attack moves images by {length:.4f} on average, far below eps = {recipe.threat.radius:.4f}. "
            "Likely cause: too few or too short steps, or a network whose gradients vanish (saturated or quantised). "
            "Mend that, or set health to false."
        )


def check_learning(metrics: Sequence[dict[str, Any]], classes: int, recipe: Recipe) -> None:
    """Raises HealthError if the clean validation accuracy was at chance level in the last two epochs."""
    if recipe.health and len(metrics) > 1 and all(entry["clean"] <= CHANCE / classes for entry in metrics[-2:]):
        raise HealthError(
            f"The clean validation accuracy stayed at chance level ({100 * metrics[-1]['clean']:.1f} %) for two "
            "epochs. Likely cause: a learning rate far too high or low, labels that do not match the images, or an "
            "eps given in the wrong unit. Mend that, or set health to false."
        )
