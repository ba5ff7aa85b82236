"""Attacks through features, against closed forms and a plain loop; what they need and what they leave alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from clat.attacks import Attack, activation, pgd_threat, restarts, through_layers
from clat.attacks.features import margin
from clat.compute import seeded
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.evaluation.evaluate import evaluate
from clat.features import feature_distance
from clat.network import held, same_bits, snapshot
from clat.threat import Threat, ascend

EPS = 8 / 255


class Linear(nn.Module):
    """Two classes by the sign of one linear feature."""

    def __init__(self):
        super().__init__()
        self.feature = nn.Linear(16, 1)

    def forward(self, x):
        feature = self.feature(x.flatten(1) - 0.5)
        return torch.cat([-feature, feature], 1)


class Masked(nn.Module):
    """Bright if the mean pixel is above ``threshold``, decided by a sign, which has no gradient."""

    def __init__(self, threshold: float):
        super().__init__()
        self.feature = nn.Conv2d(1, 1, 4)
        nn.init.constant_(self.feature.weight, 1 / 16)
        nn.init.constant_(self.feature.bias, -threshold)

    def forward(self, x):
        bright = self.feature(x).flatten(1).sign()
        return torch.cat([-bright, bright], 1)


def run(attack: Attack, model: nn.Module, x, y):
    """The attack as ``evaluate`` runs it."""
    with seeded(attack.seed, "cpu"), held(model):
        return attack.perturb(model, x, y)


@pytest.mark.parametrize(("norm", "order"), [("linf", 1), ("l2", 2)])
def test_a_linear_network_in_closed_form(norm, order):
    model, x = Linear(), torch.full((5, 1, 4, 4), 0.5) + 0.1 * torch.rand(5, 1, 4, 4)
    y = model(x).argmax(1)
    weight = model.feature.weight.detach()[0]
    farthest = EPS * torch.linalg.vector_norm(weight, ord=order)  # the dual norm of the weights

    distance = feature_distance(model, x, {"feature": model.feature})
    x_adv = ascend(distance, x, Threat(eps=EPS, step=EPS / 4, steps=20, norm=norm), model=model)
    torch.testing.assert_close(distance(x_adv).detach(), farthest.expand(5))

    x_adv = run(through_layers(["feature"], EPS, norm), model, x, y)
    with torch.no_grad():
        torch.testing.assert_close(margin(model(x_adv), y), margin(model(x), y) + 2 * farthest)


def test_the_margin_by_hand():
    scores = torch.tensor([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0], [3.0, 3.0, 0.0]])
    assert margin(scores, torch.tensor([1, 0, 0])).tolist() == [-2.0, 3.0, 0.0]


@pytest.mark.filterwarnings("ignore:The scores have a gradient of exactly zero")
def test_a_masked_label_gradient_does_not_help():
    """Noise raises the mean of black images by eps / 4 on average, the ball allows eps; the threshold is 0.6 eps."""
    data = Dataset(torch.zeros(20, 1, 4, 4, dtype=torch.uint8), torch.zeros(20, dtype=torch.long), ("dark", "bright"),
                   "black", "test")  # fmt: skip
    model = Masked(0.6 * EPS)
    assert evaluate(model, data, restarts(pgd_threat(EPS, 20))).robust.correct == 20
    assert evaluate(model, data, [through_layers(["feature"], EPS)]).robust.correct == 0


def test_at_least_as_strong_as_its_parts(tiny, images):
    """Neither the start nor the ascents on cross-entropy and margin, redone here, ever have a larger margin."""
    x, y = images
    attack = through_layers(["network.layer3.0.conv1", "network.layer4.1.conv2"], 0.1, steps=3)
    modules = {name: tiny.get_submodule(name) for name in attack.settings["layers"]}
    with torch.no_grad():
        found = margin(tiny.eval()(run(attack, tiny, x, y)), y)
    with seeded(0, "cpu"):
        start = ascend(feature_distance(tiny, x, modules), x, attack.threat, model=tiny)
    costs = [lambda z: nn.functional.cross_entropy(tiny(z), y, reduction="none"), lambda z: margin(tiny(z), y)]
    parts = [start, *(ascend(cost, x, attack.threat, model=tiny, keep="best", start=start) for cost in costs)]
    with torch.no_grad():
        margins = torch.stack([margin(tiny(part), y) for part in parts])
    torch.testing.assert_close(found, margins.amax(0))
    assert (margins[0] < found).any()


@pytest.fixture
def guides(images) -> Dataset:
    return Dataset((images[0] * 255).byte().flip(0), images[1].flip(0), ("a", "b", "c"), "guides", "test")


@pytest.mark.parametrize("kind", ["through_layers", "activation"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_ball_box_network_and_seed(kind, norm, plain, images, guides):
    x, y = images[0].round(decimals=0), images[1]  # pixels on the border of the box
    before, training = snapshot(plain), plain.training
    attack = (
        through_layers(["first", "second"], 0.2, norm, steps=3)
        if kind == "through_layers"
        else activation("second", guides, 0.2, norm, steps=3)
    )
    x_adv = run(attack, plain, x, y)
    assert attack.threat.distance(x_adv, x).max() <= 0.2 + 1e-6
    assert attack.threat.distance(x_adv, x).min() > 0
    assert 0 <= x_adv.min() <= x_adv.max() <= 1
    assert all(same_bits(tensor, before[name]) for name, tensor in snapshot(plain).items())
    assert plain.training == training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in plain.parameters())
    assert torch.equal(run(attack, plain, x, y), x_adv)
    assert not torch.equal(run(replace(attack, seed=1), plain, x, y), x_adv)


def test_the_activation_attack_is_a_plain_momentum_loop(plain):
    """The formula of Inkawhich et al., written out, on the feature before the normalisation."""
    x, guide = torch.rand(4, 1, 8, 8), torch.randint(0, 256, (1, 1, 8, 8), dtype=torch.uint8)
    y, eps, steps = torch.zeros(4, dtype=torch.long), 0.1, 5
    guides = Dataset(guide, torch.ones(1, dtype=torch.long), ("a", "b", "c"), "one", "test")
    x_adv = run(activation("first", guides, eps, steps=steps), plain, x, y)

    plain.eval()
    target = plain.first(guide.float() / 255).detach()
    delta, direction = torch.zeros_like(x), torch.zeros_like(x)
    for _ in range(steps):
        delta.requires_grad_()
        distance = ((plain.first(x + delta) - target) ** 2).flatten(1).sum(1).sqrt().sum()
        (gradient,) = torch.autograd.grad(distance, delta)
        direction = direction + gradient / gradient.abs().sum((1, 2, 3), keepdim=True)
        delta = (delta.detach() - eps / steps * direction.sign()).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x
    torch.testing.assert_close(x_adv, x + delta)


def test_guides_are_of_another_class_and_drawn_from_all_of_them():
    """The feature is the image itself, so that the attack moves towards the guide's level of grey."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(4, 3))
    nn.init.ones_(model[0].weight), nn.init.zeros_(model[0].bias)
    levels = torch.tensor([0, 255, 127]).byte().view(3, 1, 1, 1).expand(3, 1, 2, 2)  # of class 0, 1 and 2
    guides = Dataset(levels.contiguous(), torch.arange(3), ("black", "white", "grey"), "levels", "test")
    y = torch.arange(3).repeat(20)
    x = torch.full((60, 1, 2, 2), 0.25)
    moved = (run(activation("0", guides, 0.1), model, x, y) - x).mean((1, 2, 3)).div(0.1).round().int()
    towards = [set(moved[y == label].tolist()) for label in range(3)]
    assert towards == [{1}, {-1, 1}, {-1, 1}]  # black is the only guide that is darker


def test_what_cannot_be_attacked_is_refused(plain, images, guides):
    with pytest.raises(InputError, match="at least one layer"):
        through_layers([], EPS)
    with pytest.raises(InputError, match="no layer 'third'; clat layers lists them: first, second, last"):
        run(through_layers(["first", "third"], EPS), plain, *images)
    with pytest.raises(InputError, match="no layer 'first_norm'"):
        run(activation("first_norm", guides, EPS), plain, *images)
    with pytest.raises(InputError, match="1 or more"):
        activation("first", guides, EPS, steps=0)
    alike = replace(guides, labels=torch.zeros(6, dtype=torch.long))
    with pytest.raises(InputError, match="another class"):
        run(activation("first", alike, EPS), plain, *images)
