"""ResNet with the stem for small images: 3x3 stride 1, no pooling (He et al. 2016a, in its usual CIFAR form)."""

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 projection where the shape changes."""

    expansion = 1  # channels of the output per channel of ``width``

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which has the stride) and 1x1 convolutions and a shortcut; the output is four times as wide."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + self.shortcut(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """The identity, or a 1x1 projection with BatchNorm where the shape changes."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """Stages of blocks at widths w, 2w, 4w, 8w; any image size from 8x8."""

    def __init__(
        self, block: type[BasicBlock | Bottleneck], blocks: tuple[int, ...], classes: int, channels: int, width: int
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        inputs = width
        for stage, count in enumerate(blocks):
            inner = width * 2**stage
            outputs = inner * block.expansion
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            self.add_module(
                f"layer{stage + 1}",
                nn.Sequential(
                    *(block(inputs if i == 0 else outputs, inner, stride) for i, stride in enumerate(strides))
                ),
            )
            inputs = outputs
        self.stages = len(blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.linear(self.pool(x).flatten(1))


def rn18(*, classes: int = 10, channels: int = 3, width: int = 64) -> ResNet:
    """ResNet-18; ``width`` is the number of channels of the first stage (64: 11,173,962 parameters for 10 classes)."""
    return ResNet(BasicBlock, (2, 2, 2, 2), classes, channels, width)


def rn50(*, classes: int = 10, channels: int = 3, width: int = 64) -> ResNet:
    """ResNet-50; ``width`` is that of the first stage's inner convolutions (64: 23,520,842 parameters, 10 classes)."""
    return ResNet(Bottleneck, (3, 4, 6, 3), classes, channels, width)
