"""Criticality-Leveraged Adversarial Training (arXiv 2408.10204): find a network's critical layers, train only these."""

from clat.arrays import as_dataset
from clat.awp import Awp
from clat.criticality import LayerScore, attack_output, criticality, top
from clat.data import Dataset, load_data
from clat.errors import InputError
from clat.evaluate import Accuracy, Result, evaluate
from clat.health import HealthError
from clat.integrity import IntegrityError, LayerStatus, status
from clat.layers import layers
from clat.models import build_model
from clat.objectives import Clat, Clean, FastAt, FreeAt, GradAlign, Mart, Objective, PgdAt, Score, Trades
from clat.own_loop import CLAT
from clat.recipe import Recipe
from clat.runs import Run
from clat.threat import Threat, ascend
from clat.train import train
from clat.trust import Check, Finding, Verdict, trust
from clat.tuners import ConvLora, Critical, Rift, Selection, Tuner, Whole

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
    "layers",
    "load_data",
    "status",
    "top",
    "train",
    "trust",
]
