"""The precision and layout of its kernels that a network computes in where a recipe says ``auto``."""

from typing import Literal

import torch
from torch import Tensor, nn

from clat.errors import InputError
from clat.evaluate import Precision, native_precision, seeded
from clat.layers import bears_channels_last, logits
from clat.threat import Images, held

Layout = Literal["auto", "default", "channels-last"]
LAYOUTS: dict[Layout, torch.memory_format] = {
    "default": torch.contiguous_format,
    "channels-last": torch.channels_last,
}
CHANNELS_LAST = ("cpu", "cuda")  # kinds of device on which ``auto`` is this layout
TOLERANCE = 0.01  # of the largest score: how far rounding, of TF32 too, may move one from layout to layout


def layout_of(model: nn.Module) -> Layout:
    """channels-last if most of the kernels of which it can be told are stored so."""
    kernels = [p for p in model.parameters() if p.dim() == 4]
    orders = [[p.is_contiguous(memory_format=order) for order in LAYOUTS.values()] for p in kernels]
    told = [last for default, last in orders if default != last]
    return "channels-last" if 2 * sum(told) > len(told) else "default"


def set_layout(model: nn.Module, layout: Layout) -> None:
    """Stores the kernels in a layout; their values stay."""
    model.to(memory_format=LAYOUTS[layout])


def choose(
    model: nn.Module, x: Images, precision: Precision = "auto", layout: Layout = "auto"
) -> tuple[Precision, Layout]:
    """Settles ``auto`` by the kind of device alone, and puts the network into the layout.

    The precision is bf16 where the device has instructions for it, else fp32; the layout is channels-last on CPUs and
    CUDA, elsewhere torch's default. A network that fails in channels-last, as one that flattens with ``view`` may,
    gives other scores in it, or has gradients that the CPU would get wrong (``bears_channels_last``), gets the default.

    Args:
        x: a few images on the network's device
    Raises:
        InputError: the network does not bear the layout that is asked for
    """
    if precision == "auto":
        precision = native_precision(x.device)
    wanted = ("channels-last" if x.device.type in CHANNELS_LAST else "default") if layout == "auto" else layout
    why = _refusal(model, x, wanted)
    if why and layout != "auto":
        raise InputError(f"With layout {layout} the network {why}; leave it auto.")
    if why:
        wanted = "default"
        set_layout(model, wanted)
    return precision, wanted


def in_words(device: torch.device, precision: Precision, layout: Layout, asked: Layout = "auto") -> str:
    """What was settled, with the flags that repeat it, and whether channels-last was refused for it."""
    refused = asked == "auto" and layout == "default" and device.type in CHANNELS_LAST
    words = "default layout" if layout == "default" else str(layout)
    why = ", as the network does not bear channels-last" if refused else ""
    return f"computes in {precision}, {words}{why} (--precision {precision} --layout {layout})"


def _refusal(model: nn.Module, x: Images, layout: Layout) -> str:
    """Why the network, which is put into the layout, does not bear it; empty if it does."""
    if layout == "channels-last" and x.device.type == "cpu" and not bears_channels_last(model):
        return "has strided 1x1 convolutions of too few channels, whose gradients this CPU gets wrong"
    before = layout_of(model)
    scores = _scores(model, x)
    try:
        set_layout(model, layout)
        tolerance = TOLERANCE * scores.nan_to_num().abs().max().item()
        if torch.allclose(_scores(model, x), scores, rtol=0, atol=tolerance, equal_nan=True):
            return ""
        why = "gives other scores"
    except RuntimeError as error:
        why = f"does not run ({' '.join(str(error).split())[:150]})"
    set_layout(model, before)
    return why


def _scores(model: nn.Module, x: Images) -> Tensor:
    with held(model), torch.no_grad(), seeded(0, x.device):
        return logits(model(x))
