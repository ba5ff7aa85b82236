"""Networks: parameter counts, normalisation inside, names and options."""

import pytest
import torch
from torch import nn

from clat.checkpoint import load_checkpoint, save_checkpoint
from clat.errors import InputError
from clat.layers import trace
from clat.models import build_model, mix
from clat.training.own_loop import CLAT

COUNTS = {  # shared/reference/baselines.md, section 15, computed from the public sources
    ("rn18", 10): 11_173_962,
    ("rn18", 100): 11_220_132,
    ("rn50", 10): 23_520_842,
    ("rn50", 100): 23_705_252,
    ("dn121", 10): 6_956_298,
    ("dn121", 100): 7_048_548,
    ("vgg19", 10): 38_958_922,
    ("vgg19", 100): 39_327_652,
    ("preactrn18", 10): 11_172_170,
    ("preactrn18", 100): 11_218_340,
    ("wrn34-10", 10): 46_160_474,
    ("wrn34-10", 100): 46_218_164,
    ("wrn70-16", 10): 266_796_506,
    ("wrn70-16", 100): 266_888_756,
    ("rawrn70-16", 10): 267_240_802,
    ("rawrn70-16", 100): 267_318_652,
}
CONVOLUTIONS = {  # same source: all convolutions, and the projection shortcuts among them
    "rn18": (20, 3), "rn50": (53, 4), "dn121": (120, 0), "vgg19": (16, 0), "preactrn18": (20, 3),
    "wrn34-10": (34, 3), "wrn70-16": (70, 3), "rawrn70-16": (146 + 142, 3),
}  # fmt: skip
TINY = {
    "rn18": {"width": 8},
    "rn50": {"width": 2},
    "dn121": {"growth": 4, "blocks": (2, 2, 3, 1)},
    "vgg19": {"width": 2, "hidden": 8},
    "preactrn18": {"width": 8},
    "wrn34-10": {"depth": 10, "width": 1},
    "wrn70-16": {"depth": 16, "width": 1, "padding": "asymmetric", "activation": "silu"},
    "rawrn70-16": {"blocks": (2, 1, 1), "widths": (8, 12, 16), "stem": 8},
}


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "classes"), COUNTS)
def test_parameter_counts(name, classes):
    with torch.device("meta"):
        assert size(build_model(name, classes)) == COUNTS[name, classes]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_layers_are_found_and_shortcuts_have_no_index(name):
    with torch.device("meta"):
        calls = trace(build_model(name, 10), torch.rand(1, 3, 32, 32))
    convolutions = [call for call in calls if isinstance(call.module, nn.Conv2d)]
    shortcuts = [call for call in calls if call.index is None]
    assert (len(convolutions), len(shortcuts)) == CONVOLUTIONS[name]
    assert all("hortcut" in call.name for call in shortcuts)


@pytest.mark.parametrize(
    ("name", "indices", "parameters"),
    [
        ("rn50", (34, 41, 3), (262_144, 524_288, 36_864)),  # Table 6
        ("vgg19", (10,), (2_359_808,)),  # its index 9 counts from 0, and its "236K" is 6.0 % of the network
    ],
)
def test_layers_are_numbered_as_in_the_paper(name, indices, parameters):
    with torch.device("meta"):
        calls = {call.index: call for call in trace(build_model(name, 100), torch.rand(1, 3, 32, 32))}
    assert tuple(calls[index].parameters for index in indices) == parameters


def test_preactrn18_without_its_final_norm():
    assert size(build_model("preactrn18", 10, final_norm=False)) == 11_171_146


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("channels", "edge"), [(1, 28), (3, 32), (3, 64)])
def test_any_size_of_network_channels_and_images(name, channels, edge):
    model = build_model(name, 7, channels=channels, **TINY[name])
    assert model(torch.rand(2, channels, edge, edge)).shape == (2, 7)


def test_the_two_shortcuts_of_preactrn18_share_weights_but_not_outputs():
    torch.manual_seed(0)
    activated = build_model("preactrn18", 10, width=8)
    raw = build_model("preactrn18", 10, width=8, shortcut_input="raw")
    raw.load_state_dict(activated.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert not torch.allclose(activated.eval()(x), raw.eval()(x))


def test_the_two_paddings_of_a_wide_resnet_share_weights_but_not_outputs():
    symmetric = build_model("wrn34-10", 10, depth=10, width=1)
    asymmetric = build_model("wrn34-10", 10, depth=10, width=1, padding="asymmetric")
    asymmetric.load_state_dict(symmetric.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert not torch.allclose(symmetric.eval()(x), asymmetric.eval()(x))
    block = asymmetric.network.block2.layer[0]
    y = torch.rand(1, 16, 8, 8)
    by_hand = nn.functional.conv2d(nn.functional.pad(y, (0, 1, 0, 1)), block.conv1.weight, stride=2)
    torch.testing.assert_close(block.conv1(block.pad(y)), by_hand)


def test_the_stem_of_dn121_keeps_size_and_values():
    model = build_model("dn121", 10, growth=4)
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(model.network.features[:4](x), model.network.features.conv0(x))


BASES = {"accurate": {"name": "rn18", "width": 8}, "robust": {"name": "wrn34-10", "depth": 10, "width": 1}}


def test_the_mixed_classifier_blends_probabilities():
    accurate = build_model("rn18", 5, width=8, mean=[0.4] * 3, std=[0.2] * 3).eval()
    robust = build_model("wrn34-10", 5, depth=10, width=1).eval()
    x = torch.rand(3, 3, 32, 32)
    model = mix(accurate, robust, alpha=0.3, temperature=[2.0, 1.5]).eval()
    expected = 0.7 * (2 * accurate(x)).softmax(1) + 0.3 * (1.5 * robust(x)).softmax(1)
    torch.testing.assert_close(model(x).exp(), expected)
    for alpha, alone in ((0.0, accurate), (1, robust)):
        torch.testing.assert_close(mix(accurate, robust, alpha=alpha).eval()(x).exp(), alone(x).softmax(1))


@pytest.mark.parametrize("name", [name for name in TINY if name != "wrn70-16"])
def test_a_learned_share_reads_two_maps_of_every_network(name):
    bases = {"accurate": {"name": name, **TINY[name]}, "robust": BASES["robust"]}
    model = build_model("mixed", 5, alpha="learned", width=8, interval=[0.2, 0.9], **bases)
    x = torch.rand(4, 3, 32, 32)
    shares = []
    model.network.mixing.register_forward_hook(lambda _module, _inputs, output: shares.append(output))
    model.train()(x)[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.network.mixing.parameters())
    assert shares[0].shape == (4, 1)
    assert 0.2 <= shares[0].min() < shares[0].max() <= 0.9
    torch.testing.assert_close(model.eval()(x).exp().sum(1), torch.ones(4))
    torch.testing.assert_close(model(x[:1]), model(x)[:1])  # in eval mode an image's share is its own


@pytest.mark.parametrize("alpha", [0.5, "learned"])
def test_layers_of_a_mixed_classifier_run_one_network_after_the_other(alpha, tmp_path):
    model = build_model("mixed", 5, alpha=alpha, width=8, **BASES)
    parts = [call.name.split(".")[1] for call in trace(model, torch.rand(1, 3, 32, 32))]
    assert list(dict.fromkeys(parts)) == ["accurate", "robust", "mixing"][: 3 if alpha == "learned" else 2]
    save_checkpoint(tmp_path / "mixed.safetensors", model)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(load_checkpoint(tmp_path / "mixed.safetensors")[0](x), model.eval()(x))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *TINY.items(),
        ("mixed", BASES),
        ("mixed", {**BASES, "alpha": "learned", "width": 8}),
    ],
)
def test_a_clat_step_moves_critical_layers_alone(name, options):
    model = build_model(name, 5, **options)
    x, y = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    tuner = CLAT(model, k=2, steps=1)
    optimizer = torch.optim.SGD(tuner.select(x, y), lr=0.1)
    optimizer.zero_grad()
    tuner.loss(x, y).backward()
    optimizer.step()
    tuner.verify()


def test_only_networks_of_the_same_classes_are_mixed():
    with pytest.raises(InputError, match="3 and 4 classes"):
        mix(build_model("rn18", 3, width=8), build_model("rn18", 4, width=8))


def test_normalisation_happens_inside():
    model = build_model("rn18", 3, channels=1, width=8, mean=[0.5], std=[0.25]).eval()
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(model(x), model.network((x - 0.5) / 0.25))


def test_images_with_another_number_of_channels_are_refused():
    model = build_model("rn18", 3, channels=3, width=8)
    with pytest.raises(InputError, match="3 channels; these have 1"):
        model(torch.rand(2, 1, 8, 8))


def test_timm_models():
    model = build_model("timm/resnet10t", 5, channels=1)
    assert model(torch.rand(1, 1, 64, 64)).shape == (1, 5)


def make_network(classes: int, channels: int, hidden: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, hidden, 3), nn.Flatten(), nn.LazyLinear(classes))


def not_a_network() -> int:
    return 1


def test_a_users_factory():
    model = build_model(f"{__name__}:make_network", 3, channels=2, hidden=5)
    assert model(torch.rand(1, 2, 8, 8)).shape == (1, 3)
    assert model.spec["name"] == f"{__name__}:make_network"


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("resnet", {}, "rn18"),
        ("rn18", {"wdth": 3}, "wdth"),
        ("wrn34-10", {"depth": 12}, "6 n"),
        ("wrn34-10", {"padding": "same"}, "symmetric or asymmetric"),
        ("wrn34-10", {"activation": "gelu"}, "relu, silu"),
        ("rn50", {"width": -1}, "negative"),
        ("vgg19", {"dropout": 2}, "dropout"),
        ("preactrn18", {"shortcut_input": "both"}, "activated or raw"),
        ("mixed", {}, "accurate"),
        ("mixed", {**BASES, "alpha": "learned", "interval": [0.9]}, "options"),
        ("mixed", {**BASES, "alpha": 1.5}, "from 0 to 1"),
        ("mixed", {**BASES, "alpha": "learnt"}, "from 0 to 1"),
        ("mixed", {**BASES, "alpha": "learned", "interval": [0.9, 0.1]}, "interval"),
        ("mixed", {"accurate": "timm/resnet10t", "robust": "rn18", "alpha": "learned"}, "not of timm/resnet10t"),
        ("timm/no_such_model", {}, "no_such_model"),
        ("no_such_module:f", {}, "no_such_module"),
        (f"{__name__}:no_such_factory", {}, "no_such_factory"),
        (f"{__name__}:not_a_network", {}, "torch.nn.Module"),
    ],
)
def test_unknown_names_and_options_are_refused(name, options, says):
    with pytest.raises(InputError, match=says):
        build_model(name, 10, **options)
