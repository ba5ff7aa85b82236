"""DenseNet-BC with the stem for small images (Huang et al. 2017): torchvision's network from the first block on."""

from torch import nn
from torchvision.models import DenseNet


def dn121(
    *, classes: int = 10, channels: int = 3, growth: int = 32, blocks: tuple[int, int, int, int] = (6, 12, 24, 16)
) -> nn.Module:
    """DenseNet-121 (6,956,298 parameters for 10 classes); any image size from 8x8.

    The stem is one 3x3 convolution of stride 1 with 2 x ``growth`` channels, neither normalised nor pooled, as in
    kuangliu's network. That one concatenates newer features in front of older ones, this one behind: the same network
    with its input channels in another order, which ``clat.models.schemes`` puts right.

    Args:
        growth: channels that each layer adds
        blocks: layers of each of the four blocks
    """
    network = DenseNet(growth, blocks, num_init_features=2 * growth, num_classes=classes)
    network.features.conv0 = nn.Conv2d(channels, 2 * growth, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.features.conv0.weight)  # as torchvision does with all others
    for name in ("norm0", "relu0", "pool0"):
        network.features.add_module(name, nn.Identity())
    return network
