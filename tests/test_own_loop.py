"""CLAT in a loop of one's own."""

import pytest
import torch
from torch import nn

import clat
from clat import CLAT, InputError, IntegrityError
from clat.integrity import same_bits, snapshot
from clat.objectives import Clat


def test_the_names_of_the_design_are_offered():
    for name in ("CLAT", "Threat", "ascend", "layers", "criticality", "top", "LayerScore", "Objective", "Tuner",
                 "build_model", "load_data", "train", "evaluate"):  # fmt: skip
        assert name in clat.__all__
    assert all(hasattr(clat, name) for name in clat.__all__)


def test_a_users_loop(tiny, blobs):
    x, y = blobs.pixels[:48].float() / 255, blobs.labels[:48]
    tuner = CLAT(tiny, k=2, eps="8/255", steps=3, cross_entropy="adversarial")
    before = snapshot(tiny)
    chosen = set()
    for epoch in range(4):
        if epoch % 2 == 0:
            parameters = tuner.select(x, y)
            optimizer = torch.optim.SGD(parameters, lr=0.05)
            chosen.update(tuner.layers)
        tiny.train()  # a habit of every loop; frozen BatchNorm must stand still all the same
        for start in range(0, 48, 16):
            loss = tuner.loss(x[start : start + 16], y[start : start + 16])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        tuner.check()
    moved = {name for name, tensor in snapshot(tiny).items() if not same_bits(tensor, before[name])}
    assert moved == {f"{name}.weight" for name in chosen}
    assert {layer.name for layer in tuner.status() if layer.state == "trained"} == set(tuner.layers)
    assert len(tuner.scores) == 21


def test_the_loss_is_equation_9(plain, images):
    x, y = images
    tuner = CLAT(plain, k=2, steps=2, weight=0.3)
    tuner.select(x, y)
    torch.manual_seed(1)
    loss = tuner.loss(x, y)
    torch.manual_seed(1)
    objective = Clat(weight=0.3)
    plain.eval()
    terms = objective.loss(plain, x, objective.perturb(plain, x, y, tuner.threat), y)
    torch.testing.assert_close(loss, sum(terms.values()))


def test_the_step_keeps_the_papers_share_of_eps(plain):
    assert CLAT(plain).threat.step == pytest.approx(0.007)
    assert CLAT(plain, eps="8/255").threat.step == pytest.approx(8 / 255 * 7 / 30)
    assert CLAT(plain, eps="8/255", step="2/255").threat.step == pytest.approx(2 / 255)


def test_the_check_notices_a_frozen_tensor_that_moved(plain, images):
    tuner = CLAT(plain, steps=1)
    torch.optim.SGD(tuner.select(*images), lr=0.1)
    for layer in (plain.first, plain.second, plain.last):
        layer.weight.data += 1
    with pytest.raises(IntegrityError, match="is frozen but changed"):
        tuner.check()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, x, y: CLAT(m, lamda=1), "no option 'lamda'"),
        (lambda m, x, y: CLAT(m, k=0), "critical.k"),
        (lambda m, x, y: CLAT(m, eps=8), "8/255"),
        (lambda m, x, y: CLAT(m).loss(x, y), "call select"),
        (lambda m, x, y: CLAT(m).select(x * 255, y), "divide by 255"),
        (lambda m, x, y: CLAT(m).select(x, y[:2]), "one label an image"),
        (lambda m, x, y: CLAT(m).select(x, y + 9), "labels"),
        (lambda m, x, y: CLAT(nn.Flatten()).select(x, y), "no layer"),
    ],
)
def test_bad_input_is_refused(plain, images, call, says):
    with pytest.raises(InputError, match=says):
        call(plain, *images)
