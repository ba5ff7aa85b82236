"""Which convolutions are the projections on a residual block's short path, told by their names."""

import re

from torch import nn

# Projection shortcuts by the names in use: kuangliu and TRADES (shortcut, convShortcut), torchvision and timm
# (downsample, there a 1x1 convolution; ConvNeXt's downsample on the main path is larger).
_SHORTCUT = re.compile(r"shortcut|skip", re.IGNORECASE)
_POINTWISE_SHORTCUT = re.compile(r"downsample", re.IGNORECASE)


def is_shortcut(name: str, module: nn.Module) -> bool:
    """True for the projection on a residual block's short path, which the paper's numbering leaves out."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return False
    pointwise = all(size == 1 for size in module.kernel_size)
    return bool(_SHORTCUT.search(name) or (pointwise and _POINTWISE_SHORTCUT.search(name)))
