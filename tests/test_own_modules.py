"""Modules as users write them: without parameters, with operations in place, a layer used twice, frozen parts, and
outputs of their own."""

from collections import namedtuple
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clat.errors import InputError
from clat.evaluation.evaluate import evaluate
from clat.layers import find_layers
from clat.network import class_scores, logits, snapshot
from clat.objectives import Clat, PgdAt
from clat.threat import Threat
from clat.training.own_loop import CLAT
from clat.training.recipe import Recipe
from clat.training.train import train
from clat.tuners import Critical, Whole

RECIPE = {"epochs": 2, "batch_size": 40, "holdout": 40, "validation_steps": 1, "health": False, "precision": "fp32"}
CRITICAL = {
    "the label attack": (Clat(), {}),
    "the feature attack": (Clat(attack="feature", distance="relative"), {"at": "activation"}),
    "the latent attack": (Clat(attack="latent"), {}),
    "the ranking by loss": (Clat(), {"ranking": "loss"}),
}


class Net(nn.Module):
    """Two convolutions, the second of which may run twice, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 3)

    def features(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        return F.relu(self.norm(self.second(y)) + y).mean((2, 3))

    def forward(self, x: Tensor) -> object:
        return self.last(self.features(x))


class InPlace(Net):
    def features(self, x):
        y = self.first(x).relu_()
        z = self.norm(self.second(y))
        z += y
        return z.relu_().mean((2, 3))


class Twice(Net):
    def features(self, x):
        return F.relu(self.norm(self.second(super().features(x)[:, :, None, None].expand(-1, -1, 6, 6)))).mean((2, 3))


class OnItsImages(Net):
    def forward(self, x):
        return super().forward(x.sub_(0.5).div_(0.25))


class Overwriting(Net):
    def features(self, x):
        y = self.norm(self.second(F.relu(self.first(x)))).relu()
        y[:, :1] *= 2  # the gradient of relu needs what stood there
        return y.mean((2, 3))


class Fixed(nn.Module):
    """Knows the bright bar of ``blobs`` and has nothing to train."""

    def forward(self, x):
        return 20 * x.unflatten(2, (3, 4)).mean((1, 3, 4))


@dataclass
class Answer:
    features: Tensor
    logits: Tensor


@dataclass
class Other:
    features: Tensor
    scores: Tensor


Named = namedtuple("Named", "features logits")
USUAL = {
    "an object": lambda features, scores: Answer(features, scores),
    "a named tuple": lambda features, scores: Named(features, scores),
    "a dict": lambda features, scores: {"features": features, "logits": scores},
    "a tuple with maps": lambda features, scores: (features[:, :, None, None], scores),
    "auxiliary heads": lambda features, scores: [scores, 2 * scores],
}
UNUSUAL = {
    "no class scores": (
        lambda features, scores: Other(features, scores),
        "returned Other, in which clat finds no class",
    ),
    "nothing": (lambda features, scores: None, "returned nothing, in which"),
    "a pair": (lambda features, scores: (features, scores), "(1, 4) and (1, 3), and does not say which"),
    "a dict": (lambda features, scores: {"a": features, "b": scores}, "(1, 4) and (1, 3), and does not say which"),
}


def answering(answer):
    """A network that returns what ``answer`` makes of features (batch, 4) and class scores (batch, 3)."""

    class Answering(Net):
        def forward(self, x):
            features = self.features(x)
            return answer(features, self.last(features))

    torch.manual_seed(0)
    return Answering()


def trained(network, data, folder, objective, tuner):
    torch.manual_seed(0)
    run = train(Recipe(**RECIPE, objective=objective, tuner=tuner, threat=Threat(steps=2)), network, data, out=folder)
    times = ("seconds", "validation_seconds", "peak_memory_bytes")
    return {key: value for key, value in run.result["best"].items() if key not in times}


def step(network, data):
    """One step of CLAT; returns the selected layers and the loss."""
    clat = CLAT(network, steps=2)
    x, y = data.pixels[:30].float() / 255, data.labels[:30]
    before = x.clone()
    optimizer = torch.optim.SGD(clat.select(x, y), lr=0.1)
    loss = clat.loss(x, y)
    loss.backward()
    optimizer.step()
    clat.verify()
    assert torch.equal(x, before)
    return clat.layers, loss.item()


@pytest.mark.parametrize("name", CRITICAL)
def test_operations_in_place_change_no_number(name, blobs, tmp_path):
    objective, keys = CRITICAL[name]
    found = []
    for number, kind in enumerate((Net, InPlace)):
        torch.manual_seed(0)
        network = kind()
        found.append(trained(network, blobs, tmp_path / str(number), objective, Critical(**keys)))
        assert str(evaluate(network, blobs.first(20)).robust)
    assert found[0] == found[1]


@pytest.mark.parametrize("name", CRITICAL)
def test_a_layer_that_runs_twice_trains_for_both(name, blobs, tmp_path):
    objective, keys = CRITICAL[name]
    network = Twice()
    before = snapshot(network)
    best = trained(
        network, blobs, tmp_path / "run", objective, Critical(layers=["second"], at=keys.get("at", "output"))
    )
    assert best["trainable"] == 148
    changed = {key for key, tensor in network.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {"second.weight", "second.bias"}


def test_what_was_frozen_stays_frozen_whatever_trains(blobs, tmp_path):
    for number, tuner in enumerate((Critical(k=1), Whole())):
        network = Net()
        network.first.requires_grad_(False)
        before = network.first.weight.clone()
        with pytest.warns(UserWarning, match="frozen already") if number == 0 else nullcontext():
            best = trained(network, blobs, tmp_path / str(number), PgdAt(), tuner)
        assert best["trainable"] == (148, 171)[number]
        assert torch.equal(network.first.weight, before)
        assert not network.first.weight.requires_grad


def test_a_network_without_parameters_is_measured_but_not_trained(blobs, tmp_path):
    assert evaluate(Fixed(), blobs.first(30)).clean.correct == 30
    with pytest.raises(InputError, match="Fixed has no parameters, so there is nothing to train"):
        trained(Fixed(), blobs, tmp_path / "run", PgdAt(), Whole())
    with pytest.raises(InputError, match="no parameters"):
        CLAT(Fixed())
    with pytest.raises(InputError, match="no layer to rank"):
        find_layers(Fixed(), torch.rand(1, 1, 12, 12))


def test_a_network_that_changes_its_images_is_refused_everywhere(blobs, tmp_path):
    for use in (
        lambda network: class_scores(network, torch.rand(2, 1, 12, 12)),
        lambda network: find_layers(network, torch.rand(2, 1, 12, 12)),
        lambda network: step(network, blobs),
        lambda network: evaluate(network, blobs.first(5)),
        lambda network: trained(network, blobs, tmp_path / "run", PgdAt(), Whole()),
    ):
        with pytest.raises(InputError, match=r"changes its images in place; let it begin with a copy"):
            use(OnItsImages())


def test_a_network_that_overwrites_what_its_gradient_needs_is_named(blobs, tmp_path):
    for use in (
        lambda network: step(network, blobs),
        lambda network: evaluate(network, blobs.first(5)),
        lambda network: trained(network, blobs, tmp_path / "run", PgdAt(), Whole()),
    ):
        with pytest.raises(InputError, match="in place that its own gradient needs"):
            use(Overwriting())


@pytest.mark.parametrize("kind", USUAL)
def test_class_scores_are_found_in_outputs_of_ones_own(kind, blobs):
    torch.manual_seed(0)
    expected = step(Net(), blobs)
    torch.manual_seed(0)
    network = answering(USUAL[kind])
    torch.manual_seed(0)
    assert step(answering(USUAL[kind]), blobs)[0] == expected[0]
    x = blobs.pixels[:5].float() / 255
    assert torch.equal(logits(network.eval()(x)), network.last(network.features(x)))
    assert evaluate(network, blobs.first(10)).clean.n == 10


@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_output_that_does_not_say_which_are_the_scores_is_refused(kind, blobs):
    answer, says = UNUSUAL[kind]
    with pytest.raises(InputError) as error:
        step(answering(answer), blobs)
    assert says in str(error.value)
