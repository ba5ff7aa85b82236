"""A recipe: every setting of a run, as one value. The YAML files in recipes/ hold what differs from the defaults."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from clat.errors import InputError
from clat.inputs import check_fields, check_least, check_seed, check_word
from clat.objectives import OBJECTIVES, Clat, FastAt, FreeAt, GradAlign, Mart, Score, Trades
from clat.objectives.base import Objective
from clat.threat import Threat
from clat.training.averaging import Average
from clat.training.awp import Awp
from clat.training.extra import Extra
from clat.training.recipe_files import recipe_path as recipe_path
from clat.tuners import TUNERS, ConvLora, Critical, Rift
from clat.tuners.base import Tuner


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of a run.

    The keys of an objective or tuner stand under its name, with underscores for dashes.

    Args:
        objective: how a batch is attacked and what it costs
        tuner: which parameters train
        threat: threat model of the training attack
        warm_start: start each attack where the last epoch's attack on the same image ended, carried through crop and
            flip; threat.start is then for images that no epoch had
        trades: keys of the objective trades
        mart: keys of the objective mart
        score: keys of the objective score
        fast_at: keys of the objective fast-at
        free_at: keys of the objective free-at
        grad_align: keys of the objective grad-align
        clat: keys of the objective clat
        critical: keys of the tuner critical
        rift: keys of the tuner rift
        convlora: keys of the tuner convlora
        awp: adversarial weight perturbation around each training step; none if not given
        average: averaged weights, which then are what is validated and saved as the best; none if not given
        extra: a second data set in each batch; none if not given
        epochs: passes over the training images
        batch_size: images a step, over all processes
        optimizer: sgd or adamw
        lr: initial learning rate; of a cyclic schedule the highest
        schedule: cosine (to zero at the end), constant, step (a tenth from each milestone on) or cyclic (straight
            from zero to lr and back to zero)
        milestones: epochs, counted from 1, that a step schedule lowers the learning rate before
        peak: share of the run after which a cyclic schedule reaches lr
        momentum: of sgd
        cycle_momentum: lower the momentum by up to 0.1 as a cyclic schedule raises the learning rate
        nesterov: of sgd
        weight_decay: on the parameters that train
        decay: which of them: all, no_norm (not the scale and shift of normalisations) or kernels (only tensors of more
            than one dimension)
        clip: largest norm of the gradient; none if not given
        precision: bf16 (autocast, parameters stay fp32) or fp32, in training and validation; auto is bf16 where the
            device computes in it natively, else fp32
        layout: of the kernels while the network trains: default (torch's) or channels-last; auto is channels-last on
            CPUs and CUDA if the network bears it. What auto stands for is in the run's recipe.yaml, which repeats it
        compile: compile the network with torch.compile, in attacks, loss and validation; passes that features are
            observed in run uncompiled. The first steps of a run take up to a minute longer
        augment: crop (4 pixels of padding) and flip each training image at random
        images: train on this many images, drawn by holdout_seed; all that are not held out if not given
        holdout: training images held out for validation, the only thing that checkpoints are chosen on
        holdout_seed: draws the held-out images; keep it from training to fine-tuning
        validation_steps: PGD steps of the robust validation accuracy
        select_by: the validation accuracy that makes a checkpoint the best
        health: stop at chance-level accuracy and at perturbations far below eps
        seed: of everything random in the run except the held-out images
    """

    objective: str = "pgd-at"
    tuner: str = "whole"
    threat: Threat = field(default_factory=Threat)
    warm_start: bool = False
    trades: Trades = field(default_factory=Trades)
    mart: Mart = field(default_factory=Mart)
    score: Score = field(default_factory=Score)
    fast_at: FastAt = field(default_factory=FastAt)
    free_at: FreeAt = field(default_factory=FreeAt)
    grad_align: GradAlign = field(default_factory=GradAlign)
    clat: Clat = field(default_factory=Clat)
    critical: Critical = field(default_factory=Critical)
    rift: Rift = field(default_factory=Rift)
    convlora: ConvLora = field(default_factory=ConvLora)
    awp: Awp | None = None
    average: Average | None = None
    extra: Extra | None = None
    epochs: int = 50
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    schedule: Literal["cosine", "constant", "step", "cyclic"] = "cosine"
    milestones: tuple[int, ...] = ()
    peak: float = 0.5
    momentum: float = 0.9
    cycle_momentum: bool = False
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay: Literal["all", "no_norm", "kernels"] = "all"
    clip: float | None = None
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    layout: Literal["auto", "default", "channels-last"] = "auto"
    compile: bool = False
    augment: bool = True
    images: int | None = None
    holdout: int = 1000
    holdout_seed: int = 0
    validation_steps: int = 10
    select_by: Literal["robust", "clean"] = "robust"
    health: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_word("objective", self.objective, OBJECTIVES)
        check_word("tuner", self.tuner, TUNERS)
        for name in (*OBJECTIVES, *TUNERS):
            keys = self._keys(name)
            if name not in (self.objective, self.tuner) and keys is not None and keys != type(keys)():
                raise InputError(f"{_field(name)} keys are given, but the recipe does not use {name}; remove them.")
        if self.warm_start and (self.objective in ("clean", "free-at") or self.clat.attack == "latent"):
            raise InputError(
                "warm_start needs an objective that attacks pixels; not clean, free-at or a latent attack."
            )
        if self.warm_start and self.extra is not None:
            raise InputError("warm_start works without extra, whose images are drawn anew in each epoch.")
        check_least(self, 1, "epochs", "batch_size", "images", "holdout")
        check_least(self, 0, "validation_steps", "weight_decay")
        for key in ("lr", "clip"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise InputError(f"{key} is {value}; it must be above 0.")
        for key in ("seed", "holdout_seed"):
            check_seed(key, getattr(self, key))
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum is {self.momentum}; it must be 0 or more and below 1.")
        if self.nesterov and self.optimizer == "sgd" and self.momentum == 0:
            raise InputError("nesterov needs a momentum above 0.")
        if any(later <= earlier for earlier, later in zip((0, *self.milestones), self.milestones, strict=False)):
            raise InputError(
                f"milestones are {list(self.milestones)}; give epochs from 1 on, each above the one before."
            )
        if (self.schedule == "step") != bool(self.milestones):
            raise InputError(
                f"schedule is {self.schedule} and milestones are {list(self.milestones)}; a step schedule needs "
                "milestones and no other takes them."
            )
        if not 0 < self.peak < 1:
            raise InputError(f"peak is {self.peak}; it is the share of the run, between 0 and 1, before the peak.")
        if self.cycle_momentum and (self.schedule != "cyclic" or self.optimizer != "sgd" or self.momentum <= 0.1):
            raise InputError("cycle_momentum needs schedule cyclic and optimizer sgd with a momentum above 0.1.")

    def make_objective(self) -> Objective:
        """A new objective at each call, so that one that carries something along starts without it."""
        keys = self._keys(self.objective)
        return OBJECTIVES[self.objective]() if keys is None else replace(keys)

    def make_tuner(self) -> Tuner:
        return self._keys(self.tuner) or TUNERS[self.tuner]()

    def _keys(self, name: str) -> Any:
        """The objective or tuner of that name as the recipe's keys make it; None if it has no keys."""
        return getattr(self, _field(name), None)


def _field(name: str) -> str:
    return name.replace("-", "_")
