"""CLAT for a training loop of your own: no trainer, no run folder, any ``nn.Module``."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clat.criticality import LayerScore
from clat.errors import InputError
from clat.features import observe
from clat.inputs import annotations, check_seed, fit, nearest, shown
from clat.network import Images, Labels, State, check_images, held, snapshot, whole_labels
from clat.objectives import Clat
from clat.threat import Threat, fraction
from clat.training.integrity import LayerStatus, status, verify
from clat.tuners import Critical, Selection


class CLAT:
    """Selects critical layers and computes the loss of Eq. 9; you own the loop and the optimizer.

    >>> clat = CLAT(model, k=1, eps="8/255")
    >>> for epoch in range(epochs):
    ...     if epoch % 10 == 0:
    ...         optimizer = SGD(clat.select(x, y), lr=0.01)  # ranks, freezes, returns what trains
    ...     for x, y in loader:
    ...         loss = clat.loss(x, y)
    ...         optimizer.zero_grad(), loss.backward(), optimizer.step()
    ...     clat.check()  # raises IntegrityError if a frozen tensor moved or a selected weight did not

    Modes need no care: while the loss is computed, frozen layers run in eval mode whatever ``model.train()`` set.
    Passes of your own through the network belong in ``model.eval()``, or they move the buffers of frozen BatchNorm.

    Batches are float images and integer labels of any width; float64 images become float32 unless the network has
    float64 parameters. Layers that you froze before (``requires_grad`` False) stay frozen and are not selected.

    On several processes, select on the bare network, on the same images and random numbers in each process; then wrap,
    anew after every selection, because DistributedDataParallel averages what trained when it was made::

        parameters = clat.select(x, y)
        ddp = DistributedDataParallel(model, broadcast_buffers=False)
        loss = clat.loss(x, y, through=ddp)

    Layers have their names in ``model`` as given: under ``torch.compile(model)`` they begin with ``_orig_mod.``.

    To go on after a stop, save the network, ``clat.state_dict()``, the optimizer and ``torch.get_rng_state()``, which
    the attacks draw from; load the network first, then ``optimizer = SGD(clat.load_state_dict(state), lr=0.01)``.

    Args:
        model: takes pixels in [0, 1] (batch, channel, height, width), returns class scores (batch, classes)
        k: how many layers train (an int), or which share of them (a float up to 1.0, all)
        eps: radius of the l-infinity ball; a number or text such as 8/255
        step: length of an attack step; default the paper's share of eps, 7/30
        steps: attack steps
        threat: the whole threat model, instead of eps, step and steps
        seed: of the random ranking, where that is chosen
        options: keys of the objective (``Clat``: weight, cross_entropy, attack, distance) and of the tuner
            (``Critical``: ranking, norm, at, head, norm_affine, norm_statistics)
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
        if isinstance(model, DistributedDataParallel):
            raise InputError(
                "Give CLAT the bare network, select, then wrap it and pass the wrapper to loss as through=; one from "
                "before the selection averages the wrong gradients."
            )
        if not isinstance(model, nn.Module):
            raise InputError(f"CLAT needs a torch.nn.Module; got {type(model).__name__}.")
        self.model, self.seed = model, fit("seed", seed, int)
        check_seed("seed", self.seed)
        if threat is None:
            threat = Threat(eps=eps, step=fraction(eps) * 7 / 30 if step is None else step, steps=steps)
        self.threat = fit("threat", threat, Threat)
        of_a_trainer = {"k", "every", "batch", "momentum", "learning_rate"}  # your loop decides these
        keys = {"clat": annotations(Clat), "critical": annotations(Critical)}
        known = sorted({*keys["clat"], *keys["critical"]} - of_a_trainer)
        for key in options:
            if key not in known:
                raise InputError(f"CLAT has no option {key!r}; it has {', '.join(known)}.{nearest(key, known)}")
        self.objective = replace(Clat(), **{key: options[key] for key in options if key in keys["clat"]})
        self.tuner = replace(Critical(k=k), **{key: options[key] for key in options if key in keys["critical"]})
        self.selection: Selection | None = None
        self.selections = 0
        self._classes: int | None = None  # of the network's outputs, once it has run
        self._before: State = {}  # the network when it was checked last
        self._through: tuple[nn.Module | None, int] = (None, 0)  # the last wrapper, and the selection it was made under

    def select(self, x: Images, y: Labels) -> list[nn.Parameter]:
        """Ranks the layers on a batch (Algorithm 1, lines 4-9), freezes all others and returns what trains.

        Raises:
            InputError: images outside [0, 1], labels that the network has no output for, or too few layers for k
        """
        self._classes = None
        x, y = self._batch(x, y)
        number = self.selections + 1
        selection = self.tuner.select(self.model, x, y, self.threat, epoch=number, seed=self.seed)
        self.selections = number
        return self._take(selection)

    def loss(self, x: Images, y: Labels, *, through: nn.Module | None = None) -> Tensor:
        """Eq. 9 on a batch, a scalar to call ``backward`` on (Algorithm 1, lines 13 and 14).

        Args:
            through: the network as DistributedDataParallel wrapped it after the last selection
        Raises:
            InputError: no selection yet, a batch that ``select`` would refuse, or a wrapper from before the selection
        """
        selection = self._selected()
        x, y = self._batch(x, y)
        if through is not None:
            self._check_wrapper(through)
        x_adv = self.threat.project(self.objective.perturb(self.model, x, y, self.threat), x)
        with selection.mode(self.model):
            terms = self.objective.loss(self.model if through is None else through, x, x_adv, y)
        return terms["cross_entropy"] + terms["criticality"]

    def check(self) -> None:
        """Raises IntegrityError unless, since the last check, all that is frozen stood still and the rest moved."""
        verify(self.model, self._selected(), self._before)
        self._before = snapshot(self.model)

    def state_dict(self) -> dict[str, Any]:
        """What a stopped loop needs to go on, as numbers, texts and lists: last selection, their count, the seed."""
        selection = None if self.selection is None else self.selection.to_json()
        return {"selection": selection, "selections": self.selections, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[nn.Parameter]:
        """Puts back what ``state_dict`` returned and returns the parameters that train (none before a selection).

        Load the network's own ``state_dict`` first: the next ``check`` compares with the weights as they are now.

        Raises:
            InputError: no such state, or one of another network
        """
        try:
            seed, number, entry = (state[key] for key in ("seed", "selections", "selection"))
            selection = None if entry is None else Selection.from_json(entry)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(
                f"This is no state of a CLAT loop ({shown(error)}); give what state_dict returned."
            ) from error
        seed, number = fit("seed", seed, int), fit("selections", number, int)
        known = {name for name, _ in self.model.named_parameters()}
        unknown = [] if selection is None else [name for name in selection.trainable if name not in known]
        if unknown:
            raise InputError(f"The state is of another network: this one has no parameter {shown(unknown[0])}.")
        self.seed, self.selections, self.selection = seed, number, None
        return [] if selection is None else self._take(selection)

    def status(self) -> list[LayerStatus]:
        """Each layer as trained, frozen or irregular."""
        return status(self.model)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the selected layers, most critical first."""
        return self._selected().layers

    @property
    def scores(self) -> tuple[LayerScore, ...]:
        """Criticality of every layer at the last selection."""
        return self._selected().scores

    def _selected(self) -> Selection:
        if self.selection is None:
            raise InputError("No layers are selected yet; call select(x, y) first.")
        return self.selection

    def _take(self, selection: Selection) -> list[nn.Parameter]:
        parameters = selection.apply(self.model)
        for parameter in self.model.parameters():
            parameter.grad = None
        self.selection, self._before = selection, snapshot(self.model)
        return parameters

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
            raise InputError("The wrapper given as through= does not hold the network that was given to CLAT.")
        last, number = self._through
        if last is through and number != self.selections:
            raise InputError(
                "The wrapper is from before the last selection; wrap the network anew after each selection."
            )
        self._through = through, self.selections
