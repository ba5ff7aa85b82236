"""Wide ResNets (Zagoruyko and Komodakis 2016) and the RaWRN of Peng et al. 2023, by TRADES' attribute names."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from clat.errors import InputError

Padding = Literal["symmetric", "asymmetric"]
Activation = Literal["relu", "silu"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


class WideBlock(nn.Module):
    """Pre-activation block of two 3x3 convolutions; where the shape changes, a 1x1 projects the activated input.

    ``padding="asymmetric"`` pads below and to the right only before a convolution of stride 2, as DeepMind's networks
    do (after TensorFlow's SAME): the shapes are the same as with one pixel all round, the values are not.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        padding: Padding,
        activation: Activation,
        norm_momentum: float,
        squeeze: bool,
    ):
        super().__init__()
        shifted = padding == "asymmetric" and stride == 2
        self.bn1 = nn.BatchNorm2d(inputs, momentum=norm_momentum)
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if shifted else nn.Identity()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=0 if shifted else 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, momentum=norm_momentum)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.se = SqueezeExcitation(outputs, outputs // 4) if squeeze else nn.Identity()
        self.activation = _ACTIVATIONS[activation](inplace=True)
        self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        y = self.activation(self.bn2(self.conv1(self.pad(y))))
        return shortcut + self.se(self.conv2(y))


class Stage(nn.Module):
    """Blocks one after another under the name ``layer``."""

    def __init__(self, blocks: Sequence[WideBlock]):
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """Three stages, ``block1`` to ``block3``, of strides 1, 2, 2; any image size from 4x4."""

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        stem: int,
        *,
        classes: int,
        channels: int,
        padding: Padding,
        activation: Activation,
        norm_momentum: float = 0.1,
        squeeze: bool = False,
    ):
        super().__init__()
        if padding not in ("symmetric", "asymmetric"):
            raise InputError(f"padding is {padding!r}; choose symmetric or asymmetric.")
        if activation not in _ACTIVATIONS:
            raise InputError(f"activation is {activation!r}; choose one of {', '.join(_ACTIVATIONS)}.")
        self.conv1 = nn.Conv2d(channels, stem, 3, padding=1, bias=False)
        inputs = stem
        for stage, (count, outputs) in enumerate(zip(blocks, widths, strict=True)):
            made = []
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                made.append(WideBlock(inputs, outputs, stride, padding, activation, norm_momentum, squeeze))
                inputs = outputs
            self.add_module(f"block{stage + 1}", Stage(made))
        self.stages = len(blocks)
        self.bn1 = nn.BatchNorm2d(inputs, momentum=norm_momentum)
        self.activation = _ACTIVATIONS[activation](inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in range(self.stages):
            x = self.get_submodule(f"block{stage + 1}")(x)
        return self.fc(self.pool(self.activation(self.bn1(x))).flatten(1))


def wide_resnet(
    *,
    depth: int,
    width: int,
    classes: int = 10,
    channels: int = 3,
    padding: Padding = "symmetric",
    activation: Activation = "relu",
) -> WideResNet:
    """WRN-depth-width (WRN-34-10: 46,160,474 parameters for 10 classes; WRN-70-16: 266,796,506).

    Args:
        depth: 6 n + 4 for n blocks a stage
        width: multiple of the stage widths 16, 32, 64
        padding: symmetric (TRADES, RobustBench) or asymmetric (DeepMind, SCORE, DM-Improves-AT)
        activation: relu or silu
    Raises:
        InputError: a depth that is not 6 n + 4, an unknown padding or activation
    """
    blocks, remainder = divmod(depth - 4, 6)
    if blocks < 1 or remainder:
        raise InputError(f"depth is {depth}; a Wide ResNet has a depth of 6 n + 4, such as 10, 28, 34 or 70.")
    widths = [16 * width, 32 * width, 64 * width]
    return WideResNet(
        [blocks] * 3, widths, 16, classes=classes, channels=channels, padding=padding, activation=activation
    )


def rawrn70_16(
    *,
    classes: int = 10,
    channels: int = 3,
    blocks: Sequence[int] = (30, 31, 10),
    widths: Sequence[int] = (216, 432, 864),
    stem: int = 96,
) -> WideResNet:
    """RaWRN-70-16 (267,240,802 parameters for 10 classes): squeeze-and-excitation after each block's second
    convolution, SiLU, asymmetric padding; 70-16 is the budget of WRN-70-16, not its depth and width.

    Args:
        blocks, widths: blocks and channels of each of the three stages
        stem: channels of the first convolution

    Source: Peng et al. 2023, "Robust Principles".
    """
    return WideResNet(
        blocks, widths, stem, classes=classes, channels=channels,
        padding="asymmetric", activation="silu", norm_momentum=0.01, squeeze=True,
    )  # fmt: skip
