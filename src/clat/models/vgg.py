"""VGG-19 with BatchNorm and the three-layer head (Simonyan and Zisserman 2015, in weiaicunzai's CIFAR form)."""

from torch import Tensor, nn

CONVOLUTIONS = (2, 2, 4, 4, 4)  # 3x3 convolutions of each stage; a 2x2 max pooling ends each
WIDTHS = (1, 2, 4, 8, 8)  # their channels, in multiples of the first stage's


class VGG(nn.Module):
    """Convolutions with bias, BatchNorm and ReLU in ``features``; three linear layers with Dropout in ``classifier``.

    Any image size. Dropout makes an attack in train mode stochastic.
    """

    def __init__(self, classes: int, channels: int, width: int, hidden: int, dropout: float):
        super().__init__()
        self.features = nn.Sequential()
        inputs = channels
        for convolutions, multiple in zip(CONVOLUTIONS, WIDTHS, strict=True):
            outputs = width * multiple
            for _ in range(convolutions):
                self.features.append(nn.Conv2d(inputs, outputs, 3, padding=1))
                self.features.append(nn.BatchNorm2d(outputs))
                self.features.append(nn.ReLU(inplace=True))
                inputs = outputs
            # Rounding up changes nothing at 32x32 or any power of two, and lets 28x28 images through five stages.
            self.features.append(nn.MaxPool2d(2, ceil_mode=True))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


def vgg19(*, classes: int = 10, channels: int = 3, width: int = 64, hidden: int = 4096, dropout: float = 0.5) -> VGG:
    """VGG19-bn (38,958,922 parameters for 10 classes).

    Args:
        width: channels of the first stage; the last ones have eight times that
        hidden: width of the two hidden linear layers
        dropout: share of the hidden activations dropped in train mode
    """
    return VGG(classes, channels, width, hidden, dropout)
