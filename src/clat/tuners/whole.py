"""The whole network trains: ordinary (adversarial) training."""

from dataclasses import dataclass

from torch import nn

from clat.layers import find_layers
from clat.network import Images, Labels
from clat.threat import Threat
from clat.tuners.base import Batch, Tuner
from clat.tuners.selection import Selection, parameters_of


@dataclass(frozen=True, kw_only=True)
class Whole(Tuner):
    """Every parameter trains, in train mode, from the first epoch on; those frozen before stay frozen."""

    name = "whole"

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
    ) -> Selection:
        return Selection(
            epoch=epoch,
            layers=tuple(find_layers(model, x[:1])),
            trainable=parameters_of(model, [""]),
            training=("",),
        )
