"""The same attacks by other libraries, at equal settings, on a tiny network: the same images, or as good as."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clat.attacks import apgd_ce, apgd_targeted, autoattack, fab_targeted, pgd_threat, square
from clat.data.dataset import Dataset
from clat.evaluation.evaluate import evaluate
from clat.threat import Threat, ascend

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import peers

EPS = 4 / 255


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Ten classes; no pooling, so that images differ in how easily they are broken."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(1, 8, 3, stride=2, padding=1)
    model = nn.Sequential(nn.BatchNorm2d(1, momentum=1.0), convolution, nn.Tanh(), nn.Flatten(), nn.Linear(128, 10))
    model(torch.rand(32, 1, 8, 8))
    return model.eval()


@pytest.fixture(scope="module")
def data(model) -> Dataset:
    """Forty images labelled as the network sees them, two of them wrongly."""
    pixels = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = model(pixels.float() / 255).argmax(1)
    labels[:2] = (labels[:2] + 1) % 10
    return Dataset(pixels, labels, tuple("abcdefghij"), "noise", "test")


@pytest.fixture
def torchattacks():
    return pytest.importorskip(
        "torchattacks", reason="torchattacks is not installed: pip install --no-deps torchattacks"
    )


@pytest.fixture
def foolbox():
    return pytest.importorskip("foolbox", reason="no foolbox: pip install foolbox")


def last_iterate(model, x, y, threat):
    return ascend(lambda z: F.cross_entropy(model(z), y, reduction="none"), x, threat, model=model)


def batch(data):
    return data.pixels.float() / 255, data.labels


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("library", ["torchattacks", "foolbox"])
def test_pgd_from_the_image_makes_the_same_images(library, norm, model, data, request):
    request.getfixturevalue(library)
    x, y = batch(data)
    threat = replace(pgd_threat({"linf": 8 / 255, "l2": 0.3}[norm], 20, norm), start="zero")
    theirs = peers.PGDS[library](model, x, y, threat)
    torch.testing.assert_close(last_iterate(model, x, y, threat), theirs, atol=1e-5, rtol=0)
    assert threat.distance(theirs, x).max() > 0.9 * threat.radius


@pytest.mark.usefixtures("torchattacks")
def test_pgd_from_the_same_random_start_makes_the_same_images(model, data):
    x, y = batch(data)
    torch.manual_seed(3)
    theirs = peers.by_torchattacks(model, x, y, pgd_threat(8 / 255, 20))
    torch.manual_seed(3)
    torch.testing.assert_close(last_iterate(model, x, y, pgd_threat(8 / 255, 20)), theirs, atol=1e-5, rtol=0)


def test_momentum_is_that_of_mifgsm(torchattacks, model, data):
    x, y = batch(data)
    theirs = torchattacks.MIFGSM(model, eps=8 / 255, alpha=2 / 255, steps=10, decay=0.7)(x, y)
    threat = Threat(eps=8 / 255, step=2 / 255, steps=10, start="zero")
    ours = ascend(lambda z: F.cross_entropy(model(z), y, reduction="none"), x, threat, model=model, momentum=0.7)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert not torch.allclose(last_iterate(model, x, y, threat), theirs, atol=1e-5)


@pytest.mark.parametrize("start", ["zero", "uniform"])
@pytest.mark.parametrize("library", ["torchattacks", "foolbox"])
def test_robust_accuracy_under_pgd_is_within_a_point(library, start, model, data, request):
    request.getfixturevalue(library)
    threat = replace(pgd_threat(EPS, 20), start=start)
    ours = [outcome == 0 for outcome in evaluate(model, data, threat).outcomes]
    theirs = peers.robust(model, data, peers.PGDS[library], threat)
    assert abs(sum(ours) - sum(theirs)) <= 0.01 * len(data)
    assert 5 < sum(ours) < 35


STEPS, QUERIES = 5, 50
SHORT = {
    "apgd-ce": lambda eps, norm: apgd_ce(eps, norm, steps=STEPS),
    "apgd-t": lambda eps, norm: apgd_targeted(eps, 10, norm, steps=STEPS),
    "fab-t": lambda eps, norm: fab_targeted(eps, 10, norm, steps=STEPS),
    "square": lambda eps, norm: square(eps, norm, queries=QUERIES),
}


def shorten(adversary):
    adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = adversary.fab.n_iter = STEPS
    adversary.square.n_queries = QUERIES
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = 9


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("names", [[name] for name in SHORT] + [list(SHORT)], ids=lambda names: "+".join(names))
def test_the_parts_of_autoattack_leave_the_images_that_pyautoattack_leaves(names, norm, model, data):
    eps = {"linf": EPS, "l2": 6 * EPS}[norm]
    attacks = [SHORT[name](eps, norm) for name in names]
    ours = peers.through_evaluate(model, data, attacks, batch_size=15)
    theirs = peers.by_pyautoattack(model, data, eps, names, norm=norm, batch_size=15, shorten=shorten)
    assert ours == theirs
    assert 3 < sum(ours) < 38


def test_autoattack_is_pyautoattacks_standard_version(model, data):
    """Slow (20 s): Square asks 5,000 times, twice. Nothing shorter shows that the parts have their published steps."""
    few = data.subset(torch.arange(8))
    ours = peers.through_evaluate(model, few, autoattack(EPS, 10))
    assert ours == peers.by_pyautoattack(model, few, EPS)
    assert 0 < sum(ours) < 6


@pytest.mark.usefixtures("torchattacks", "foolbox")
def test_the_tool_writes_what_it_measures_and_does_it_once(model, data, tmp_path, capsys):
    target = tmp_path / "peers.json"
    arguments = {"plain": model}, data.subset(torch.arange(10)), data.subset(torch.arange(2, 4)), target
    peers.compare(*arguments, eps=EPS)
    found = json.loads(target.read_text())
    assert {"torchattacks", "foolbox", "pyautoattack"} < set(found["about"]["packages"])
    plain = found["networks"]["plain"]
    assert plain["PGD-20 from the images"]["foolbox"]["points_apart"] == 0
    assert plain["AutoAttack as in pyautoattack"]["images_that_differ"] == 0
    assert plain["AutoAttack as in pyautoattack"]["peer"]["n"] == 2
    assert capsys.readouterr().out.count("\n") == 4
    peers.compare(*arguments, eps=EPS)
    assert capsys.readouterr().out == ""
    assert json.loads(target.read_text()) == found
