"""Where and how a run computes: its device, and what ``auto`` means."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from rich.console import Console
from torch import nn

from clat.compute import choose, in_words, layout_of, set_layout
from clat.data.dataset import Dataset, to_unit
from clat.network import tensors
from clat.training.processes import Processes
from clat.training.recipe import Recipe
from clat.training.runs import Run


def as_begun(recipe: Recipe, run: Run) -> Recipe:
    """The recipe with what ``auto`` stood for when the run in the folder began."""
    stored = run.recipe
    precision = stored["precision"] if recipe.precision == "auto" else recipe.precision
    return replace(recipe, precision=precision, layout=stored["layout"] if recipe.layout == "auto" else recipe.layout)


@contextmanager
def lent(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The network is on the device inside the block; then it returns to where it was, in the layout it had."""
    came_from = {tensor.device for tensor in tensors(model).values()}
    model.to(device)
    before = layout_of(model)
    try:
        yield
    finally:
        set_layout(model, before)
        if len(came_from) == 1:
            model.to(came_from.pop())


def settled(recipe: Recipe, model: nn.Module, data: Dataset, processes: Processes, console: Console) -> Recipe:
    """The recipe with the first process's precision and layout in place of ``auto``; the network takes the layout."""
    device, count = processes.device, processes.count
    pixels, _ = next(data.subset(torch.arange(min(8, len(data)))).to(device).batches(8, workers=0))
    # On every process, so that all may refuse.
    precision, layout = processes.of_first(choose(model, to_unit(pixels), recipe.precision, recipe.layout))
    set_layout(model, layout)
    words = in_words(device, precision, layout, recipe.layout)
    console.print(f"  {words} on {device}, {count} process{'es' if count > 1 else ''}", highlight=False)
    return replace(recipe, precision=precision, layout=layout)
