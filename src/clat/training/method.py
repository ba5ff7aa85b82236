"""A method put to one network: what Algorithm 1 does to it, step by step."""

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clat.compute import Precision, autocast
from clat.criticality import LayerScore
from clat.errors import InputError
from clat.features import observe
from clat.inputs import annotations, check_seed, fit, nearest, shown
from clat.network import Images, Labels, State, check_images, held, snapshot, whole_labels
from clat.objectives import Clat, Objective
from clat.threat import Threat, fraction, no_overwriting
from clat.training.awp import Awp
from clat.training.integrity import LayerStatus, status, verify
from clat.tuners import Critical, Selection, Tuner
from clat.tuners.base import Batch


class Method:
    """An objective x a tuner x a threat model on one network: select, attack, cost, update, verify.

    The training loop is built on it, and so is a loop of your own, as ``CLAT`` shows for the paper's method.

    Args:
        model: takes pixels in [0, 1] (batch, channel, height, width), returns class scores (batch, classes)
        seed: of a random ranking
        precision: of attack and loss; parameters stay fp32
    Raises:
        InputError: no network, or a wrapper around one
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        tuner: Tuner,
        threat: Threat,
        *,
        seed: int = 0,
        precision: Precision = "fp32",
    ):
        if isinstance(model, DistributedDataParallel):
            raise InputError(
                "Give the bare network, select, then wrap it and pass the wrapper to loss as through=: one that was "
                "made before the selection does not average the right gradients."
            )
        if not isinstance(model, nn.Module):
            raise InputError(f"A method needs a torch.nn.Module; got {type(model).__name__}.")
        if next(model.parameters(), None) is None:
            raise InputError(f"{type(model).__name__} has no parameters, so there is nothing to train.")
        self.model, self.objective, self.tuner = model, objective, tuner
        self.threat = fit("threat", threat, Threat)
        self.seed, self.precision = fit("seed", seed, int), precision
        check_seed("seed", self.seed)
        self.selection: Selection | None = None
        self.selections = 0
        self._before: State = {}  # the network when it was last verified
        self.start = _frozen_copy(model) if objective.learns_from_start() else None  # as the run began
        self._running = objective
        self._classes: int | None = None  # of the network's outputs, once it has run
        self._through: tuple[nn.Module | None, int] = (None, 0)  # the last wrapper, and the selection it was made under

    # Algorithm 1, lines 4 to 10

    def select(self, x: Images, y: Labels, *, unseen: Batch | None = None) -> list[nn.Parameter]:
        """Chooses what trains on a batch of images, freezes the rest, and returns the parameters that train.

        Args:
            unseen: images and labels that are not trained on, for a tuner that compares with such
        Raises:
            InputError: images outside [0, 1], labels that the network has no output for, or too few layers for k
        """
        x, y = self._batch(x, y)
        unseen = None if unseen is None else self._batch(*unseen)
        parameters = self.take(self.choose(x, y, self.selections + 1, unseen=unseen))
        self.selections += 1
        return parameters

    def choose(self, x: Images, y: Labels, epoch: int, *, unseen: Batch | None = None) -> Selection:
        """The tuner's decision before an epoch (from 1) on a batch of images. The network stays as it is."""
        self.mark()
        more = {} if unseen is None else {"unseen": unseen}  # only tuners that ask for such images take them
        return self.tuner.select(self.model, x, y, self.threat, epoch=epoch, seed=self.seed, **more)

    def take(self, selection: Selection) -> list[nn.Parameter]:
        """Puts a selection into effect, such as one from a run folder; returns the parameters that train."""
        self.tuner.begin(self.model, selection, seed=self.seed)
        parameters = selection.apply(self.model)
        for parameter in self.model.parameters():
            parameter.grad = None
        self.selection = selection
        # What the tuner added is new, and what it took away is no longer there.
        self._before = {name: self._before.get(name, tensor) for name, tensor in snapshot(self.model).items()}
        self.begin()
        return parameters

    def begin(self) -> None:
        """Begins an epoch: an objective that remembers something from batch to batch forgets it."""
        self._running = self.objective.begin(self.start)

    # Lines 13 to 15

    def attack(self, x: Images, y: Labels, *, threat: Threat | None = None) -> Images:
        """The images to train on, inside the ball and [0, 1].

        Args:
            threat: for this batch in place of the method's own, with the same ball
        """
        with autocast(x.device, self.precision):
            x_adv = self._running.perturb(self.model, x, y, self.threat if threat is None else threat)
        return x if x_adv is x else self.threat.project(x_adv, x)

    def terms(self, x: Images, x_adv: Images, y: Labels, *, through: nn.Module | None = None) -> dict[str, Tensor]:
        """The weighted terms of the loss, by name. Frozen layers run in eval mode, whatever the caller set."""
        with self._selected().mode(self.model), autocast(x.device, self.precision):
            return self._running.loss(self.model if through is None else through, x, x_adv, y)

    def loss(self, x: Images, y: Labels, *, through: nn.Module | None = None) -> Tensor:
        """Attacks a batch and returns the loss, a scalar to call ``backward`` on (Eq. 9 for CLAT).

        Args:
            through: the network as DistributedDataParallel wrapped it after the last selection
        Raises:
            InputError: no selection yet, a batch that ``select`` would refuse, or a wrapper from before the selection
        """
        self._selected()
        x, y = self._batch(x, y)
        if through is not None:
            self._check_wrapper(through)
        return torch.stack(list(self.terms(x, self.attack(x, y), y, through=through).values())).sum()

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        x: Images,
        x_adv: Images,
        y: Labels,
        *,
        awp: Awp | None = None,
        clip: float | None = None,
        share: Callable[[list[nn.Parameter]], None] = lambda _: None,
    ) -> dict[str, Tensor]:
        """One step of the optimizer on attacked images; returns the terms of the loss, detached.

        Args:
            awp: perturb the weights for this step
            clip: largest norm of the gradient
            share: averages the gradients of these parameters over processes
        """
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

        def backward() -> dict[str, Tensor]:
            with autocast(x.device, self.precision):
                terms = self.terms(x, x_adv, y)
                loss = torch.stack(list(terms.values())).sum()
            with no_overwriting():
                loss.backward()
            share(parameters)
            return {name: term.detach() for name, term in terms.items()}

        with awp.weights(self.model, backward) if awp else nullcontext():
            terms = backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return terms

    # After an epoch

    def verify(self) -> None:
        """Raises IntegrityError unless, since the last call, what is frozen stayed and each selected weight moved."""
        verify(self.model, self._selected(), self._before)
        self.mark()

    def mark(self) -> None:
        """Remembers the network as it is now; the next ``verify`` compares with it."""
        self._before = snapshot(self.model)

    def state_dict(self) -> dict[str, Any]:
        """What a loop needs to continue after a stop, as plain values: last selection, their count, the seed."""
        selection = None if self.selection is None else self.selection.to_json()
        return {"selection": selection, "selections": self.selections, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[nn.Parameter]:
        """Puts back what ``state_dict`` returned and returns the parameters that train (none before a selection).

        Load the network's own ``state_dict`` first: the next ``verify`` compares with the weights as they are now.

        Raises:
            InputError: no such state, or one of another network
        """
        try:
            seed, number, entry = (state[key] for key in ("seed", "selections", "selection"))
            selection = None if entry is None else Selection.from_json(entry)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(
                f"This is no state of such a loop ({shown(error)}); give what state_dict returned."
            ) from error
        seed, number = fit("seed", seed, int), fit("selections", number, int)
        known = {name for name, _ in self.model.named_parameters()}
        unknown = [] if selection is None else [name for name in selection.trainable if name not in known]
        if unknown:
            raise InputError(f"The state is of another network: this one has no parameter {shown(unknown[0])}.")
        self.seed, self.selections, self.selection = seed, number, None
        self.mark()
        return [] if selection is None else self.take(selection)

    def status(self) -> list[LayerStatus]:
        """Each layer as trained, frozen or irregular."""
        return status(self.model)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the selected layers, most critical first."""
        return self._selected().layers

    @property
    def scores(self) -> tuple[LayerScore, ...]:
        """What the last selection measured of every layer; under ``CLAT`` its criticality."""
        return self._selected().scores

    def _selected(self) -> Selection:
        if self.selection is None:
            raise InputError("No layers are selected yet; call select(x, y) first.")
        return self.selection

    def _batch(self, x: Images, y: Labels) -> tuple[Images, Labels]:
        """The batch as the network takes it."""
        check_images(x)
        if x.dtype == torch.float64 and all(p.dtype != torch.float64 for p in self.model.parameters()):
            x = x.float()
        if self._classes is None:
            with held(self.model), torch.no_grad():
                scores = observe(self.model, x[:1], {}, lambda *_: None)
            assert scores is not None  # it ran to the end
            self._classes = scores.shape[1]
        return x, whole_labels(y, x, self._classes)

    def _check_wrapper(self, through: nn.Module) -> None:
        if getattr(through, "module", None) is not self.model:
            raise InputError("The wrapper given as through= does not hold the network that the method was given.")
        last, number = self._through
        if last is through and number != self.selections:
            raise InputError(
                "The wrapper is from before the last selection; wrap the network anew after each selection."
            )
        self._through = through, self.selections


def _frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the network as it is now, in eval mode; it does not change while the network trains."""
    return copy.deepcopy(model).eval().requires_grad_(False)


class CLAT(Method):
    """Selects critical layers and computes the loss of Eq. 9; you own the loop and the optimizer.

    >>> clat = CLAT(model, k=1, eps="8/255")
    >>> for epoch in range(epochs):
    ...     if epoch % 10 == 0:
    ...         optimizer = SGD(clat.select(x, y), lr=0.01)  # ranks, freezes, returns what trains
    ...     for x, y in loader:
    ...         loss = clat.loss(x, y)
    ...         optimizer.zero_grad(), loss.backward(), optimizer.step()
    ...     clat.verify()  # raises IntegrityError if a frozen tensor moved or a selected weight did not

    Modes need no care: while the loss is computed, frozen layers run in eval mode whatever ``model.train()`` set.
    Passes of your own through the network belong in ``model.eval()``, or they move the buffers of frozen BatchNorm.

    Batches are float images and integer labels of any width; float64 images become float32 unless the network has
    float64 parameters. Layers that you froze before (``requires_grad`` False) stay frozen and are not selected.

    On several processes, select on the bare network, on the same images and random numbers in each process; then wrap,
    again after every selection, because DistributedDataParallel averages what trained when it was made::

        parameters = clat.select(x, y)
        ddp = DistributedDataParallel(model, broadcast_buffers=False)
        loss = clat.loss(x, y, through=ddp)

    Layers have their names in ``model`` as given: under ``torch.compile(model)`` they begin with ``_orig_mod.``.

    To resume after a stop, save the network, ``clat.state_dict()``, the optimizer and ``torch.get_rng_state()``, which
    the attacks draw from; load the network first, then ``optimizer = SGD(clat.load_state_dict(state), lr=0.01)``.
    With ``teacher``, give CLAT the network that the loop began with, and load the saved one into it afterwards.

    Args:
        model: takes pixels in [0, 1] (batch, channel, height, width), returns class scores (batch, classes)
        k: how many layers train (an int), or which share of them (a float up to 1.0, all)
        eps: radius of the l-infinity ball; a number or text such as 8/255
        step: length of an attack step; default the paper's share of eps, 7/30
        steps: attack steps
        threat: the whole threat model, instead of eps, step and steps
        seed: of the random ranking, where that is chosen
        options: keys of the objective (``Clat``: weight, cross_entropy, attack, distance, teacher) and of the tuner
            (``Critical``: layers, ranking, norm, at, head, norm_affine, norm_statistics)
    Raises:
        InputError: a value out of range or an unknown key
    """

    def __init__(
        self,
        model: nn.Module,
        k: int | float = 1,
        eps: float | str = 0.03,
        *,
        step: float | str | None = None,
        steps: int = 10,
        threat: Threat | None = None,
        seed: int = 0,
        **options: Any,
    ):
        if threat is None:
            threat = Threat(eps=eps, step=fraction(eps) * 7 / 30 if step is None else step, steps=steps)
        of_a_trainer = {"k", "every", "batch", "optimizer_state", "lr_schedule"}  # your loop decides these
        keys = {"clat": annotations(Clat), "critical": annotations(Critical)}
        known = sorted({*keys["clat"], *keys["critical"]} - of_a_trainer)
        for key in options:
            if key not in known:
                raise InputError(f"CLAT has no option {key!r}; it has {', '.join(known)}.{nearest(key, known)}")
        objective = replace(Clat(), **{key: options[key] for key in options if key in keys["clat"]})
        tuner = replace(Critical(k=k), **{key: options[key] for key in options if key in keys["critical"]})
        super().__init__(model, objective, tuner, threat, seed=seed)
