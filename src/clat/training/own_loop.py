"""A method in a training loop of your own, and the paper's: ``CLAT``."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clat.compute import Precision
from clat.criticality import LayerScore
from clat.errors import InputError
from clat.evaluation.fits import warn_of_probabilities
from clat.features import observe
from clat.inputs import annotations, fit, fraction, nearest, shown
from clat.network import Images, Labels, check_images, held, learnable_labels, whole_labels
from clat.objectives import Clat, Objective
from clat.threat import Threat
from clat.training.integrity import LayerStatus, status
from clat.training.method import Method
from clat.tuners import Critical, Selection, Tuner
from clat.tuners.base import Batch


class OwnLoop(Method):
    """An objective x a tuner x a threat model on one network, for a training loop that you write.

    Batches are checked before they are used. ``CLAT``, which is this with the paper's method, shows how a loop goes.

    Args:
        model, objective, tuner, threat, seed, precision, recompute: as for ``Method``
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
        recompute: bool = False,
    ):
        if isinstance(model, DistributedDataParallel):
            raise InputError(
                "Give the bare network, select, then wrap it and pass the wrapper to loss as through=: one that was "
                "made before the selection does not average the right gradients."
            )
        super().__init__(model, objective, tuner, threat, seed=seed, precision=precision, recompute=recompute)
        self.selections = 0
        self._classes: int | None = None  # of the network's outputs, once it has run
        self._through: tuple[nn.Module | None, int] = (None, 0)  # the last wrapper, and the selection it was made under

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

    def loss(self, x: Images, y: Labels, *, through: nn.Module | None = None) -> Tensor:
        """Attacks a batch and returns the loss, a scalar to call ``backward`` on (Eq. 9 for CLAT).

        Args:
            y: labels; or what each class counts for each image, float (batch, classes), as mixup makes them, for an
                objective that takes such
            through: the network as DistributedDataParallel wrapped it after the last selection
        Raises:
            InputError: no selection yet, a batch that ``select`` would refuse, or a wrapper from before the selection
        """
        self._selected()
        x, y = self._batch(x, y, soft=self.objective.takes_soft_labels())
        if through is not None:
            self._check_wrapper(through)
        return torch.stack(list(self.terms(x, self.attack(x, y), y, through=through).values())).sum()

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

    def _batch(self, x: Images, y: Labels, *, soft: bool = False) -> tuple[Images, Labels]:
        """The batch as the network takes it."""
        check_images(x)
        if x.dtype == torch.float64 and all(p.dtype != torch.float64 for p in self.model.parameters()):
            x = x.float()
        if self._classes is None:
            with held(self.model), torch.no_grad():
                scores = observe(self.model, x[:1], {}, lambda *_: None)
            assert scores is not None  # it ran to the end
            warn_of_probabilities(scores)
            self._classes = scores.shape[1]
        return x, (learnable_labels if soft else whole_labels)(y, x, self._classes)

    def _check_wrapper(self, through: nn.Module) -> None:
        if getattr(through, "module", None) is not self.model:
            raise InputError("The wrapper given as through= does not hold the network that the method was given.")
        last, number = self._through
        if last is through and number != self.selections:
            raise InputError(
                "The wrapper is from before the last selection; wrap the network again after each selection."
            )
        self._through = through, self.selections


class CLAT(OwnLoop):
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
