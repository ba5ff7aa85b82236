"""What trains, as a value: recorded in the run folder, applied to the network, checked after every epoch."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from clat.criticality import LayerScore
from clat.layers import NORM_TYPES


@dataclass(frozen=True, kw_only=True)
class Selection:
    """One decision of a tuner.

    Args:
        epoch: the epoch before which it was made, from 1
        layers: dotted names of the selected layers, most critical first
        trainable: names of the parameters that train; all others are frozen
        training: dotted names of the modules that run in train mode meanwhile ("" is the whole network); all others
            run in eval mode, so that their buffers stand still
        scores: criticality of every layer when the decision was made (what a tuner measures instead, it says itself)
    """

    epoch: int
    layers: tuple[str, ...]
    trainable: tuple[str, ...]
    training: tuple[str, ...] = ()
    scores: tuple[LayerScore, ...] = ()

    def apply(self, model: nn.Module) -> list[nn.Parameter]:
        """Sets ``requires_grad`` on exactly the trainable parameters and returns these."""
        trainable = set(self.trainable)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    @contextmanager
    def mode(self, model: nn.Module) -> Iterator[None]:
        """Holds the modes that this selection trains in, whatever the caller set, and puts the caller's back."""
        before = [(module, module.training) for module in model.modules()]
        model.eval()
        for name in self.training:
            model.get_submodule(name).train()
        try:
            yield
        finally:
            for module, was_training in before:
                module.training = was_training

    def moving_buffers(self, model: nn.Module) -> set[str]:
        """Names of the buffers that may change while this selection trains."""
        prefixes = tuple(name + "." if name else "" for name in self.training)
        return {name for name, _ in model.named_buffers() if name.startswith(prefixes)} if prefixes else set()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Selection":
        scores = tuple(LayerScore(**score) for score in entry["scores"])
        names = {key: tuple(entry[key]) for key in ("layers", "trainable", "training")}
        return cls(epoch=entry["epoch"], scores=scores, **names)


def moving_norms(
    model: nn.Module, which: Literal["frozen", "selected", "all"], selected: Collection[str]
) -> tuple[str, ...]:
    """Names of the normalisation layers in train mode: none, those ``selected`` by name, or all of the network."""
    if which == "all":
        return tuple(sorted(name for name, module in model.named_modules() if isinstance(module, NORM_TYPES)))
    return tuple(sorted(selected)) if which == "selected" else ()
