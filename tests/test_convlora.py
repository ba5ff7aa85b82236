"""ConvLoRA: shapes and counts, equality before training and after merging, and runs that resume bit-identical."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from clat.checkpoint import load_checkpoint, load_tensors
from clat.compute import autocast
from clat.errors import InputError
from clat.models import build_model
from clat.network import same_bits, snapshot
from clat.objectives import FastAt, PgdAt
from clat.threat import Threat
from clat.training.health import HealthError
from clat.training.integrity import status_since
from clat.training.recipe import Recipe
from clat.training.train import train
from clat.tuners import ConvLora
from clat.tuners.convlora import adapted_layers, merge, merged_state
from conftest import dies_before, network, same_tensors

THREAT = Threat(eps=0.1, step=0.05, steps=2)
RECIPE = Recipe(
    objective=PgdAt(), tuner=ConvLora(), threat=THREAT, validation_steps=2, epochs=3, batch_size=60, holdout=60,
    optimizer="adamw", lr=1e-3, weight_decay=0.0, health=False,
)  # fmt: skip


class Many(nn.Module):
    """A 1x1, a grouped, a depthwise, a 5x5 strided convolution with bias, one that is not square, two linear layers."""

    def __init__(self):
        super().__init__()
        self.pointwise = nn.Conv2d(1, 4, 1)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, bias=False)
        self.large = nn.Conv2d(6, 8, 5, stride=2, padding=2)
        self.oblong = nn.Conv2d(8, 8, (1, 3))
        self.hidden, self.head = nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.large(self.depthwise(torch.relu(self.grouped(self.pointwise(x)))))
        return self.head(torch.relu(self.hidden(self.oblong(torch.relu(x)).mean((2, 3)))))


def adapted(model, x, **keys):
    """The network with trained-looking matrices, and the selection."""
    tuner = ConvLora(**keys)
    selection = tuner.select(model, x, torch.zeros(len(x)).long(), THREAT)
    tuner.begin(model, selection, seed=3)
    selection.apply(model)
    for name, parameter in model.named_parameters():
        if name.endswith(".up"):
            parameter.data.normal_(std=0.1)
    return selection


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_the_matrices_of_all_convolutions_of_a_resnet18_count_as_published(rank):
    model = build_model("rn18", 10)
    selection = adapted(model, torch.rand(1, 3, 32, 32), rank=rank, norm_affine=False)
    assert len(selection.layers) == 20
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == rank * 67_035


def test_every_square_layer_but_the_head_is_adapted_whatever_its_groups():
    x, model = torch.rand(2, 1, 8, 8), Many()
    selection = adapted(model, x, rank=2)
    assert selection.layers == ("pointwise", "grouped", "depthwise", "large", "hidden")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes["grouped.parametrizations.weight.0.down"] == (2 * 3, 2 * 3)
    assert shapes["grouped.parametrizations.weight.0.up"] == (6 * 3, 2 * 3)
    assert shapes["depthwise.parametrizations.weight.0.down"] == (6, 3)
    assert shapes["pointwise.parametrizations.weight.0.down"] == (2, 1)
    assert shapes["hidden.parametrizations.weight.0.up"] == (5, 2)
    with_head = Many()
    assert adapted(with_head, x, head=True).layers[-1] == "head"


def test_the_product_is_read_row_by_row():
    model = Many()
    before = model.grouped.weight.detach().clone()
    adapted(model, torch.rand(2, 1, 8, 8), rank=2, alpha=6)
    down, up = (dict(model.named_parameters())[f"grouped.parametrizations.weight.0.{key}"] for key in ("down", "up"))
    flat = [up[i // 6].dot(down[:, i % 6]).item() for i in range(108)]  # position (o k + a) (i k) + b
    assert torch.allclose(model.grouped.weight - before, 3 * torch.tensor(flat).view(6, 2, 3, 3), atol=1e-6)


def layout(model):
    kernels = {name: p for name, p in model.named_parameters() if p.dim() == 4}
    return {name: p.is_contiguous(memory_format=torch.channels_last) for name, p in kernels.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_merging_changes_no_bit_of_the_output_and_leaves_an_ordinary_network(precision):
    for make, x in ((Many, torch.rand(4, 1, 8, 8)), (network, torch.rand(4, 1, 12, 12))):
        model = make().eval()
        names, before = set(model.state_dict()), layout(model)
        adapted(model, x)
        with autocast("cpu", precision), torch.no_grad():
            expected, state = model(x), merged_state(model)
            assert adapted_layers(model)
            merge(model)
            assert torch.equal(model(x), expected)
        assert set(model.state_dict()) == set(state) == names
        assert all(same_bits(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert layout(model) == before
        assert not adapted_layers(model)
        assert {type(module) for module in model.modules()} == {type(module) for module in make().modules()}


def test_the_start_is_seeded_and_moves_no_random_numbers(plain, images):
    tuner = ConvLora()
    selection = tuner.select(plain, *images, THREAT)
    state = torch.get_rng_state()
    tuner.begin(plain, selection, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    first = {name: p.clone() for name, p in plain.named_parameters() if name.endswith(".down")}
    merge(plain)
    tuner.begin(plain, selection, seed=1)
    assert all(torch.equal(p, first[name]) for name, p in plain.named_parameters() if name in first)


def test_normalisation_trains_as_asked(plain, images):
    assert "first_norm.bias" in ConvLora().select(plain, *images, THREAT).trainable
    assert ConvLora().select(plain, *images, THREAT).training == ("first_norm", "second_norm")
    alone = ConvLora(norm_affine=False, norm_statistics="frozen").select(plain, *images, THREAT)
    assert alone.training == ()
    assert not any("norm" in name for name in alone.trainable)


def test_a_run_saves_ordinary_networks_and_ends_with_one(blobs, tmp_path):
    model = network()
    before, keys = snapshot(model), set(model.state_dict())
    run = train(RECIPE, model, blobs, out=tmp_path / "run")  # the loop checks the frozen weights bit by bit
    last, _ = load_checkpoint(run.last)
    assert set(load_tensors(run.best)[0]) == set(model.state_dict()) == keys
    assert all(same_bits(tensor, model.state_dict()[name]) for name, tensor in last.state_dict().items())
    assert same_bits(last.network.linear.weight, before["network.linear.weight"])
    assert not same_bits(last.network.conv1.weight, before["network.conv1.weight"])
    assert run.environment["parameters"] == run.result["parameters"] == sum(p.numel() for p in last.parameters())
    norms = sum(p.numel() for n, p in last.named_parameters() if p.dim() == 1 and "linear" not in n)
    products = sum(p.numel() // (p.shape[0] * p.shape[1]) * sum(p.shape[:2]) for p in last.parameters() if p.dim() == 4)
    assert run.result["trainable"] == 2 * products + norms
    states = status_since(last, run.start, run.selections)
    assert {layer.name for layer in states if layer.state == "frozen"} == {"network.linear"}
    assert not [layer for layer in states if layer.state == "irregular"]


def test_a_killed_run_ends_bit_identical(blobs, tmp_path):
    whole = train(RECIPE, network(), blobs, out=tmp_path / "whole")
    model = network()
    with dies_before("optimizer-2"):
        train(RECIPE, model, blobs, out=tmp_path / "killed")
    assert not adapted_layers(model)
    killed = train(RECIPE, network(), blobs, out=tmp_path / "killed", resume=True)
    for path, other in ((whole.last, killed.last), (whole.best, killed.best)):
        assert same_tensors(path, other)


def test_a_failed_run_leaves_an_ordinary_network(blobs, tmp_path):
    model = network()
    with pytest.raises(HealthError):
        train(replace(RECIPE, lr=1e20, precision="fp32"), model, blobs, out=tmp_path / "run")
    assert not adapted_layers(model)


def test_a_dropped_epoch_leaves_the_merged_network_of_the_one_before(blobs, tmp_path, monkeypatch):
    accuracies = iter([0.9, 0.9, 0.4])
    monkeypatch.setattr(FastAt, "probe", lambda _s, _m, _x, y, _t: torch.arange(len(y)) < len(y) * next(accuracies))
    model, one_step = network(), Threat(eps=0.1, step=0.1, steps=1)
    recipe = replace(RECIPE, objective=FastAt(), threat=one_step, epochs=4)
    run = train(recipe, model, blobs, out=tmp_path / "run")
    assert (run.result["epochs"], run.result["overfitted"]) == (2, 3)
    last, _ = load_tensors(run.last)
    assert all(same_bits(tensor, last[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_adapted_is_refused(plain, images):
    nn.utils.parametrizations.weight_norm(plain.first)
    with pytest.raises(InputError, match="first is parametrised already"):
        ConvLora().select(plain, *images, THREAT)
    oblong = nn.Sequential(nn.Conv2d(1, 3, (1, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InputError, match="no square convolution"):
        ConvLora().select(oblong, *images, THREAT)
    for keys in ({"rank": 0}, {"alpha": 0}):
        with pytest.raises(InputError, match="convlora"):
            ConvLora(**keys)
