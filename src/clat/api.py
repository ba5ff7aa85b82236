"""The public names, gathered from the modules that define them; ``clat`` offers them."""

# ruff: noqa: F401 (clat/__init__.py lists what is public)

from clat.checkpoint import export_weights, load_checkpoint, save_checkpoint
from clat.criticality import LayerScore, criticality, top
from clat.data.arrays import as_dataset
from clat.data.dataset import Dataset
from clat.data.loading import load_data
from clat.errors import InputError
from clat.evaluation.accuracy import Accuracy, Result
from clat.evaluation.evaluate import evaluate
from clat.evaluation.trust import Check, Finding, Verdict, trust
from clat.layers import layers
from clat.models import build_model
from clat.objectives import Clat, Clean, FastAt, FreeAt, GradAlign, Mart, PgdAt, Score, Trades
from clat.objectives.base import Objective
from clat.threat import Threat, ascend, attack_output
from clat.training.awp import Awp
from clat.training.health import HealthError
from clat.training.integrity import IntegrityError, LayerStatus, status
from clat.training.loop import train
from clat.training.method import CLAT, Method
from clat.training.recipe import Recipe
from clat.training.runs import Run
from clat.tuners import ConvLora, Critical, Rift, Selection, Whole
from clat.tuners.base import Tuner
