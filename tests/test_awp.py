"""Adversarial weights: how far they go, what they leave alone, and that nothing of them stays."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from clat.errors import InputError
from clat.network import same_bits, snapshot
from clat.objectives import OBJECTIVES, FreeAt, PgdAt
from clat.threat import Threat
from clat.training.awp import Awp
from clat.training.own_loop import OwnLoop
from clat.tuners import Critical


def backward(model, x, y):
    return lambda: F.cross_entropy(model(x), y).backward()


def freeze_all_but(model, *names):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def test_each_weight_goes_its_share_of_its_norm_along_the_gradient(plain, images):
    x, y = images
    plain.train()
    freeze_all_but(plain, "first.weight", "first.bias", "first_norm.weight", "last.weight")
    before = snapshot(plain)
    F.cross_entropy(plain(x), y).backward()
    gradients = {name: p.grad.clone() for name, p in plain.named_parameters() if p.grad is not None}
    plain.load_state_dict(before)
    loss = F.cross_entropy(plain(x), y).item()
    plain.load_state_dict(before)
    with Awp(gamma=0.05).weights(plain, backward(plain, x, y)):
        assert all(p.grad is None for p in plain.parameters())
        inside = snapshot(plain)
        assert F.cross_entropy(plain(x), y).item() > loss
    for name, tensor in inside.items():
        if name in ("first.weight", "last.weight"):
            expected = 0.05 * before[name].norm() * gradients[name] / gradients[name].norm()
            torch.testing.assert_close(tensor - before[name], expected, rtol=1e-3, atol=1e-6)
        else:
            assert same_bits(tensor, before[name]), name


def test_without_a_step_every_tensor_comes_back_bit_for_bit(plain, images):
    plain.train()
    plain.first.weight.data[0, 0, 0, 0] = -0.0
    freeze_all_but(plain, "first.weight", "second.weight")
    before = snapshot(plain)
    for _ in range(20):
        with pytest.raises(RuntimeError, match="stop"), Awp(gamma=0.3).weights(plain, backward(plain, *images)):
            raise RuntimeError("stop")
    assert all(same_bits(tensor, before[name]) for name, tensor in snapshot(plain).items())
    assert all(parameter.grad is None for parameter in plain.parameters())


def test_the_step_acts_on_the_adversarial_weights(plain, images):
    """w <- step(w + v) - v with a fresh gradient, momentum and weight decay at w + v: two steps, by hand."""
    x, y = images
    plain.eval()
    names = ["second.weight", "second.bias", "last.weight"]
    freeze_all_but(plain, *names)
    parameters = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    start = snapshot(plain)

    def gradient():
        return torch.autograd.grad(F.cross_entropy(plain(x), y), parameters)

    momentum = [torch.zeros_like(p) for p in parameters]
    for _ in range(2):
        ascent = [
            0.1 * p.norm() * g / g.norm() if p.dim() > 1 else 0 for p, g in zip(parameters, gradient(), strict=True)
        ]
        with torch.no_grad():
            for p, v in zip(parameters, ascent, strict=True):
                p += v
        for i, (p, g, v) in enumerate(zip(parameters, gradient(), ascent, strict=True)):
            momentum[i] = 0.9 * momentum[i] + g + 0.5 * p.detach()
            p.data = p.data - 0.2 * momentum[i] - v
    expected = snapshot(plain)

    plain.load_state_dict(start)
    optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=0.5)
    for _ in range(2):
        with Awp(gamma=0.1).weights(plain, backward(plain, x, y)):
            backward(plain, x, y)()
            optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(snapshot(plain), expected)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_wraps_every_objective(name, plain, images):
    x, y = images
    objective = OBJECTIVES[name]().begin()
    threat = Threat(eps=0.1, step=0.1, steps=1, start="zero" if name == "grad-align" else "uniform")
    plain.train()
    freeze_all_but(plain, "first.weight", "second.weight")
    before = snapshot(plain)
    x_adv = objective.perturb(plain, x, y, threat)

    def step():
        sum(objective.loss(plain, x, x_adv, y).values()).backward()

    with Awp().weights(plain, step):
        state = snapshot(plain)
        assert all(same_bits(state[key], before[key]) for key in state if key not in ("first.weight", "second.weight"))
        step()
        assert plain.second.weight.grad.abs().sum() > 0
    assert same_bits(plain.second.weight, before["second.weight"])
    if isinstance(objective, FreeAt):  # delta moves once, by the gradient at the adversarial weights
        first = threat.project(x_adv, x)
        assert not torch.equal(objective.perturb(plain, x, y, threat), first)
        assert torch.equal(objective.perturb(plain, x, y, threat), objective.perturb(plain, x, y, threat))


def test_values_out_of_range_are_refused():
    for keys in ({"gamma": 0}, {"gamma": 1}, {"warmup": -1}):
        with pytest.raises(InputError, match="awp"):
            replace(Awp(), **keys)


def test_around_critical_only_what_is_selected_is_perturbed(plain, images):
    """Also where the normalisation trains with its layer, whose scale and shift have one dimension."""
    tuner = Critical(k=1, norm_affine=True, norm_statistics="selected")
    method = OwnLoop(plain, PgdAt(), tuner, Threat(eps=0.1, step=0.05, steps=2))
    method.select(*images)
    (layer,) = method.layers
    x_adv, before, inside = method.attack(*images), snapshot(plain), {}

    class Looks(torch.optim.SGD):
        def step(self, closure=None):
            inside.update({name: tensor.clone() for name, tensor in snapshot(plain).items()})
            return super().step(closure)

    optimizer = Looks([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    method.update(optimizer, images[0], x_adv, images[1], awp=Awp(gamma=0.05))
    moved = {name for name in dict(plain.named_parameters()) if not same_bits(inside[name], before[name])}
    assert moved == {f"{layer}.weight"}
    length = (inside[f"{layer}.weight"] - before[f"{layer}.weight"]).norm() / before[f"{layer}.weight"].norm()
    assert length.item() == pytest.approx(0.05, rel=1e-3)
    method.verify()  # and after the step, all that is frozen is what it was, bit for bit
