"""Criticality-Leveraged Adversarial Training (arXiv 2408.10204): find a network's critical layers, train only these.

The objectives and tuners are in ``clat.objectives`` and ``clat.tuners``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clat import objectives, tuners
    from clat.checkpoint import export_weights, load_checkpoint, save_checkpoint
    from clat.criticality import layer_criticality
    from clat.data.arrays import as_dataset
    from clat.data.dataset import Dataset
    from clat.data.loading import load_data
    from clat.errors import InputError
    from clat.evaluation.evaluate import evaluate
    from clat.evaluation.sweep import sweep
    from clat.evaluation.transfer import transfer
    from clat.evaluation.trust import trust
    from clat.layers import find_layers
    from clat.models import build_model
    from clat.threat import Threat, attack_output
    from clat.training.health import HealthError
    from clat.training.integrity import IntegrityError
    from clat.training.own_loop import CLAT, OwnLoop
    from clat.training.recipe import Recipe
    from clat.training.train import train
    from clat.tuners.order import top

__all__ = [
    "CLAT",
    "Dataset",
    "HealthError",
    "InputError",
    "IntegrityError",
    "OwnLoop",
    "Recipe",
    "Threat",
    "as_dataset",
    "attack_output",
    "build_model",
    "evaluate",
    "export_weights",
    "find_layers",
    "layer_criticality",
    "load_checkpoint",
    "load_data",
    "objectives",
    "save_checkpoint",
    "sweep",
    "top",
    "train",
    "transfer",
    "trust",
    "tuners",
]

# The module of each public name. It is imported when the name is first asked for, and torch with it: the command line
# reports a typo without waiting for torch.
MODULES = {
    "CLAT": "training.own_loop",
    "Dataset": "data.dataset",
    "HealthError": "training.health",
    "InputError": "errors",
    "IntegrityError": "training.integrity",
    "OwnLoop": "training.own_loop",
    "Recipe": "training.recipe",
    "Threat": "threat",
    "as_dataset": "data.arrays",
    "attack_output": "threat",
    "build_model": "models",
    "evaluate": "evaluation.evaluate",
    "export_weights": "checkpoint",
    "find_layers": "layers",
    "layer_criticality": "criticality",
    "load_checkpoint": "checkpoint",
    "load_data": "data.loading",
    "save_checkpoint": "checkpoint",
    "sweep": "evaluation.sweep",
    "top": "tuners.order",
    "train": "training.train",
    "transfer": "evaluation.transfer",
    "trust": "evaluation.trust",
}

if not TYPE_CHECKING:  # type checkers are to find names that are misspelt

    def __getattr__(name: str) -> Any:
        if name in ("objectives", "tuners"):
            return import_module(f"clat.{name}")
        if name not in MODULES:
            raise AttributeError(f"module 'clat' has no attribute {name!r}")
        return getattr(import_module(f"clat.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
