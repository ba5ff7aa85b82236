"""ConvLoRA: a low-rank product is added to every frozen weight, and only its factors train."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clat.compute import full_precision
from clat.errors import InputError
from clat.inputs import check_fields
from clat.layers import NORM_TYPES, layer_modules, trace
from clat.network import Images, Labels
from clat.threat import Threat
from clat.tuners.base import Batch, Tuner
from clat.tuners.selection import FROZEN, Selection, moving_norms, parameters_of, selectable, with_tied

HIGHEST_RANK = 4096  # no layer has more channels than that by much


@dataclass(frozen=True, kw_only=True)
class ConvLora(Tuner):
    """Adapts every convolution and linear layer by a low-rank product; the weights themselves stay frozen.

    Convolutions of any square kernel (1x1 included) and any groups, projection shortcuts included. The network is
    adapted by ``begin`` and made ordinary again by ``merge``; in between, ``merged_state`` has its ordinary names.

    Args:
        rank: r, the rank of the product is r k for a k x k kernel
        alpha: the product is scaled by alpha / r
        head: adapt the classification head, the last layer to run, too
        norm_affine: train the scale and shift of every normalisation, too
        norm_statistics: which BatchNorm layers use and update batch statistics in training: all or frozen (none)

    Source: Aleem et al. 2024, "ConvLoRA and AdaBN based Domain Adaptation via Self-Training".
    """

    name = "convlora"
    rank: int = 2
    alpha: float = 2
    head: bool = False
    norm_affine: bool = True
    norm_statistics: Literal["frozen", "all"] = "all"

    def __post_init__(self) -> None:
        check_fields(self, "convlora.")
        if not 1 <= self.rank <= HIGHEST_RANK:
            raise InputError(f"convlora.rank is {self.rank}; it must be from 1 to {HIGHEST_RANK}.")
        if not self.alpha > 0:
            raise InputError(f"convlora.alpha is {self.alpha}; it must be above 0.")

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
        """All layers that run on images x (batch, channel, height, width), but for the head.

        Raises:
            InputError: no layer can be adapted, one is parametrised already, or two share a weight
        """
        calls = trace(model, x[:1])
        head = None if self.head or len(calls) == 1 else calls[-1].name
        fitting = list(dict.fromkeys(call.name for call in calls if call.name != head and _fits(call.module)))
        if not fitting:
            raise InputError("The network has no square convolution or linear layer that convlora could adapt.")
        layers = tuple(selectable(model, fitting))
        for name in layers:
            tied = with_tied(model, [name], layer_modules(model))
            if len(tied) > 1:
                raise InputError(f"Layers {' and '.join(tied)} share one weight, which convlora cannot adapt.")
            if parametrize.is_parametrized(model.get_submodule(name)):
                raise InputError(f"Layer {name} is parametrised already; remove that before adapting it by convlora.")
        norms = [name for name, module in model.named_modules() if isinstance(module, NORM_TYPES)]
        affine = parameters_of(model, norms)
        return Selection(
            epoch=epoch,
            layers=layers,
            trainable=(
                *(f"{name}.parametrizations.weight.0.{key}" for name in layers for key in ("down", "up")),
                *(affine if self.norm_affine else ()),
            ),
            training=moving_norms(model, self.norm_statistics, ()),
        )

    def begin(self, model: nn.Module, selection: Selection, *, seed: int = 0) -> None:
        """Adds the matrices that the selection trains; what the network computes stays the same."""
        generator = torch.Generator().manual_seed(seed)
        for name in selection.layers:
            module = model.get_submodule(name)
            product = LowRank(module, self.rank, self.alpha / self.rank, generator)
            parametrize.register_parametrization(module, "weight", product)

    def state(self, model: nn.Module) -> dict[str, Tensor] | None:
        return merged_state(model) if adapted_layers(model) else None

    def undo(self, model: nn.Module) -> None:
        merge(model)


class LowRank(nn.Module):
    """W + scale reshape(B A), with A called ``down`` and B called ``up``.

    For a kernel W (o, i / groups, k, k), A is (r k, i / groups k), B is (o k, r k) and their product is read row by
    row as (o, i / groups, k, k), without a permutation, as in the authors' code; a linear layer is the case k = 1.
    """

    def __init__(self, module: nn.Module, rank: int, scale: float, generator: torch.Generator):
        super().__init__()
        weight = module.get_parameter("weight")
        outputs, inputs = weight.shape[:2]
        size = weight.shape[2] if weight.dim() > 2 else 1
        self.scale = scale
        down = torch.empty(rank * size, inputs * size)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)  # drawn on the CPU: equal on any device
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(torch.zeros(outputs * size, rank * size).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        with full_precision(weight.device):  # in full precision, so that merging changes nothing
            return weight + self.scale * (self.up @ self.down).view(weight.shape)


def _fits(module: nn.Module) -> bool:
    """Whether the layer's weight is that of a square 2-d convolution or a linear layer."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size[0] == module.kernel_size[1]
    return isinstance(module, nn.Linear)


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with a low-rank product, by dotted name."""
    return {
        name: module
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module, "weight")
        and isinstance(module.get_submodule("parametrizations.weight")[0], LowRank)
    }


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` that the network will have once it is merged, bit for bit; the network is unchanged."""
    adapted = adapted_layers(model)
    prefixes = tuple(f"{name}.parametrizations." for name in adapted)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefixes)}
    return {**state, **{f"{name}.weight": module.weight for name, module in adapted.items()}}


def merge(model: nn.Module) -> None:
    """Adds the products to the weights and removes them: the network is an ordinary one, with its ordinary names."""
    for module in adapted_layers(model).values():
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        vars(module).setdefault(FROZEN, set()).add("weight")
