"""A method put to one network: what Algorithm 1 does to it, step by step."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from clat.compute import Precision, autocast
from clat.criticality import MeanOfAll
from clat.errors import InputError
from clat.inputs import check_seed, fit
from clat.network import Images, Labels, State, check_made, no_overwriting, snapshot
from clat.objectives import Objective
from clat.threat import Threat
from clat.training.awp import Awp
from clat.training.integrity import verify
from clat.training.recompute import blocks_of, recomputed
from clat.tuners import Selection, Tuner
from clat.tuners.base import Batch


class Method:
    """An objective x a tuner x a threat model on one network: choose, take, attack, update, verify.

    The training loop is built on it; ``OwnLoop`` is its form for a loop of your own.

    Args:
        model: takes pixels in [0, 1] (batch, channel, height, width), returns class scores (batch, classes)
        seed: of a random ranking
        precision: of attack and loss; parameters stay fp32
        recompute: keep less of the forward passes and compute it again (activation checkpointing)
    Raises:
        InputError: no network, or one without blocks to recompute
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
        recompute: bool = False,
    ):
        check_made(model)
        if next(model.parameters(), None) is None:
            raise InputError(f"{type(model).__name__} has no parameters, so there is nothing to train.")
        self.model, self.objective, self.tuner = model, objective, tuner
        self.threat = fit("threat", threat, Threat)
        self.seed, self.precision = fit("seed", seed, int), precision
        check_seed("seed", self.seed)
        self._recomputed = blocks_of(model) if recompute else []
        self.selection: Selection | None = None
        self._before: State = {}  # the network when it was last verified
        learns = objective.learns_from_start()
        self.start = copy.deepcopy(model).eval().requires_grad_(False) if learns else None  # as the run began
        self._running = objective  # in this epoch

    # Algorithm 1, lines 4 to 10

    def choose(
        self,
        x: Images,
        y: Labels,
        epoch: int,
        *,
        unseen: Batch | None = None,
        threat: Threat | None = None,
        mean: MeanOfAll | None = None,
    ) -> Selection:
        """The tuner's decision before an epoch (from 1) on a batch of images. The network stays as it is.

        Args:
            threat: in place of the method's own
            mean: where each process has other images: averages over them what a tuner that ``averages`` measures
        """
        self.mark()
        asked = {"unseen": unseen, "mean": mean}  # only tuners that ask for these take them
        more: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        return self.tuner.select(
            self.model, x, y, self.threat if threat is None else threat, epoch=epoch, seed=self.seed, **more
        )

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
        with autocast(x.device, self.precision), recomputed(self._recomputed):
            x_adv = self._running.perturb(self.model, x, y, self.threat if threat is None else threat)
        return x if x_adv is x else self.threat.project(x_adv, x)

    def terms(self, x: Images, x_adv: Images, y: Labels, *, through: nn.Module | None = None) -> dict[str, Tensor]:
        """The weighted terms of the loss, by name. Frozen layers run in eval mode, whatever the caller set."""
        mode, precision = self._selected().mode(self.model), autocast(x.device, self.precision)
        with mode, precision, recomputed(self._recomputed):
            return self._running.loss(self.model if through is None else through, x, x_adv, y)

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        x: Images,
        x_adv: Images,
        y: Labels,
        *,
        parts: int = 1,
        awp: Awp | None = None,
        clip: float | None = None,
        share: Callable[[list[nn.Parameter]], None] = lambda _: None,
    ) -> dict[str, Tensor]:
        """One step of the optimizer on attacked images; returns the terms of the loss, detached.

        Args:
            parts: into so many the batch is divided, whose gradients are added up
            awp: perturb the weights for this step
            clip: largest norm of the gradient
            share: averages the gradients of these parameters over processes
        """
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        whole = (x, x_adv, y)
        divided = [whole] if parts == 1 else list(zip(*(each.tensor_split(parts) for each in whole), strict=True))

        def backward() -> dict[str, Tensor]:
            totals: dict[str, Tensor] = {}
            for images in divided:
                terms = {name: term * (len(images[0]) / len(x)) for name, term in self.terms(*images).items()}
                with no_overwriting():
                    torch.stack(list(terms.values())).sum().backward()
                totals = {name: term.detach() + totals.get(name, 0) for name, term in terms.items()}
            share(parameters)
            return totals

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

    def _selected(self) -> Selection:
        if self.selection is None:
            raise InputError("No layers are selected yet; call select(x, y) first.")
        return self.selection
