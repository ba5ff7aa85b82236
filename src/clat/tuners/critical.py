"""Algorithm 1: the most critical layers train, and are chosen again every few epochs."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from clat.criticality import LayerScore, MeanOfAll, Norm
from clat.errors import InputError
from clat.features import At
from clat.inputs import check_fields, check_k
from clat.layer_names import allowed
from clat.layers import trace
from clat.network import Images, Labels
from clat.threat import Threat, attack_output
from clat.tuners.base import Batch, Tuner
from clat.tuners.order import layer_count, ranked
from clat.tuners.rankings import Attacked, Order, rank_layers
from clat.tuners.selection import Selection, listed, moving_norms, parameters_of, selectable, with_tied


@dataclass(frozen=True, kw_only=True)
class Critical(Tuner):
    """Selects, trains and freezes by criticality.

    Layers that share a weight count as one and are selected together. A layer that was frozen before the first
    selection (``requires_grad`` False) is never selected.

    Args:
        layers: train these layers, by the names that ``clat layers`` prints, in place of k and ranking; projection
            shortcuts and the head may be among them
        include: only layers whose names match one of these patterns can be selected, e.g. ``*.mlp.*``; default all
        exclude: layers whose names match one of these patterns cannot, e.g. ``*.se.*`` for squeeze-and-excite
        k: how many layers train (a whole number), or which share of them (a decimal above 0 and up to 1.0, all)
        every: epochs from one selection to the next (Algorithm 1: 10); 0 selects once (Table 4's non-dynamic variant)
        ranking: criticality (Algorithm 1, line 9); another measure, of which the highest come first: relative (change
            of the features under attack, as a share of their length), loss (rise of the loss if this layer alone were
            attacked), alignment (of gradients on training and on held-out images) or gradient (its length for the
            layer's size); or a control: random (Table 5) or lowest (criticality)
        batch: training images that the ranking is measured on; alignment takes the same number of held-out ones too
        norm: normalisation of the weakness: paper (1 / N, Eq. 5), rms (1 / sqrt N) or relative (1 / the length of the
            clean feature)
        at: features at the layer's output or after its normalisation and activation
        head: let the classification head be selected too
        norm_affine: train the scale and shift of a selected layer's own normalisation with it
        norm_statistics: which BatchNorm layers use and update batch statistics in training: frozen (none), selected
            (those right after a selected layer) or all
        optimizer_state: the optimizer's at a selection: reset it, or keep that of layers that are selected again
        lr_schedule: the learning rate's at a selection: continue it, or restart it
    """

    name = "critical"
    layers: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    k: int | float = 1
    every: int = 10
    ranking: Order = "criticality"
    batch: int = 100
    norm: Norm = "paper"
    at: At = "output"
    head: bool = False
    norm_affine: bool = False
    norm_statistics: Literal["frozen", "selected", "all"] = "frozen"
    optimizer_state: Literal["reset", "keep"] = "reset"
    lr_schedule: Literal["continue", "restart"] = "continue"

    def __post_init__(self) -> None:
        check_fields(self, "critical.")
        if self.every < 0:
            raise InputError(f"critical.every is {self.every}; give epochs between selections, or 0 to select once.")
        if self.batch < 1:
            raise InputError(f"critical.batch is {self.batch}; the criticality needs at least one image.")
        check_k(self.k, "critical.k")
        if self.layers and (self.include or self.exclude):
            raise InputError("critical.layers names the layers; leave critical.include and critical.exclude out.")

    def unseen(self) -> int:
        return self.batch if self.ranking == "alignment" and not self.layers else 0

    def averages(self) -> bool:
        return bool(self.layers) or self.ranking not in ("alignment", "gradient")  # which are no means over images

    def select(
        self,
        model: nn.Module,
        x: Images,
        y: Labels,
        threat: Threat,
        *,
        epoch: int = 1,
        seed: int = 0,
        unseen: Batch | None = None,
        mean: MeanOfAll | None = None,
    ) -> Selection:
        """Algorithm 1, lines 4-9, on images x (batch, channel, height, width) with labels y (batch,).

        Args:
            mean: averages the measure over processes that have other images of the same batch, if it ``averages``
        Raises:
            InputError: more layers than can be selected, or a batch that is none
        """
        attacked = Attacked(x, attack_output(model, x, y, threat), y)
        other = None
        if unseen is not None and self.unseen():
            other = Attacked(unseen[0], attack_output(model, *unseen, threat), unseen[1])
        measure = "criticality" if self.layers else self.ranking
        scores = rank_layers(model, attacked, measure, unseen=other, norm=self.norm, at=self.at, mean=mean)
        selected = listed(model, x, self.layers) if self.layers else self._top(model, scores, seed + epoch)
        chosen = with_tied(model, selected, (score.name for score in scores))
        own = {call.norm for call in trace(model, x[:1]) if call.name in chosen and call.norm}
        trained = [*chosen, *sorted(own)] if self.norm_affine else chosen
        return Selection(
            epoch=epoch,
            layers=tuple(chosen),
            trainable=parameters_of(model, trained),
            training=moving_norms(model, self.norm_statistics, own),
            scores=tuple(scores),
        )

    def _top(self, model: nn.Module, scores: list[LayerScore], seed: int) -> list[str]:
        """The first k layers of the ranking."""
        left = allowed((score.name for score in scores), self.include, self.exclude)
        highest = dict.fromkeys(score.name for score in ranked(scores, head=self.head) if score.name in left)
        if not highest:
            raise InputError("critical.include and critical.exclude leave no layer to select; widen one of them.")
        names = selectable(model, highest)
        if self.ranking == "random":
            order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
            names = [names[i] for i in order]
        elif self.ranking == "lowest":
            names = names[::-1]
        return names[: layer_count(self.k, len(names))]
