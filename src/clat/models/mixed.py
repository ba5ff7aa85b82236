"""The mixed classifier of Bai et al.: a robust and an accurate network, blended by probability."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clat.errors import InputError
from clat.models.preact_resnet import PreActBlock
from clat.network import first_tensor, held, logits

# The two feature maps of each kind of network that the mixing network reads: the ends of its first two stages.
MAPS = {
    "rn18": ("layer1", "layer2"),
    "rn50": ("layer1", "layer2"),
    "preactrn18": ("layer1", "layer2"),
    "dn121": ("features.denseblock1", "features.denseblock2"),
    "vgg19": ("features.6", "features.13"),
    "wrn34-10": ("block1", "block2"),
    "wrn70-16": ("block1", "block2"),
    "rawrn70-16": ("block1", "block2"),
}

CLAMP = 0.6  # while statistics are learned, gamma is cut this many standard deviations from the batch's mean
SMALLEST_SHARE = 1e-6  # of either network where the share is learned: the gradient of its logarithm stays finite


class MixingNetwork(nn.Module):
    """The robust network's share of each image, shape (batch, 1), from feature maps at two depths.

    Three stages of two pre-activation blocks of stride 2 at widths w, 2w, 4w; the second depth's maps join after the
    first through a 1x1 convolution; pooling and one linear unit give gamma, which is standardised by running
    statistics. The share is ``low + (high - low) * sigmoid(scale * gamma + bias)``.
    """

    def __init__(self, first: int, second: int, width: int, gamma: Sequence[float], interval: Sequence[float]) -> None:
        super().__init__()
        inputs = first
        for stage in range(3):
            outputs = width * 2**stage
            blocks = (PreActBlock(inputs, outputs, 2, "activated"), PreActBlock(outputs, outputs, 1, "activated"))
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            inputs = outputs
        self.fuse = nn.Conv2d(second, width, 1, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(inputs, 1, bias=False)
        self.norm = nn.BatchNorm1d(1, affine=False, momentum=0.01)
        self.scale, self.bias = gamma
        self.low, self.high = interval

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        x = self.get_submodule("layer1")(first)
        x = x + F.adaptive_avg_pool2d(self.fuse(second), x.shape[2:])
        x = self.get_submodule("layer3")(self.get_submodule("layer2")(x))
        gamma = self.linear(self.pool(x).flatten(1)).float()
        if self.norm.training:
            spread = CLAMP * gamma.std(correction=0)
            gamma = gamma.clamp(gamma.mean() - spread, gamma.mean() + spread)
        share = torch.sigmoid(self.scale * self.norm(gamma) + self.bias)
        return self.low + (self.high - self.low) * share


class MixedClassifier(nn.Module):
    """``log[(1 - a) softmax(s_g g(x)) + a softmax(s_h h(x))]``, g the accurate network and h the robust one.

    The share a is one number, or each image's own from a ``MixingNetwork`` that reads two feature maps of each.
    Layers run, and are numbered, in this order: g, h, the mixing network; so CLAT leaves out only the head that runs
    last, and the first layer of h is compared with the head of g. The output (batch, classes) is a logarithm
    of probabilities, in float32.

    Args:
        accurate, robust: classifiers of the same images and classes
        maps: the dotted names of two modules in ``accurate`` and of two in ``robust`` whose outputs are feature maps
            (batch, channels, height, width); only read with a learned share
        channels: number of image channels
        alpha: the share a in [0, 1], or "learned"
        temperature: the scales (s_g, s_h)
        width: of the mixing network's first stage; 256 is Bai et al.'s for two ResNet-18
        gamma: the mixing network's scale and bias before the sigmoid; Bai et al. train with (2, 0.4) and evaluate
            with up to (2, 1.3)
        interval: the lowest and highest learned share; Bai et al. evaluate with (0.84, 0.99) on CIFAR-10
    Raises:
        InputError: a share outside [0, 1]

    Source: Bai et al. 2023, "Improving the Accuracy-Robustness Trade-Off of Classifiers via Adaptive Smoothing".
    """

    def __init__(
        self,
        accurate: nn.Module,
        robust: nn.Module,
        maps: Sequence[Sequence[str]],
        *,
        channels: int = 3,
        alpha: float | Literal["learned"] = 0.5,
        temperature: Sequence[float] = (1.0, 1.0),
        width: int = 256,
        gamma: Sequence[float] = (2.0, 0.4),
        interval: Sequence[float] = (0.0, 1.0),
    ):
        super().__init__()
        self.accurate, self.robust = accurate, robust
        self.temperature = tuple(temperature)
        self.maps = tuple(tuple(names) for names in maps)
        self.alpha = alpha
        if alpha != "learned":
            if isinstance(alpha, str) or not 0 <= alpha <= 1:
                raise InputError(f"alpha is {alpha!r}; give the robust network's share from 0 to 1, or learned.")
            return
        low, high = interval
        if not 0 <= low < high <= 1:
            raise InputError(f"interval is {tuple(interval)}; give the lowest and highest share, both from 0 to 1.")
        with torch.no_grad(), held(self):
            x = torch.zeros(1, channels, 32, 32, device=next(self.parameters()).device)
            first, second = self._run(x)[2:]
        self.mixing = MixingNetwork(first.shape[1], second.shape[1], width, gamma, interval)

    def forward(self, x: Tensor) -> Tensor:
        if self.alpha == "learned":
            accurate, robust, first, second = self._run(x)
            share = self.mixing(first, second).clamp(SMALLEST_SHARE, 1 - SMALLEST_SHARE)
        else:
            accurate, robust = self.accurate(x), self.robust(x)
            share = logits(robust).new_full((1, 1), float(self.alpha))
        return torch.logaddexp(
            torch.log1p(-share) + F.log_softmax(self.temperature[0] * logits(accurate), dim=1),
            torch.log(share) + F.log_softmax(self.temperature[1] * logits(robust), dim=1),
        )

    def _run(self, x: Tensor) -> tuple[Any, Any, Tensor, Tensor]:
        """Both networks' outputs, and both networks' feature maps at the first depth and at the second."""
        with _outputs(self.accurate, self.maps[0]) as of_accurate, _outputs(self.robust, self.maps[1]) as of_robust:
            accurate, robust = self.accurate(x), self.robust(x)
        first, second = (
            torch.cat([F.adaptive_avg_pool2d(mine, other.shape[2:]), other], 1)  # type: ignore[arg-type]
            for mine, other in zip(of_accurate, of_robust, strict=True)
        )
        return accurate, robust, first, second


@contextmanager
def _outputs(model: nn.Module, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """A list that a forward pass inside fills with the named modules' outputs, in the order they run."""
    found: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *call: found.append(first_tensor(call[-1])))
        for name in names
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
