"""Layers by the names that a user gives."""

from collections.abc import Sequence

from torch import nn

from clat.errors import InputError
from clat.inputs import nearest
from clat.layers import find_layers
from clat.network import Images
from clat.text import plain

WRAPPER = "network."  # begins the names of all layers of a network that ``build_model`` made


def named_layers(model: nn.Module, x: Images, names: Sequence[str]) -> dict[str, nn.Module]:
    """The layers of these names that run on images x; ``network.``, which ``build_model`` puts first, may be left out.

    Raises:
        InputError: the network has no such layer
    """
    known = find_layers(model, x[:1])
    full = {name: name if name in known else f"{WRAPPER}{name}" for name in names}
    for name in names:
        if full[name] not in known:
            listed = [plain(layer.removeprefix(WRAPPER)) for layer in known]
            raise InputError(
                f"The network has no layer {plain(name)!r}; clat layers lists them: {', '.join(listed)}."
                f"{nearest(name, listed)}"
            )
    return {full[name]: known[full[name]] for name in names}
