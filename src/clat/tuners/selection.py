"""Which parameters train, as a value: recorded in the run folder, applied to the network, checked after every epoch."""

import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from clat.criticality import LayerScore
from clat.errors import InputError
from clat.layer_names import named_layers
from clat.layers import NORM_TYPES
from clat.network import Images

FROZEN = "_frozen_by_clat"  # of a module: names of its own parameters that a selection froze


@dataclass(frozen=True, kw_only=True)
class Selection:
    """One decision of a tuner.

    Args:
        epoch: the epoch before which it was made, from 1
        layers: dotted names of the selected layers, most critical first
        trainable: names of the parameters that train; all others are frozen
        training: dotted names of the modules that run in train mode then ("" is the whole network); all others
            run in eval mode, so that their buffers do not change
        scores: what the tuner measured of every layer when it chose; for ``Critical``, the criticality
    """

    epoch: int
    layers: tuple[str, ...]
    trainable: tuple[str, ...]
    training: tuple[str, ...] = ()
    scores: tuple[LayerScore, ...] = ()

    def apply(self, model: nn.Module) -> list[nn.Parameter]:
        """Sets ``requires_grad`` on exactly the trainable parameters and returns these.

        Raises:
            InputError: none of the network's parameters is among them
        """
        named = dict(model.named_parameters())
        trainable = {named[name] for name in self.trainable if name in named}
        if not trainable:
            raise InputError("The selection has no parameter of this network, so nothing would train.")
        for module in model.modules():
            before = vars(module).get(FROZEN, set())
            vars(module)[FROZEN] = {
                name
                for name, parameter in module.named_parameters(recurse=False)
                if parameter not in trainable and (parameter.requires_grad or name in before)
            }
        for parameter in named.values():
            parameter.requires_grad_(parameter in trainable)
        return [parameter for parameter in named.values() if parameter.requires_grad]

    def partial(self, model: nn.Module) -> bool:
        """Whether less than the whole network trains."""
        return {name for name, _ in model.named_parameters()} != set(self.trainable)

    @contextmanager
    def mode(self, model: nn.Module) -> Iterator[None]:
        """Puts modules into the modes that this selection trains in, then restores the caller's."""
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

    def in_words(self) -> str:
        """The layers by name, with their numbers in the order in which they run, if known."""
        index = {score.name: score.index for score in self.scores}
        if not index:
            return f"{len(self.layers)} layers"
        return ", ".join(f"{name} (layer {index[name]})" if index[name] else name for name in self.layers)

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


def frozen_before(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that are frozen, but not by a selection of clat."""
    return {
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if not parameter.requires_grad and name not in vars(module).get(FROZEN, ())
    }


def parameters_of(model: nn.Module, modules: Iterable[str]) -> tuple[str, ...]:
    """Names of the parameters of the modules with these names, as the network names them, but for those frozen before.

    A tied weight belongs to each module that has it and is named once, by the first.
    """
    frozen = frozen_before(model)
    own = {parameter for name in modules for parameter in model.get_submodule(name).parameters()} - frozen
    return tuple(name for name, parameter in model.named_parameters() if parameter in own)


def weights_of(model: nn.Module, layer: str) -> set[nn.Parameter]:
    """The weights of a layer, without its biases."""
    return {parameter for parameter in model.get_submodule(layer).parameters() if parameter.dim() > 1}


def listed(model: nn.Module, x: Images, names: Sequence[str]) -> list[str]:
    """The layers that a recipe names, as the network names them.

    Raises:
        InputError: the network has no such layer, or has it frozen
    """
    found = list(named_layers(model, x, names))
    frozen = frozen_before(model)
    for name in found:
        if weights_of(model, name) & frozen:
            raise InputError(
                f"critical.layers names {name}, which is frozen (requires_grad is False); call "
                "requires_grad_(True) on it, or leave it out."
            )
    return found


def selectable(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The layers that can be selected, in the order given: those whose weights were not frozen before.

    Layers that share a weight are one layer; the first one is named for all.

    Raises:
        InputError: none is left
    """
    frozen, taken = frozen_before(model), set[nn.Parameter]()
    kept, left_out = [], []
    for name in names:
        weights = weights_of(model, name)
        if weights & frozen:
            left_out.append(name)
        elif not weights & taken:
            kept.append(name)
        taken |= weights
    if left_out:
        listed = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        said = f"{len(left_out)} layers are frozen already (requires_grad is False) and stay so: {listed}"
        if not kept:
            raise InputError(f"{said}; none is left to select, so call requires_grad_(True) on those that may train.")
        warnings.warn(f"{said}; call requires_grad_(True) on those that may be selected.", stacklevel=3)
    return kept


def with_tied(model: nn.Module, layers: Iterable[str], names: Iterable[str]) -> list[str]:
    """``layers``, each followed by those of ``names`` that share a weight with it."""
    names = list(dict.fromkeys(names))
    found: dict[str, None] = {}
    for layer in layers:
        weights = weights_of(model, layer)
        found.update(dict.fromkeys([layer, *(name for name in names if weights & weights_of(model, name))]))
    return list(found)
