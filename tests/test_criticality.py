"""Eq. 5 and 6 against brute force, against stored features, and at their edges."""

import itertools
import math
import weakref

import pytest
import torch
from torch import nn

from clat.criticality import LayerScore, _scores, layer_criticality
from clat.errors import InputError
from clat.layers import Call, find_layers
from clat.threat import Threat, attack_output
from clat.tuners.order import layer_count, ranked, top

EPS = 0.1


def linear_network() -> nn.Sequential:
    """Three linear layers without activations, made so that one corner of the ball is the worst for each of them."""
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False), nn.Linear(4, 2, bias=False)
    )
    for parameter in model.parameters():
        parameter.data.uniform_(0.1, 1)
    model[3].weight.data[1] = 0
    return model


def test_criticality_equals_brute_force_over_the_corners_of_the_ball():
    model = linear_network()
    x, y = torch.full((3, 1, 2, 3), 0.5), torch.zeros(3, dtype=torch.long)
    x_adv = attack_output(model, x, y, Threat(eps=EPS, step=EPS, steps=5))
    scores = layer_criticality(model, x, x_adv)
    corners = EPS * torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)))  # all 64
    prefix, before = torch.eye(6), None
    for score, layer in zip(scores, (model[1], model[2], model[3]), strict=True):
        prefix = layer.weight @ prefix
        worst = (corners @ prefix.T).norm(dim=1).max().item()  # the norm is convex: its maximum is at a corner
        weakness = worst / len(prefix)
        assert score.weakness == pytest.approx(weakness, rel=1e-5)
        assert score.criticality == pytest.approx(weakness if before is None else weakness / before, rel=1e-5)
        before = weakness


@pytest.mark.parametrize("norm", ["paper", "rms", "relative"])
def test_criticality_equals_a_computation_from_stored_features(plain, images, norm):
    x, y = images
    plain.eval()
    x_adv = attack_output(plain, x, y, Threat(steps=3))
    stored = {}
    handles = [
        module.register_forward_hook(lambda *seen, name=name: stored.setdefault(name, []).append(seen[2]))
        for name, module in find_layers(plain, x).items()
    ]
    plain(x), plain(x_adv)
    for handle in handles:
        handle.remove()
    for score in layer_criticality(plain, x, x_adv, norm=norm):
        clean, attacked = stored[score.name]
        size = clean[0].numel()
        distance = (attacked - clean).flatten(1).pow(2).sum(1).sqrt()
        by = {"paper": size, "rms": math.sqrt(size), "relative": clean.flatten(1).norm(dim=1)}[norm]
        assert score.weakness == pytest.approx((distance / by).mean().item(), rel=1e-4)


@pytest.mark.parametrize("norm", ["paper", "rms"])
@pytest.mark.parametrize("at", ["output", "activation"])
def test_the_product_of_criticalities_is_the_weakness(tiny, norm, at):
    x, y = torch.rand(8, 1, 16, 16), torch.arange(8) % 3
    scores = layer_criticality(tiny, x, attack_output(tiny, x, y, Threat(steps=2)), norm=norm, at=at)
    product = 1.0
    for score in scores:
        if score.index is not None:
            product *= score.criticality
            assert product == pytest.approx(score.weakness, rel=1e-6)


def test_layers_used_twice_and_indices_stay_apart():
    conv = nn.Conv2d(1, 1, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv, nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(4, 1, 4, 4)
    scores = layer_criticality(model, x, (x + 0.05).clamp(0, 1))
    assert [(score.name, score.index) for score in scores] == [("0", 1), ("0", 2), ("4", 3)]
    assert top(scores, 1) == ["0"]


def test_an_in_place_activation_does_not_change_the_feature():
    def network(inplace):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=inplace), nn.Flatten(), nn.Linear(8, 3))

    x = torch.rand(4, 1, 4, 4)
    x_adv = (x + 0.1).clamp(0, 1)
    assert layer_criticality(network(True), x, x_adv) == layer_criticality(network(False), x, x_adv)


def test_memory_does_not_grow_with_the_number_of_layers():
    def alive(depth):
        model = nn.Sequential(*[nn.Conv2d(4, 4, 1) for _ in range(depth)], nn.Flatten(), nn.Linear(4 * 64, 3))
        most, outputs = 0, []

        def count(_module, _inputs, output):
            nonlocal most
            outputs.append(weakref.ref(output))
            most = max(most, sum(reference() is not None for reference in outputs))

        for module in model:
            module.register_forward_hook(count)
        x = torch.rand(2, 4, 8, 8)
        layer_criticality(model, x, x)
        return most

    assert alive(40) == alive(5)


def test_tiny_denominators_are_guarded():
    calls = [Call(str(i), nn.Linear(1, 1), i + 1) for i in range(4)]
    scores = _scores(calls, [1.0, 0.0, 2.0, 0.0])
    assert [score.criticality for score in scores] == [1.0, 0.0, 2.0 / 2e-6, 0.0]
    assert all(math.isfinite(score.criticality) for score in _scores(calls, [0.0] * 4))


def test_features_that_are_not_finite_name_the_layer(plain, images):
    plain.second.weight.data[0] = float("nan")
    with pytest.raises(InputError, match="second"):
        layer_criticality(plain, images[0], images[0])


def _score(name, c, index=1):
    return LayerScore(name, index, 1.0, c, 1)


def test_ranking_leaves_out_shortcuts_and_by_default_the_head():
    scores = [_score("a", 2.0), _score("b", 3.0), _score("s", 9.0, None), _score("c", 1.0), _score("head", 8.0)]
    assert [score.name for score in ranked(scores)] == ["b", "a", "c"]
    assert top(scores, 2) == ["b", "a"]
    assert top(scores, 2, head=True) == ["head", "b"]


@pytest.mark.parametrize(("k", "count"), [(1, 1), (20, 20), (0.05, 1), (0.12, 2), (0.001, 1), (0.999, 20), (1.0, 20)])
def test_k_is_a_count_or_a_share(k, count):
    assert layer_count(k, 20) == count


@pytest.mark.parametrize("k", [0, 21, -1, 1.5, 3.0, 0.0, True, "3", None, math.nan, math.inf])
def test_impossible_k_is_refused(k):
    with pytest.raises(InputError, match="from 1"):
        layer_count(k, 20)


def test_shapes_must_agree(plain, images):
    with pytest.raises(InputError, match="shape"):
        layer_criticality(plain, images[0], images[0][:2])
