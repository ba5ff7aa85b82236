"""Which precision and layout of its kernels a network computes fastest in on a device, by measurement."""

import math
import time
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn

from clat.attacks import pgd_attack
from clat.errors import InputError
from clat.evaluate import Precision, autocast, native_precision, seeded
from clat.layers import logits
from clat.threat import Images, Labels, Threat, held

Layout = Literal["auto", "default", "channels-last"]
LAYOUTS: dict[Layout, torch.memory_format] = {
    "default": torch.contiguous_format,
    "channels-last": torch.channels_last,
}
ROUNDS = 3  # of which the shortest counts; the first warms up
MARGIN = 1.1  # what comes first stays unless another is so many times as fast, so that noise does not choose


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
    model: nn.Module,
    x: Images,
    y: Labels,
    precision: Precision = "auto",
    layout: Layout = "auto",
) -> tuple[Precision, Layout]:
    """Settles ``auto`` by timing a step of an attack on a batch, and puts the network into the layout.

    bf16 is tried where the device has instructions for it. A layout that the network fails in, as one that flattens
    with ``view`` may, or in which it gives other scores, is not chosen. It takes about the time of a step of PGD-AT.

    Args:
        x: images on the network's device, as many as a training step has
        y: their labels
    Raises:
        InputError: the network does not run in the layout that is asked for
    """
    if layout != "auto":
        try:
            set_layout(model, layout)
            _scores(model, x)
        except RuntimeError as error:
            raise InputError(
                f"The network does not run with layout {layout} ({' '.join(str(error).split())[:150]}); leave it auto."
            ) from error
    before, native = layout_of(model), native_precision(x.device)
    candidates: tuple[Precision, ...] = ("fp32",) if native == "fp32" else ("bf16", "fp32")
    precisions = candidates if precision == "auto" else (precision,)
    layouts = sorted(LAYOUTS, key=lambda name: name != before) if layout == "auto" else [before]
    first, *others = product(precisions, layouts)
    if not others:
        return first
    scores = _scores(model, x)
    seconds = dict.fromkeys((first, *others), math.inf)
    for _ in range(ROUNDS):  # in turn, so that what disturbs the machine for a while disturbs all
        for pair in seconds:
            seconds[pair] = min(seconds[pair], _seconds(model, x, y, pair, scores))
    chosen = min(seconds, key=lambda pair: seconds[pair] / (MARGIN if pair == first else 1))
    set_layout(model, chosen[1])
    return chosen


def _scores(model: nn.Module, x: Images) -> Tensor:
    with held(model), torch.no_grad():
        return logits(model(x[:8]))


def _seconds(model: nn.Module, x: Images, y: Labels, pair: tuple[Precision, Layout], scores: Tensor) -> float:
    """Infinite if the network fails so, which it also does where memory is full, or does not give these scores."""
    try:
        set_layout(model, pair[1])
        same = torch.allclose(_scores(model, x), scores, rtol=1e-3, atol=1e-3)
        return _step(model, x, y, pair[0]) if same else math.inf
    except RuntimeError:
        return math.inf


def _step(model: nn.Module, x: Images, y: Labels, precision: Precision) -> float:
    """Seconds of one step of PGD."""
    start = time.perf_counter()
    with seeded(0, x.device), autocast(x.device, precision):
        pgd_attack(model, x, y, Threat(steps=1)).sum().item()
    return time.perf_counter() - start
