"""Pre-activation ResNet with the stem for small images (He et al. 2016b)."""

from typing import Literal

from torch import Tensor, nn

from clat.errors import InputError


class PreActBlock(nn.Module):
    """Normalise and activate, then convolve, twice. The projection takes the activated input or the raw one."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut_input: Literal["activated", "raw"]):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
        self.raw = shortcut_input == "raw" or not len(self.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(x))
        z = self.conv1(y)
        z = self.conv2(self.relu(self.bn2(z)))
        return z + self.shortcut(x if self.raw else y)


class PreActResNet(nn.Module):
    """Stages of pre-activation blocks at widths w, 2w, 4w, 8w; any image size from 8x8."""

    def __init__(
        self,
        blocks: tuple[int, ...],
        classes: int,
        channels: int,
        width: int,
        final_norm: bool,
        shortcut_input: Literal["activated", "raw"],
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        inputs = width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            self.add_module(
                f"layer{stage + 1}",
                nn.Sequential(
                    *(
                        PreActBlock(inputs if i == 0 else outputs, outputs, stride, shortcut_input)
                        for i, stride in enumerate(strides)
                    )
                ),
            )
            inputs = outputs
        self.stages = len(blocks)
        self.bn = nn.BatchNorm2d(inputs) if final_norm else nn.Identity()
        self.relu = nn.ReLU(inplace=True) if final_norm else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.linear(self.pool(self.relu(self.bn(x))).flatten(1))


def preactrn18(
    *,
    classes: int = 10,
    channels: int = 3,
    width: int = 64,
    final_norm: bool = True,
    shortcut_input: Literal["activated", "raw"] = "activated",
) -> PreActResNet:
    """PreAct ResNet-18 (11,172,170 parameters for 10 classes; 1,024 fewer without ``final_norm``).

    Args:
        final_norm: BatchNorm and ReLU before pooling, as Rice, AWP and SCORE have it; Fast-AT's and GradAlign's lack it
        shortcut_input: the projection takes the activated tensor (kuangliu, Rice, AWP) or the raw one (Fast-AT,
            GradAlign)
    Raises:
        InputError: another shortcut_input
    """
    if shortcut_input not in ("activated", "raw"):
        raise InputError(f"shortcut_input is {shortcut_input!r}; choose activated or raw.")
    return PreActResNet((2, 2, 2, 2), classes, channels, width, final_norm, shortcut_input)
