"""The steps that the bench times: those of this library, and the bare arithmetic under each."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from clat import build_model
from clat.compute import Precision, autocast
from clat.data.dataset import augment, to_unit
from clat.layers import trace
from clat.models import Normalized
from clat.objectives import Clat, Objective, PgdAt
from clat.threat import Threat
from clat.training.optimizer import make_optimizer
from clat.training.own_loop import OwnLoop
from clat.training.recipe import Recipe
from clat.tuners import Critical, Selection, Tuner, Whole

Step = Callable[[], Any]

EPS, LENGTH, STEPS = 0.03, 0.007, 10  # Section 4.1

# The first k layers of the paper's Table 3, k of its Section 4.1; PreActResNet-18, not listed there, has ResNet-18's.
SELECTIONS = {
    "rn18": (11,),
    "rn50": (34, 41, 48),
    "dn121": (39, 14, 1, 3, 88),
    "vgg19": (9,),
    "preactrn18": (11,),
    "wrn34-10": (26, 1),
}


@dataclass(frozen=True)
class Training:
    """What a step trains with."""

    objective: Objective
    tuner: Tuner
    threat: Threat = field(default_factory=Threat)
    precision: Precision = "auto"  # what the device computes in natively


PGD_AT = Training(PgdAt(), Whole())
FEATURE = Training(Clat(attack="feature"), Critical())
LABEL = Training(Clat(attack="label"), Critical())


def network(name: str, device: str, **options: Any) -> Normalized:
    """A network of 10 classes for 32x32 images, its weights drawn from seed 0."""
    torch.manual_seed(0)
    return build_model(name, 10, **options).to(device)


def images(count: int, device: str) -> tuple[Tensor, Tensor]:
    """Random uint8 images (count, 3, 32, 32) with labels: what they show costs no time."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return pixels.to(device), (torch.arange(count) % 10).to(device)


def layer_names(model: nn.Module, indices: Sequence[int]) -> list[str]:
    """The dotted names of the layers with these numbers of the paper."""
    device = next(model.parameters()).device
    names = {call.index: call.name for call in trace(model, torch.zeros(1, 3, 32, 32, device=device))}
    return [names[index] for index in indices]


# This library


def ours(
    training: Training,
    model: nn.Module,
    pixels: Tensor,
    y: Tensor,
    selected: Sequence[int] = (),
    share: Callable[[list[nn.Parameter]], None] = lambda _: None,
) -> Step:
    """A step of the training loop, from uint8 pixels to the moved weights; CLAT's with these layers selected.

    Args:
        share: averages the gradients over processes
    """
    x = to_unit(pixels)
    method = OwnLoop(model, training.objective, training.tuner, training.threat, precision=training.precision)
    if selected:
        names = layer_names(model, selected)
        prefixes = tuple(f"{name}." for name in names)
        trainable = tuple(name for name, _ in model.named_parameters() if name.startswith(prefixes))
        method.take(Selection(epoch=1, layers=tuple(names), trainable=trainable))
    else:
        method.select(x, y)
    optimizer = make_optimizer(Recipe(), model)

    def step() -> None:
        x = to_unit(augment(pixels))
        method.update(optimizer, x, method.attack(x, y), y, share=share)

    return step


# The bare arithmetic: the same passes through the same network in the same precision and layout, and nothing else


def pgd_at_floor(
    model: nn.Module, pixels: Tensor, y: Tensor, *, steps: int = STEPS, precision: Precision = "auto"
) -> Step:
    """``steps`` forward passes with a gradient to the images, then one forward and one full backward pass."""
    x = to_unit(pixels)

    def step() -> None:
        with frozen(model), autocast(x.device, precision):
            ascend_floor(lambda z: F.cross_entropy(model(z), y), x, steps)
        model.train()
        with autocast(x.device, precision):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def clat_floor(
    model: Normalized,
    pixels: Tensor,
    y: Tensor,
    selected: Sequence[int],
    *,
    feature: bool,
    steps: int = STEPS,
    precision: Precision = "auto",
) -> Step:
    """The same for CLAT: its passes through a network that is cut off at the deepest selected layer.

    For the feature attack, one pass for the clean features and ``steps`` passes with a gradient to the images, all as
    far as the deepest layer; for the label attack, ``steps`` passes through the whole network. Then the loss: one
    forward pass, one as far as the deepest layer, and back to the selected layers.
    """
    names = [name.removeprefix("network.") for name in layer_names(model, selected)]
    model.eval()
    until = create_feature_extractor(model.network, {name: name for name in names})
    output = get_graph_node_names(model.network)[1][-1]  # of the graph in eval mode
    whole = create_feature_extractor(model.network, {name: name for name in [*names, output]})
    x = to_unit(pixels)
    trained = [parameter for name in names for parameter in model.network.get_submodule(name).parameters()]

    def normalise(z: Tensor) -> Tensor:
        return (z - model.mean) / model.std

    def attack() -> None:
        if feature:
            with torch.no_grad():
                clean = until(normalise(x))
            ascend_floor(lambda z: distance(clean, until(normalise(z))), x + 0.01, steps)
        else:
            ascend_floor(lambda z: F.cross_entropy(model(z), y), x, steps)

    def step() -> None:
        with frozen(model, until, whole), autocast(x.device, precision):
            attack()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        with autocast(x.device, precision):
            found = whole(normalise(x))
            features = {name: found[name] for name in names}
            other = until(normalise(x + 0.01))
            loss = F.cross_entropy(found[output], y) + 0.01 * distance(features, other).mean()
        loss.backward()
        for parameter in trained:
            parameter.grad = None

    return step


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> Tensor:
    """Eq. 7: one value an image."""
    parts = [(second[name].float() - first[name].float()).flatten(1).norm(dim=1) for name in first]
    return torch.stack(parts).sum(dim=0)


def ascend_floor(cost: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> None:
    for _ in range(steps):
        z = x.detach().requires_grad_()
        torch.autograd.grad(cost(z).sum(), z)


@contextmanager
def frozen(model: nn.Module, *also: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients, afterwards parameter gradients again."""
    for module in (model, *also):
        module.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    yield
    for parameter in model.parameters():
        parameter.requires_grad_(True)
