"""Threat and ascend: ball, box, the closed-form optimum of linear costs, and an untouched network."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clat.errors import InputError
from clat.inputs import fraction
from clat.network import check_images, held, same_bits, snapshot
from clat.threat import Threat, ascend

LINEAR = torch.nn.Identity()


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), (0.03, 0.03), ("0.5", 0.5), (1, 1.0)])
def test_eps_is_a_number_or_a_fraction(text, value):
    assert fraction(text) == pytest.approx(value, abs=1e-12)
    assert Threat(eps=text).radius == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"eps": "eight"}, "not a number"),
        ({"eps": 8}, "8/255"),
        ({"eps": 1.01}, "8/255"),
        ({"eps": -0.1}, "positive"),
        ({"eps": "1/0"}, "not a number"),
        ({"eps": float("nan")}, "not a number"),
        ({"step": 0}, "positive"),
        ({"steps": -1}, "0 or more"),
        ({"norm": "l1"}, "linf, l2"),
        ({"start": "corner"}, "uniform"),
        ({"mode": "test"}, "eval"),
    ],
)
def test_values_out_of_range_are_refused(keys, says):
    with pytest.raises(InputError, match=says):
        Threat(**keys)


@pytest.mark.parametrize("start", ["uniform", "gaussian", "zero"])
@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_linear_cost_reaches_its_closed_form_optimum(norm, keep, start):
    weight = torch.randn(1, 2, 3, 3)
    x = torch.full((4, 2, 3, 3), 0.5)
    threat = Threat(eps=0.1, step=0.05, steps=40, norm=norm, start=start)
    x_adv = ascend(lambda z: (z * weight).sum((1, 2, 3)), x, threat, model=LINEAR, keep=keep)
    gain = ((x_adv - x) * weight).sum((1, 2, 3))
    optimum = 0.1 * (weight.abs().sum() if norm == "linf" else weight.norm())
    torch.testing.assert_close(gain, optimum.expand(4), rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    norm=st.sampled_from(["linf", "l2"]),
    start=st.sampled_from(["uniform", "gaussian", "zero"]),
    eps=st.floats(1e-3, 1.0),
    step=st.floats(1e-3, 3.0),
    steps=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_ball_and_box_hold_whatever_the_cost(norm, start, eps, step, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 1, 4, 4, generator=generator).round(decimals=1)  # some pixels on the box
    threat = Threat(eps=eps, step=step, steps=steps, norm=norm, start=start)
    x_adv = ascend(lambda z: (z**2).sum((1, 2, 3)), x, threat, model=LINEAR)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert threat.distance(x_adv, x).max() <= eps * (1 + 1e-5) + 1e-6


def test_uniform_start_fills_the_l2_ball():
    x = torch.full((2000, 1, 1, 2), 0.5)
    threat = Threat(eps=0.2, norm="l2")
    radius = threat.distance(threat.first(x), x) / 0.2
    assert radius.max() <= 1 + 1e-5
    assert abs((radius**2).mean() - 0.5) < 0.03  # the squared radius of a uniform point in a disc is uniform


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_has_no_gradient_stays(norm):
    x = torch.full((2, 1, 1, 2), 0.5)
    threat = Threat(eps=0.2, step=0.1, steps=1, norm=norm, start="zero")
    moved = ascend(lambda z: z[..., 0].flatten(1).sum(1) * torch.tensor([1.0, 0.0]), x, threat, model=LINEAR)
    torch.testing.assert_close(moved.flatten(1), torch.tensor([[0.6, 0.5], [0.5, 0.5]]))


def test_momentum_adds_gradients_of_length_one():
    """Dong et al. 2018: 3/4 and 1/4, then the second gradient's -1 and 0, which turns the first pixel round."""
    x = torch.full((1, 1, 1, 2), 0.5)
    gradients = iter([torch.tensor([3.0, 1.0]), torch.tensor([-0.1, 0.0])])
    threat = Threat(eps=0.4, step=0.1, steps=2, start="zero")
    moved = ascend(lambda z: (z.flatten(1) * next(gradients)).sum(1), x, threat, model=LINEAR, momentum=1.0)
    torch.testing.assert_close(moved.flatten(), torch.tensor([0.5, 0.7]))


def test_best_keeps_the_highest_cost_of_each_image():
    x = torch.full((8, 1, 1, 1), 0.5)

    def peak(z):  # highest at 0.53; steps of 0.05 jump across it
        return -(z - 0.53).abs().sum((1, 2, 3))

    threat = Threat(eps=0.3, step=0.05, steps=5, start="uniform")
    torch.manual_seed(3)
    best = peak(ascend(peak, x, threat, model=LINEAR, keep="best"))
    torch.manual_seed(3)
    last = peak(ascend(peak, x, threat, model=LINEAR, keep="last"))
    assert (best >= last).all()
    assert (best > last).any()


@pytest.mark.parametrize("mode", ["eval", "batch", "train"])
@pytest.mark.parametrize("was_training", [True, False])
def test_the_network_is_left_as_it_was_found(plain, images, mode, was_training):
    x, y = images
    plain.train(was_training)
    plain.second.eval()
    plain.first.weight.requires_grad_(False)
    torch.nn.functional.cross_entropy(plain(x), y).backward()
    flags = [module.training for module in plain.modules()]
    wanted = [parameter.requires_grad for parameter in plain.parameters()]
    gradients = [None if p.grad is None else p.grad.clone() for p in plain.parameters()]
    before = snapshot(plain)
    cost = lambda z: torch.nn.functional.cross_entropy(plain(z), y, reduction="none")
    ascend(cost, x, Threat(steps=2, mode=mode), model=plain)
    assert [module.training for module in plain.modules()] == flags
    assert [parameter.requires_grad for parameter in plain.parameters()] == wanted
    for parameter, gradient in zip(plain.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    moved = [name for name, tensor in snapshot(plain).items() if not same_bits(tensor, before[name])]
    buffers = [name for name, _ in plain.named_buffers()]
    assert moved == (buffers if mode == "train" else [])


def test_the_network_is_put_back_after_an_error(plain):
    plain.train()

    def fail():
        with held(plain):
            assert not plain.training
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        fail()
    assert plain.training
    assert all(parameter.requires_grad for parameter in plain.parameters())


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.rand(3, 8, 8), "batch, channel"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "float"),
        (torch.rand(0, 1, 8, 8), "no images"),
        (torch.rand(1, 1, 8, 8) * 255, "divide by 255"),
        (torch.randn(1, 1, 8, 8), "leave the normalisation"),
        (torch.full((1, 1, 8, 8), float("nan")), "NaN"),
    ],
)
def test_wrong_images_are_refused(x, says):
    with pytest.raises(InputError, match=says):
        check_images(x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_given_start_is_moved_into_ball_and_box(norm, plain, images):
    x, start = images[0], images[0].flip(0) + 0.5
    threat = Threat(eps=0.1, steps=0, norm=norm)
    x_adv = ascend(lambda z: plain(z)[:, 0], x, threat, model=plain, start=start)
    assert torch.equal(x_adv, threat.project(start, x))
    assert threat.distance(x_adv, x).max() <= 0.1 + 1e-6
    assert x_adv.max() <= 1
