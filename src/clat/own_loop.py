"""CLAT for a training loop of your own: no trainer, no run folder, any ``nn.Module``."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from clat.criticality import LayerScore
from clat.errors import InputError
from clat.integrity import LayerStatus, snapshot, status, verify
from clat.layers import logits
from clat.objectives import Clat
from clat.threat import Images, Labels, Threat, check_images, fraction, held
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

    Args:
        model: takes pixels in [0, 1] (batch, channel, height, width), returns class scores (batch, classes)
        k: how many layers train, or which share of them
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
        self.model, self.seed = model, seed
        self.threat = threat or Threat(eps=eps, step=fraction(eps) * 7 / 30 if step is None else step, steps=steps)
        keys = {"clat": Clat.__dataclass_fields__, "critical": Critical.__dataclass_fields__}
        unknown = [key for key in options if not any(key in fields for fields in keys.values())]
        if unknown:
            known = sorted({*keys["clat"], *keys["critical"]} - {"k", "every", "batch", "momentum", "learning_rate"})
            raise InputError(f"CLAT has no option {unknown[0]!r}; it has {', '.join(known)}.")
        self.objective = replace(Clat(), **{key: options[key] for key in options if key in keys["clat"]})
        self.tuner = replace(Critical(k=k), **{key: options[key] for key in options if key in keys["critical"]})
        self.selection: Selection | None = None
        self.selections = 0

    def select(self, x: Images, y: Labels) -> list[nn.Parameter]:
        """Ranks the layers on a batch (Algorithm 1, lines 4-9), freezes all others and returns what trains."""
        self._check(x, y)
        self.selections += 1
        self.selection = self.tuner.select(self.model, x, y, self.threat, epoch=self.selections, seed=self.seed)
        parameters = self.selection.apply(self.model)
        for parameter in self.model.parameters():
            parameter.grad = None
        self._before = snapshot(self.model)
        return parameters

    def loss(self, x: Images, y: Labels) -> Tensor:
        """Eq. 9 on a batch, a scalar to call ``backward`` on (Algorithm 1, lines 13 and 14)."""
        selection = self._selected()
        x_adv = self.threat.project(self.objective.perturb(self.model, x, y, self.threat), x)
        with selection.mode(self.model):
            terms = self.objective.loss(self.model, x, x_adv, y)
        return terms["cross_entropy"] + terms["criticality"]

    def check(self) -> None:
        """Raises IntegrityError unless, since the last check, all that is frozen stood still and the rest moved."""
        verify(self.model, self._selected(), self._before)
        self._before = snapshot(self.model)

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

    def _check(self, x: Images, y: Labels) -> None:
        check_images(x)
        with held(self.model), torch.no_grad():
            classes = logits(self.model(x[:1])).shape[1]
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
            raise InputError(
                f"The labels run from {int(y.min())} to {int(y.max())}, but the network has {classes} outputs."
            )
        if y.shape != x.shape[:1]:
            raise InputError(
                f"There are {len(x)} images but labels of shape {tuple(y.shape)}; give one label an image."
            )
