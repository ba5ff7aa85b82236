"""The latent attack: what lies behind a layer runs alone, the radius is the pixel attack's, and it pays."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from clat.behind import behind, front_of, watched
from clat.errors import InputError
from clat.layers import layer_modules, trace
from clat.network import same_bits, snapshot
from clat.objectives import Clat
from clat.threat import Threat, attack_output
from clat.training.own_loop import CLAT
from clat.training.train import train
from clat.tuners import Critical
from conftest import dies_before, same_tensors
from test_teacher import RECIPE, network

THREAT = Threat(eps=0.1, step=0.05, steps=4)


class Counted(TorchFunctionMode):
    """Counts the convolutions and linear layers that are computed."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += getattr(func, "__name__", "") in ("conv2d", "linear")
        return func(*args, **(kwargs or {}))


class InPlace(nn.Module):
    """One ReLU in all places and sums in place, as torchvision writes blocks; one convolution runs twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.relu, self.last = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu(self.conv1(x))
        out = self.norm(self.conv2(x))
        out += x
        out = self.relu(out)
        out = self.conv2(out) + out
        return self.last(self.relu(out).mean((2, 3)))


@pytest.fixture(params=["tiny", "plain", "in place"])
def model(request, tiny, plain):
    return {"tiny": tiny, "plain": plain, "in place": InPlace()}[request.param].eval()


def test_behind_every_layer_the_network_goes_on_as_it_was(model):
    x = torch.rand(4, 1, 16, 16)
    with torch.no_grad():
        expected, before = model(x), snapshot(model)
        total = len(trace(model, x[:1]))
        for number, call in enumerate(trace(model, x[:1])):
            if any(earlier.module is call.module for earlier in trace(model, x[:1])[:number]):
                continue
            front = front_of(model, x, call.module)
            for _ in range(2):
                with behind(model, front, front.feature), Counted() as counted:
                    assert torch.equal(model(x), expected), call.name
                assert counted.calls == total - number
            with watched(model, call.module) as again:
                assert torch.equal(model(x), expected)
            assert torch.equal(again.feature, front.feature)
            assert torch.equal(model(x), expected)
    assert all(same_bits(tensor, before[name]) for name, tensor in snapshot(model).items())
    assert all("forward" not in vars(module) for module in model.modules())


def test_without_shortcuts_it_is_the_network_on_other_images(plain, images):
    x, other = images[0], torch.rand(6, 1, 8, 8)
    plain.eval()
    front, wanted = front_of(plain, x, plain.second), front_of(plain, other, plain.second).feature
    with behind(plain, front, wanted):
        torch.testing.assert_close(plain(x), plain(other))


def selected(model, names, **keys):
    clat = CLAT(model, threat=THREAT, layers=names, attack="latent", **keys)
    clat.select(torch.rand(6, 1, 16, 16), torch.arange(6) % 3)
    return clat


def test_the_radius_is_what_the_pixel_attack_reaches_and_the_loss_rises(plain):
    x, y = torch.rand(6, 1, 16, 16), torch.arange(6) % 3
    clat = selected(plain, ["last", "second"])
    plain.eval()
    torch.manual_seed(3)
    assert clat.attack(x, y) is x
    torch.manual_seed(3)
    x_adv = attack_output(plain, x, y, THREAT)
    inputs = [torch.relu(plain.first_norm(plain.first(z))) for z in (x, x_adv)]
    radius = (inputs[1] - inputs[0]).flatten(1).norm(dim=1).mean()
    objective = clat._running
    assert objective.radius == pytest.approx(radius.item(), rel=1e-4)
    delta = objective.found.delta
    lengths = delta.flatten(1).norm(dim=1)
    assert lengths.max() <= objective.radius * (1 + 1e-5)
    assert lengths.min() > objective.radius / 2

    def rest(feature):
        feature = plain.second(feature)
        return feature, plain.last(torch.relu(plain.second_norm(feature)).mean((2, 3)))

    (clean, scores), (moved, attacked) = rest(inputs[0]), rest(inputs[0] + delta)
    assert F.cross_entropy(attacked, y) > F.cross_entropy(scores, y) + 0.01
    terms = clat.terms(x, x, y)
    torch.testing.assert_close(terms["cross_entropy"], F.cross_entropy(attacked, y))
    distance = (moved - clean).flatten(1).norm(dim=1) + (attacked - scores).norm(dim=1)
    torch.testing.assert_close(terms["criticality"], 0.01 * distance.mean(), rtol=1e-4, atol=1e-6)
    clat.attack(torch.rand_like(x), y)
    assert objective.radius == pytest.approx(radius.item(), rel=1e-4)  # the same until the epoch ends
    clat.begin()
    assert clat._running.radius is None


def test_an_attack_runs_the_front_once_and_the_rest_once_a_step(tiny):
    """Layer 12 of 21: 4 steps of the pixel attack compute 84 layers, those of the latent attack 11 + 4 x 10."""
    x, y = torch.rand(6, 1, 16, 16), torch.arange(6) % 3
    names = [call.name for call in trace(tiny, x[:1])]
    clat = selected(tiny, [names[15], names[11]])
    clat.attack(x, y)  # the epoch's first batch, where the radius is found
    with Counted() as latent:
        clat.attack(x, y)
    with Counted() as pixel:
        attack_output(tiny, x, y, THREAT)
    traced = len(names)  # of one image, to find the first layer that trains
    assert pixel.calls == 4 * 21 == 84
    assert latent.calls - traced == 11 + 4 * 10 == 51
    with Counted() as training:
        clat.terms(x, x, y)
    assert training.calls == 21 + 10


@pytest.mark.parametrize("cross_entropy", ["clean", "adversarial", "both"])
def test_only_what_is_selected_gets_a_gradient(tiny, cross_entropy):
    x, y = torch.rand(6, 1, 16, 16), torch.arange(6) % 3
    names = list(layer_modules(tiny))
    clat = selected(tiny, [names[-2], names[8]], cross_entropy=cross_entropy)
    clat.loss(x, y).backward()
    found = {name for name, parameter in tiny.named_parameters() if parameter.grad is not None}
    assert found == {f"{names[-2]}.weight", f"{names[8]}.weight"}


def test_a_resumed_run_ends_bit_identical(blobs, tmp_path):
    recipe = replace(RECIPE, objective=Clat(attack="latent"), tuner=Critical(k=0.25, every=2, batch=16))
    whole = train(recipe, network(), blobs, out=tmp_path / "whole")
    with dies_before("last", time=3):
        train(recipe, network(), blobs, out=tmp_path / "killed")
    killed = train(recipe, network(), blobs, out=tmp_path / "killed", resume=True)
    assert same_tensors(whole.last, killed.last)


def test_what_does_not_go_with_it_is_refused(plain, images):
    with pytest.raises(InputError, match=r"clat\.teacher needs attacked images"):
        Clat(attack="latent", teacher=0.5)
    with pytest.raises(InputError, match="call begin"):
        Clat(attack="latent").perturb(plain, *images, THREAT)
    clat = selected(plain, ["second"])
    with pytest.raises(InputError, match="call perturb on them first"):
        clat.terms(images[0], images[0], images[1])
