"""Criticality-Leveraged Adversarial Training (arXiv 2408.10204): find a network's critical layers, train only these."""

# ruff: noqa: F403, F405 (the names come from clat/api.py)

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clat.api import *

__all__ = [
    "CLAT",
    "Accuracy",
    "Awp",
    "Check",
    "Clat",
    "Clean",
    "ConvLora",
    "Critical",
    "Dataset",
    "FastAt",
    "Finding",
    "FreeAt",
    "GradAlign",
    "HealthError",
    "InputError",
    "IntegrityError",
    "LayerScore",
    "LayerStatus",
    "Mart",
    "Method",
    "Objective",
    "PgdAt",
    "Recipe",
    "Result",
    "Rift",
    "Run",
    "Score",
    "Selection",
    "Threat",
    "Trades",
    "Tuner",
    "Verdict",
    "Whole",
    "as_dataset",
    "ascend",
    "attack_output",
    "build_model",
    "criticality",
    "evaluate",
    "export_weights",
    "layers",
    "load_checkpoint",
    "load_data",
    "save_checkpoint",
    "status",
    "top",
    "train",
    "trust",
]


class _Package(ModuleType):
    """Imports torch when a public name is first asked for, so that the command line reports a typo at once.

    Some functions are called like the module that they stand in, such as ``train``: the import of that module does not
    take the function's place.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        from clat import api

        self.__dict__.update({public: getattr(api, public) for public in __all__})
        return self.__dict__[name]

    def __setattr__(self, name: str, value: object) -> None:
        if name not in __all__ or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [*self.__dict__, *__all__]


sys.modules[__name__].__class__ = _Package
