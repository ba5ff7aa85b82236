"""The public names, gathered from the modules that define them; ``clat`` offers them."""

# ruff: noqa: F401 (clat/__init__.py lists what is public)

from clat.arrays import as_dataset
from clat.awp import Awp
from clat.checkpoint import export_weights, load_checkpoint, save_checkpoint
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
