"""Which modules are layers, in which order, and what is observed of them."""

import pytest
import torch
from torch import nn

from clat.errors import InputError
from clat.features import observe
from clat.layers import find_layers, trace, trained_layers
from clat.models import build_model
from clat.network import logits, same_bits, snapshot


class Twice(nn.Module):
    """One convolution used twice."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 3)  # defined first, runs last
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x):
        x = torch.relu(self.conv(x.expand(-1, 2, -1, -1)))
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


class Pair(nn.Module):
    """Attention (which returns a tuple), sequence-first, and a network that returns a dict."""

    def __init__(self, batch_first: bool):
        super().__init__()
        self.embed = nn.Linear(8, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.head = nn.Linear(4, 3)
        self.batch_first = batch_first

    def forward(self, x):
        tokens = self.embed(x.flatten(1, 2))
        tokens = tokens if self.batch_first else tokens.transpose(0, 1)
        mixed, _ = self.attention(tokens, tokens, tokens)
        return {"logits": self.head(mixed.mean(1 if self.batch_first else 0))}


def test_resnet18_is_numbered_as_in_the_paper():
    model = build_model("rn18", 10)
    calls = {call.index: call for call in trace(model, torch.rand(1, 3, 32, 32)) if call.index}
    assert len(calls) == 18
    assert calls[11].name == "network.layer3.0.conv2"
    assert tuple(calls[11].module.weight.shape) == (256, 256, 3, 3)
    assert calls[11].parameters == 589_824  # the paper's "590K", Table 6
    shortcuts = [call.name for call in trace(model, torch.rand(1, 3, 32, 32)) if call.index is None]
    assert shortcuts == [f"network.layer{i}.0.shortcut.0" for i in (2, 3, 4)]


def test_layers_come_in_execution_order():
    assert list(find_layers(Twice(), torch.rand(2, 1, 4, 4))) == ["conv", "head"]


def test_a_module_used_twice_is_called_twice():
    calls = trace(Twice(), torch.rand(2, 1, 4, 4))
    assert [(call.name, call.index) for call in calls] == [("conv", 1), ("conv", 2), ("head", 3)]


def test_the_normalisation_after_a_layer_is_found(plain):
    calls = trace(plain, torch.rand(2, 1, 8, 8))
    assert [(call.name, call.norm) for call in calls] == [
        ("first", "first_norm"),
        ("second", "second_norm"),
        ("last", None),
    ]


def test_transformer_layers_are_found_although_torch_would_fuse_them():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Flatten(1, 2), block, nn.Flatten(), nn.Linear(64, 3)).eval()
    assert list(find_layers(model, torch.rand(2, 1, 8, 8))) == ["1.self_attn", "1.linear1", "1.linear2", "3"]


def test_tracing_leaves_the_network_untouched(plain):
    plain.train()
    before = snapshot(plain)
    trace(plain, torch.rand(2, 1, 8, 8))
    assert plain.training
    assert all(same_bits(tensor, before[name]) for name, tensor in snapshot(plain).items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())


def test_a_network_without_layers_is_refused():
    with pytest.raises(InputError, match="no layer to rank"):
        trace(nn.Flatten(), torch.rand(1, 1, 4, 4))


@pytest.mark.parametrize("batch_first", [True, False])
def test_features_come_one_row_an_image(batch_first):
    model = Pair(batch_first)
    x = torch.rand(5, 1, 8, 8)
    seen = {}
    scores = observe(model, x, find_layers(model, x), lambda number, feature: seen.update({number: feature}))
    assert scores.shape == (5, 3)
    assert [feature.shape[0] for feature in seen.values()] == [5, 5, 5]
    alone = {}
    observe(model, x[3:4], find_layers(model, x), lambda number, feature: alone.update({number: feature}))
    for number, feature in seen.items():
        torch.testing.assert_close(feature[3:4].flatten(1), alone[number].flatten(1))


def test_activations_are_followed_through_functions_and_modules(plain):
    x = torch.rand(4, 1, 8, 8)
    plain.eval()
    seen = {}
    observe(plain, x, find_layers(plain, x), lambda i, feature: seen.update({i: feature}), at="activation")
    first = torch.relu(plain.first_norm(plain.first(x)))
    torch.testing.assert_close(seen[0], first)
    torch.testing.assert_close(seen[1], torch.relu(plain.second_norm(plain.second(first))))


@pytest.mark.parametrize("at", ["output", "activation"])
def test_the_pass_stops_at_the_deepest_layer(plain, at):
    reached = []
    plain.last.register_forward_hook(lambda *_: reached.append("last"))
    plain.second_norm.register_forward_hook(lambda *_: reached.append("norm"))
    seen = {}
    modules = {"first": plain.first, "second": plain.second}
    x = torch.rand(4, 1, 8, 8)
    found = observe(plain.eval(), x, modules, lambda i, f: seen.update({i: f}), at=at, stop_after=2)
    assert found is None
    assert reached == ([] if at == "output" else ["norm"])
    whole = {}
    observe(plain, x, modules, lambda i, f: whole.update({i: f}), at=at)
    for number in (0, 1):
        torch.testing.assert_close(seen[number], whole[number])


def test_a_layer_after_the_stop_does_not_run_even_without_an_activation():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(32, 3))
    reached = []
    model[2].register_forward_hook(lambda *_: reached.append(1))
    seen = {}
    x = torch.rand(2, 1, 4, 4)
    model.eval()
    observe(model, x, {"0": model[0]}, lambda i, f: seen.update({i: f}), at="activation", stop_after=1)
    assert not reached
    torch.testing.assert_close(seen[0], model[1](model[0](x)))


def test_trained_layers_are_read_from_requires_grad(plain):
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    plain.second.weight.requires_grad_(True)
    assert list(trained_layers(plain)) == ["second"]


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: (t, None), lambda t: {"logits": t, "loss": 1}, lambda t: [t]])
def test_class_scores_are_taken_from_any_usual_output(wrap):
    scores = torch.rand(2, 3)
    torch.testing.assert_close(logits(wrap(scores)), scores)


@pytest.mark.parametrize("output", [torch.rand(2, 3, 4, 4), "text", None, {}])
def test_other_outputs_are_refused(output):
    with pytest.raises(InputError):
        logits(output)
