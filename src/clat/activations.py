"""A layer's output on its way through the normalisation and the activation that are applied to it."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

# The functions of torch that are watched, by name.
CASTS = {"to"}  # around BatchNorm as attacks run it in bf16
NORMS = {"addcmul", "batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"}
ACTIVATIONS = {
    *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "celu", "gelu", "silu", "mish"),
    *("hardswish", "hardtanh", "softplus", "prelu", "sigmoid", "tanh"),
}
WEIGHTED = {"conv1d", "conv2d", "conv3d", "linear", "multi_head_attention_forward", "scaled_dot_product_attention"}


class Stop(Exception):
    """Stops a forward pass when the rest is not needed."""


class Follow(TorchFunctionMode):
    """Follows a layer's output through the normalisation and activation applied to it, as modules or as functions."""

    def __init__(self, visit: Callable[[int, Tensor], None], stop_after: int | None):
        super().__init__()
        self.visit, self.stop_after = visit, stop_after
        # id of a tensor -> the tensor, the number of its call, and what gives it one row an image
        self.followed: dict[int, tuple[weakref.ref[Tensor], int, Callable[[Tensor], Tensor]]] = {}
        self.complete = False

    def add(self, number: int, feature: Tensor, by_image: Callable[[Tensor], Tensor]) -> None:
        self.followed[id(feature)] = (weakref.ref(feature), number, by_image)
        self.complete = number + 1 == self.stop_after

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if self.complete and name in WEIGHTED:
            raise Stop
        place = 1 if name == "addcmul" else 0  # BatchNorm as attacks run it: clat.batchnorm.fixed_norms
        tensor = args[place] if len(args) > place and isinstance(args[place], Tensor) else None
        reference, number, by_image = self.followed.get(id(tensor), (None, -1, None))
        output = func(*args, **(kwargs or {}))
        if reference is None or by_image is None or reference() is not tensor or not isinstance(output, Tensor):
            return output
        if name in NORMS or (name in CASTS and output is not tensor):
            self.visit(number, by_image(output))
            self.followed[id(output)] = (weakref.ref(output), number, by_image)
        elif name in ACTIVATIONS:
            self.visit(number, by_image(output))
            if self.complete and number + 1 == self.stop_after:
                raise Stop
        return output
