"""The start of a run as its teacher: the term's value, and that a resumed run has the same teacher."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from clat.errors import InputError
from clat.models import build_model
from clat.network import same_bits, snapshot
from clat.objectives import Clat
from clat.threat import Threat
from clat.training.own_loop import CLAT
from clat.training.recipe import Recipe
from clat.training.train import train
from clat.tuners import Critical
from conftest import dies_before, same_tensors

RECIPE = Recipe(
    objective=Clat(teacher=0.6, weight=0.1),
    tuner=Critical(k=2, every=2, batch=16),
    threat=Threat(eps=0.1, step=0.05, steps=1),
    epochs=3,
    batch_size=32,
    lr=0.05,
    holdout=60,
    validation_steps=1,
    precision="fp32",
    layout="contiguous",
    health=False,
)


def network(seed=0):
    torch.manual_seed(seed)
    return build_model("rn18", 3, channels=1, width=8, mean=[0.3], std=[0.2])


@pytest.mark.parametrize("cross_entropy", ["adversarial", "clean", "both"])
def test_the_teacher_is_the_network_as_it_was(plain, images, cross_entropy):
    x, y = images
    clat = CLAT(plain, teacher=0.6, temperature=3, cross_entropy=cross_entropy, threat=RECIPE.threat)
    before = {name: tensor.clone() for name, tensor in snapshot(plain).items()}
    parameters = clat.select(x, y)
    x_adv = clat.attack(x, y)
    assert clat.terms(x, x_adv, y)["teacher"].item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.3 * torch.randn_like(parameter)
    plain.eval()
    on = {"adversarial": [x_adv], "clean": [x], "both": [x_adv, x]}[cross_entropy]
    after = [plain(z) for z in on]
    found = clat.terms(x, x_adv, y)
    start = clat.start
    assert all(same_bits(tensor, before[name]) for name, tensor in snapshot(start).items())
    divergences = []
    for z, scores in zip(on, after, strict=True):
        p, q = torch.softmax(start(z) / 3, 1), torch.softmax(scores / 3, 1)
        divergences.append((p * (p.log() - q.log())).sum(1).mean())
    expected = 0.6 * 9 * torch.stack(divergences).mean()
    assert expected > 1e-3
    torch.testing.assert_close(found["teacher"], expected, rtol=1e-4, atol=1e-6)
    cross = torch.stack([F.cross_entropy(scores, y) for scores in after]).mean()
    torch.testing.assert_close(found["cross_entropy"], cross)
    assert not any(parameter.requires_grad for parameter in start.parameters())


def test_without_a_teacher_no_copy_is_kept(plain):
    assert CLAT(plain).start is None


def test_a_resumed_run_has_the_same_teacher_bit_for_bit(blobs, tmp_path):
    whole = train(RECIPE, network(), blobs, out=tmp_path / "whole")
    assert [entry["loss/teacher"] > 0 for entry in whole.metrics] == [True, True, True]
    with dies_before("last", time=3):
        train(RECIPE, network(), blobs, out=tmp_path / "killed")
    with pytest.raises(InputError, match="began with other weights"):
        train(RECIPE, network(seed=1), blobs, out=tmp_path / "killed", resume=True)
    killed = train(RECIPE, network(), blobs, out=tmp_path / "killed", resume=True)
    assert [entry["loss/teacher"] for entry in killed.metrics] == [entry["loss/teacher"] for entry in whole.metrics]
    assert same_tensors(whole.last, killed.last)


def test_values_that_make_no_teacher_are_refused(plain, images):
    for keys in ({"teacher": -0.1}, {"temperature": 0}):
        with pytest.raises(InputError, match=r"clat\.te"):
            Clat(**keys)
    with pytest.raises(InputError, match="call begin"):
        replace(Clat(), teacher=0.5).loss(plain, images[0], *images)
