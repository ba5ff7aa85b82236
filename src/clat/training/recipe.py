"""A recipe: every setting of a run, as one value. The YAML files in recipes/ hold what differs from the defaults."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from torch import Tensor

from clat.data.varying import SMALL, Policy, PolicyName
from clat.errors import InputError
from clat.inputs import (
    annotations,
    build,
    built,
    check_fields,
    check_keys,
    check_least,
    check_seed,
    check_word,
    fraction,
    shown,
)
from clat.objectives import OBJECTIVES, Objective, PgdAt
from clat.text import plain
from clat.threat import Threat
from clat.training.averaging import Average
from clat.training.awp import Awp
from clat.training.extra import Extra
from clat.training.recipe_files import recipe_path as recipe_path
from clat.tuners import TUNERS, Tuner, Whole

METHODS: dict[str, Mapping[str, type[Objective] | type[Tuner]]] = {"objective": OBJECTIVES, "tuner": TUNERS}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of a run: ``Recipe(objective=Trades(beta=6), tuner=Critical(k=2), epochs=50)``.

    A file or the command line names the objective and the tuner, and gives their keys under that name, with underscores
    for dashes: ``objective: trades``, ``trades: {beta: 6}``. In Python, they may be of a class of your own.

    Args:
        objective: how a batch is attacked and what it costs
        tuner: which parameters train
        threat: threat model of the training attack
        warm_start: start each attack where the last epoch's attack on the same image ended, carried through crop and
            flip; threat.start is then for images that no epoch had
        awp: adversarial weight perturbation around each training step; none if not given
        average: averaged weights, which then are what is validated, saved as the best, and saved after each epoch in
            averaged.safetensors beside the raw last; none if not given
        extra: a second data set in each batch; none if not given
        epochs: passes over the training images
        patience: end the run after this many epochs without a new best checkpoint; none to train all epochs
        batch_size: images a step, over all processes
        accumulate: parts that each process divides its share of a batch into, so that less memory suffices; attacks and
            gradients are made part by part, then the weights move once. BatchNorm in training mode sees parts in place
            of batches
        optimizer: sgd or adamw
        lr: initial learning rate; of a cyclic schedule the highest
        schedule: cosine (to zero at the end), constant, step (a tenth from each milestone on) or cyclic (straight
            from zero to lr and back to zero)
        warmup: epochs that the learning rate rises from zero to its schedule in, after each restart of it too
        milestones: epochs, counted from 1, that a step schedule lowers the learning rate before
        peak: share of the run after which a cyclic schedule reaches lr
        momentum: of sgd
        cycle_momentum: lower the momentum by up to 0.1 as a cyclic schedule raises the learning rate
        nesterov: of sgd
        weight_decay: on the parameters that train
        decay: which of them: all, no_norm (not the scale and shift of normalisations) or kernels (only tensors of more
            than one dimension)
        clip: largest norm of the gradient; none if not given
        label_smoothing: share of each label that the loss spreads evenly over all classes; attacks keep the label
        class_weights: what an image counts in the loss: equal, or balanced, by the inverse of how many training images
            its class has, with mean 1 over the training images; attacks and accuracies are not weighted
        mixup: alpha: each training image is mixed with another of its batch before the attack, in shares drawn from
            Beta(alpha, alpha), and so is its label (Zhang et al. 2018); 0 for none. Accuracies are of unmixed images
        precision: bf16 (autocast, parameters stay fp32) or fp32, in training and validation; auto is bf16 where the
            device computes in it natively, else fp32
        layout: of the kernels while the network trains: contiguous (as torch makes them) or channels-last; auto is
            channels-last on CPUs and CUDA if the network works with it. The run's recipe.yaml holds what auto became
        recompute: keep only the inputs of a network's blocks for the gradient, in attacks and loss, and compute the
            blocks again (activation checkpointing): less memory, more time, the same numbers
        compile: compile the network with torch.compile, in attacks, loss and validation; passes that features are
            observed in run uncompiled. The first steps of a run take up to a minute longer
        augment: what training images go through at random: padded-crop (4 pixels of padding, crop and flip),
            resized-crop (8 to 100 % of the area, resized, and flip), true (padded-crop for images of up to 64 pixels
            and with warm_start, else resized-crop) or false; in Python also your own function, which is given a uint8
            image (channel, height, width) and returns one, and draws from torch's random numbers
        images: train on this many images, drawn by holdout_seed; all that are not held out if not given
        holdout: training images held out for validation, the only thing that checkpoints are chosen on
        holdout_seed: draws the held-out images; keep it from training to fine-tuning
        train_sample: training images that are measured after each epoch as the held-out ones are, without augmentation,
            to tell how much better the network fits what it learns from; at most as many as are held out, 0 for none
        validation_steps: PGD steps of the robust validation accuracy, in threat's norm
        validation_eps: eps of the robust validation accuracy; threat.eps if not given
        validation_step: length of its steps; if not given threat.step, or a quarter of eps where the training attack
            has one step
        select_by: the validation accuracy that makes a checkpoint the best
        health: stop at chance-level accuracy and at perturbations far below eps
        seed: of everything random in the run except the held-out images
    """

    objective: Objective = field(default_factory=PgdAt)
    tuner: Tuner = field(default_factory=Whole)
    threat: Threat = field(default_factory=Threat)
    warm_start: bool = False
    awp: Awp | None = None
    average: Average | None = None
    extra: Extra | None = None
    epochs: int = 50
    patience: int | None = None
    batch_size: int = 128
    accumulate: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    schedule: Literal["cosine", "constant", "step", "cyclic"] = "cosine"
    milestones: tuple[int, ...] = ()
    peak: float = 0.5
    warmup: int = 0
    momentum: float = 0.9
    cycle_momentum: bool = False
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay: Literal["all", "no_norm", "kernels"] = "all"
    clip: float | None = None
    label_smoothing: float = 0.0
    class_weights: Literal["equal", "balanced"] = "equal"
    mixup: float = 0.0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    layout: Literal["auto", "contiguous", "channels-last"] = "auto"
    recompute: bool = False
    compile: bool = False
    augment: bool | PolicyName | Callable[[Tensor], Tensor] = True
    images: int | None = None
    holdout: int = 1000
    holdout_seed: int = 0
    train_sample: int = 500
    validation_steps: int = 10
    validation_eps: float | str | None = None
    validation_step: float | str | None = None
    select_by: Literal["robust", "clean"] = "robust"
    health: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _check_method("objective", self.objective, Objective, "Trades(beta=6)")
        _check_method("tuner", self.tuner, Tuner, "Critical(k=2)")
        if _section(self.objective) == _section(self.tuner):
            raise InputError(f"Objective and tuner are both called {self.tuner.name}; give one of them another name.")
        check_fields(self)
        if self.warm_start and not self.objective.attacks_pixels():
            raise InputError(f"warm_start needs an objective that attacks pixels, and {self.objective.name} does not.")
        if self.warm_start and self.augment not in (True, False, "padded-crop"):
            raise InputError("warm_start works with augment padded-crop or false, which it can undo.")
        if self.warm_start and self.extra is not None:
            raise InputError("warm_start works without extra, whose images are drawn again in each epoch.")
        if self.warm_start and self.mixup:
            raise InputError("warm_start works without mixup, which mixes other images in each epoch.")
        check_least(1, epochs=self.epochs, batch_size=self.batch_size, accumulate=self.accumulate)
        check_least(1, patience=self.patience, images=self.images, holdout=self.holdout)
        check_least(0, train_sample=self.train_sample, validation_steps=self.validation_steps, warmup=self.warmup)
        check_least(0.0, weight_decay=self.weight_decay, mixup=self.mixup)
        if self.accumulate > 1 and self.objective.carries():
            raise InputError(
                f"accumulate works without {self.objective.name} as it is set here, which carries a perturbation from "
                "the attack on a whole batch to its loss."
            )
        if self.recompute and self.compile:
            raise InputError("recompute works without compile; set one of them to false.")
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
        if self.warmup and self.schedule == "cyclic":
            raise InputError("warmup works without the schedule cyclic, which rises from zero itself; see peak.")
        _check_validation(self)
        _check_labels(self)
        self.keys()  # what cannot be recorded is refused here, before it trains

    @property
    def validation_threat(self) -> Threat:
        """The attack of the robust validation accuracy."""
        eps = self.threat.radius if self.validation_eps is None else float(self.validation_eps)
        # The single step of a one-step attack is about as long as the radius, too long for an attack of several steps.
        step = self.threat.step if self.threat.steps > 1 else eps / 4
        if self.validation_step is not None:
            step = self.validation_step
        return Threat(eps=eps, step=step, norm=self.threat.norm, steps=self.validation_steps)

    def keys(self) -> dict[str, Any]:
        """The recipe as a file holds it: names, numbers, texts, lists and mappings of these."""
        found: dict[str, Any] = {}
        for key in annotations(Recipe):
            value = getattr(self, key)
            if key == "augment" and callable(value):
                value = _called(value)
            found[key] = value.name if key in METHODS else _plain(key, value)
            if key == "threat":
                methods = (self.objective, self.tuner)
                found |= {_section(each): _plain(_section(each), each) for each in methods if annotations(type(each))}
        return found

    def augmentation(self, shape: tuple[int, ...]) -> bool | PolicyName | Policy:
        """What ``augment`` means for images (channel, height, width): never true."""
        if self.augment is not True:
            return self.augment
        return "padded-crop" if self.warm_start or max(shape[1:]) <= SMALL else "resized-crop"

    @classmethod
    def from_keys(cls, keys: Mapping[str, Any], *, like: "Recipe | None" = None) -> "Recipe":
        """The recipe that ``keys()`` or a file describes; what is left out has its default.

        Args:
            like: a recipe whose objective, tuner and augment may be named, too, where they are your own
        Raises:
            InputError: an unknown key, a value that does not fit, or keys of an objective or tuner that is not used
        """
        if not isinstance(keys, Mapping):
            raise InputError(f"A recipe is {shown(keys)}; it must be keys and values.")
        check_keys(keys, recipe_keys(like))
        values: dict[str, Any] = {}
        for kind, classes in _classes(like).items():
            name = keys.get(kind, cls().keys()[kind])
            check_word(kind, name, classes)
            for each in classes.values():
                section = _section(each)
                if each is classes[name]:
                    values[kind] = build(each, keys.get(section, {}), section)
                elif section in keys and build(each, keys[section], section) != build(each, {}, section):
                    raise InputError(f"{section} keys are given, but the recipe does not use {each.name}; remove them.")
        for key, annotation in annotations(cls).items():
            if key in keys and key not in METHODS:
                values[key] = built(key, keys[key], annotation)
        if like is not None and callable(like.augment) and values.get("augment") == _called(like.augment):
            values["augment"] = like.augment
        return cls(**values)


def recipe_keys(like: Recipe | None = None) -> dict[str, Any]:
    """The type of every key that a recipe file may have: names, a block for each method that has keys, and the rest."""
    found: dict[str, Any] = {}
    for key, annotation in annotations(Recipe).items():
        found[key] = str if key in METHODS else annotation
        if key == "threat":
            every = (each for classes in _classes(like).values() for each in classes.values())
            found |= {_section(each): each for each in every if annotations(each)}
    return found


def _classes(like: Recipe | None) -> dict[str, dict[str, Any]]:
    """The objectives and the tuners by name."""
    if like is None:
        return {kind: dict(known) for kind, known in METHODS.items()}
    own: dict[str, Objective | Tuner] = {"objective": like.objective, "tuner": like.tuner}
    return {kind: {**known, own[kind].name: type(own[kind])} for kind, known in METHODS.items()}


def _check_method(kind: str, method: Any, base: type[Objective] | type[Tuner], example: str) -> None:
    """Raises InputError unless an objective or tuner can be trained with and recorded."""
    owner: type = type(method)
    if not isinstance(method, base):
        raise InputError(f"{kind} is {shown(method)}; give one such as {example}.")
    if not is_dataclass(method) or not method.__dataclass_params__.frozen:
        raise InputError(
            f"{kind} {owner.__name__} is no frozen dataclass, whose fields a run could record; put "
            "@dataclass(frozen=True, kw_only=True) above the class."
        )
    name, known = method.name, METHODS[kind]
    if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9-]*", name):
        raise InputError(
            f"{kind} {owner.__name__} has the name {shown(name)}; give the class one of small letters, digits and "
            'dashes, e.g. name = "mine".'
        )
    others = {_section(each) for classes in METHODS.values() for each in classes.values() if each is not owner}
    if known.get(name, owner) is not owner or _section(method) in others | annotations(Recipe).keys():
        raise InputError(f"{kind} {owner.__name__} has the name {name}, which clat has for something else; change it.")


def _check_validation(recipe: Recipe) -> None:
    """Makes numbers of the lengths of the validation attack. Raises InputError if it is none."""
    for key in ("validation_eps", "validation_step"):
        given = getattr(recipe, key)
        if given is not None:
            value = fraction(given)
            if not value > 0:
                raise InputError(f"{key} is {value}; it must be a positive number such as 8/255.")
            object.__setattr__(recipe, key, value)
    if recipe.threat.norm == "linf" and float(recipe.validation_eps or 0) > 1:
        said = f"validation_eps is {recipe.validation_eps}, but pixels lie in [0, 1]"
        raise InputError(f"{said}; for 8 grey levels write 8/255.")


def _check_labels(recipe: Recipe) -> None:
    """Raises InputError unless the objective can learn from the labels as the recipe smooths, weighs and mixes them."""
    if not 0 <= recipe.label_smoothing < 1:
        raise InputError(f"label_smoothing is {recipe.label_smoothing}; it must be 0 or more and below 1, e.g. 0.1.")
    changed = {"label_smoothing": recipe.label_smoothing > 0, "class_weights": recipe.class_weights != "equal"}
    changed["mixup"] = recipe.mixup > 0
    for key in (key for key, used in changed.items() if used):
        if not recipe.objective.takes_soft_labels():
            takes = ", ".join(name for name, each in OBJECTIVES.items() if each().takes_soft_labels())
            raise InputError(f"{key} does not go with {recipe.objective.name}; it goes with {takes}.")
    if changed["class_weights"] and recipe.extra is not None:
        raise InputError("class_weights balanced works without extra, whose images are drawn whatever their class is.")


def _called(function: Callable[..., Any]) -> str:
    """How a function of the user's own is named in a run's recipe.yaml."""
    name = getattr(function, "__qualname__", None)
    settings = re.sub(" at 0x[0-9a-f]+", "", repr(function))  # of a transform
    return f"{function.__module__}.{name}" if name else plain(" ".join(settings.split()))


def _section(method: Any) -> str:
    """The key that an objective's or tuner's own keys stand under."""
    return method.name.replace("-", "_")


def _plain(name: str, value: Any) -> Any:
    """A value as YAML and JSON hold it. Raises InputError if they cannot."""
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(f"{name}.{each.name}", getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(name, entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}.{key}", entry) for key, entry in value.items()}
    if value is not None and type(value) not in (bool, int, float, str):
        raise InputError(f"{name} is {shown(value)}, which a recipe file cannot hold; use numbers, texts and lists.")
    return value
