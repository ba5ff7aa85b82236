"""Import of public checkpoints: every naming scheme gives the same outputs, every bad file one sentence."""

import importlib.util
import re
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clat.checkpoint import load_checkpoint
from clat.cli.main import main
from clat.data.dataset import to_unit
from clat.data.loading import load_data
from clat.errors import InputError
from clat.models import build_model
from clat.models.importing import import_weights
from clat.models.schemes import SCHEMES

TINY = {
    "rn18": {"width": 4},
    "rn50": {"width": 2},
    "dn121": {"growth": 2, "blocks": (2, 2, 3, 1)},
    "vgg19": {"width": 2, "hidden": 8},
    "preactrn18": {"width": 4},
    "wrn34-10": {"depth": 10, "width": 1},
    "rawrn70-16": {"blocks": (2, 1, 1), "widths": (8, 12, 16), "stem": 4},
}


def lived_in(model):
    """Every parameter and buffer away from its initial value, so that none can be left out unnoticed."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not name.endswith(("mean", "std")):
            tensor += 0.2 * torch.rand_like(tensor)
        if name.endswith("running_mean"):
            tensor += 0.2 * torch.rand_like(tensor)
    return model.eval()


def torchvision_resnet(name):
    return name.replace("shortcut", "downsample").replace("linear", "fc")


def weiaicunzai_resnet(name):
    parts = {"conv1": "0", "bn1": "1", "conv2": "3", "bn2": "4", "conv3": "6", "bn3": "7"}
    match = re.fullmatch(r"layer(\d)\.(\d+)\.((?:conv|bn)\d)\.(\w+)", name)
    if match:
        return f"conv{int(match[1]) + 1}_x.{match[2]}.residual_function.{parts[match[3]]}.{match[4]}"
    name = re.sub(r"layer(\d)\.", lambda m: f"conv{int(m[1]) + 1}_x.", name)
    return name.replace("linear", "fc").replace("conv1.", "conv1.0.").replace("bn1.", "conv1.1.")


def deepmind(name):
    match = re.fullmatch(r"block(\d)\.layer\.(\d+)\.(.+)", name)
    if not match:
        return name.replace("conv1", "init_conv").replace("bn1", "batchnorm").replace("fc", "logits")
    words = {
        "conv1": "conv_0",
        "conv2": "conv_1",
        "bn1": "batchnorm_0",
        "bn2": "batchnorm_1",
        "convShortcut": "shortcut",
    }
    first, _, rest = match[3].partition(".")
    return f"layer.{int(match[1]) - 1}.block.{match[2]}.{words.get(first, first)}.{rest}"


def same(name):
    return name


@pytest.mark.parametrize(
    ("model", "options", "rename", "scheme"),
    [
        ("rn18", {}, same, "kuangliu"),
        ("rn18", {}, torchvision_resnet, "torchvision"),
        ("rn18", {}, weiaicunzai_resnet, "weiaicunzai"),
        ("rn50", {}, same, "kuangliu"),
        ("rn50", {}, torchvision_resnet, "torchvision"),
        ("rn50", {}, weiaicunzai_resnet, "weiaicunzai"),
        ("preactrn18", {}, same, "Rice"),
        ("preactrn18", {"final_norm": False}, same, "kuangliu"),
        ("vgg19", {}, same, "torchvision and weiaicunzai"),
        ("dn121", {}, same, "torchvision"),
        ("wrn34-10", {}, same, "TRADES"),
        ("wrn34-10", {"padding": "asymmetric", "activation": "silu"}, deepmind, "DeepMind"),
        ("rawrn70-16", {}, deepmind, "DeepMind"),
    ],
)
def test_every_naming_scheme_gives_the_same_outputs(model, options, rename, scheme, tmp_path):
    original = lived_in(build_model(model, 7, **TINY[model], **options))
    renamed = {rename(name): tensor for name, tensor in original.network.state_dict().items()}
    assert len(renamed) == len(original.network.state_dict())
    torch.save(renamed, tmp_path / "public.pt")
    imported = import_weights(tmp_path / "public.pt", model, **TINY[model])
    assert imported.scheme.name.startswith(scheme)
    assert imported.model.spec["classes"] == 7
    x = torch.rand(3, 3, 32, 32)
    assert torch.equal(imported.model(x), original(x))


class NewestFirst(nn.Module):
    """A DenseNet as kuangliu's names and concatenates it, written from its description."""

    def __init__(self, classes, growth, blocks):
        super().__init__()
        self.blocks, channels = blocks, 2 * growth
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for number, layers in enumerate(blocks, 1):
            block = nn.ModuleList()
            for _ in range(layers):
                layer = nn.Module()
                layer.bn1, layer.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 4 * growth, 1, bias=False)
                layer.bn2, layer.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)
                block.append(layer)
                channels += growth
            self.add_module(f"dense{number}", block)
            if number < len(blocks):
                transition = nn.Module()
                transition.bn = nn.BatchNorm2d(channels)
                transition.conv = nn.Conv2d(channels, channels // 2, 1, bias=False)
                self.add_module(f"trans{number}", transition)
                channels //= 2
        self.bn, self.linear = nn.BatchNorm2d(channels), nn.Linear(channels, classes)

    def forward(self, x):
        x = self.conv1(x)
        for number in range(1, len(self.blocks) + 1):
            for layer in self.get_submodule(f"dense{number}"):
                y = layer.conv1(layer.bn1(x).relu())
                x = torch.cat([layer.conv2(layer.bn2(y).relu()), x], 1)
            if number < len(self.blocks):
                transition = self.get_submodule(f"trans{number}")
                x = nn.functional.avg_pool2d(transition.conv(transition.bn(x).relu()), 2)
        return self.linear(self.bn(x).relu().mean((2, 3)))


def test_a_densenet_that_concatenates_the_other_way_gives_the_same_outputs(tmp_path):
    original = lived_in(NewestFirst(5, **TINY["dn121"]))
    torch.save({"net": original.state_dict(), "acc": 90.1}, tmp_path / "public.pt")
    imported = import_weights(tmp_path / "public.pt", "dn121", **TINY["dn121"])
    assert imported.scheme.name == "kuangliu"
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(imported.model(x), original(x), rtol=1e-4, atol=1e-4)  # sums in another order


@pytest.fixture
def weights():
    return lived_in(build_model("rn18", 5, width=4)).network.state_dict()


@pytest.mark.parametrize(
    ("wrap", "opened"),
    [
        (lambda w: {"state_dict": w, "epoch": 3, "optimizer": {"state": {}}}, ("state_dict",)),
        (lambda w: {"net": {f"module.{k}": v for k, v in w.items()}, "acc": 90.5}, ("net",)),
        (lambda w: {"model": {"state_dict": w}}, ("model", "state_dict")),
        (lambda w: {"model_state_dict": {f"module.model.{k}": v for k, v in w.items()}}, ("model_state_dict",)),
        (lambda w: {"last": {}, "best": w}, ("best",)),
        (lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, ()),
        (lambda w: {k: v for k, v in w.items() if "num_batches" not in k}, ()),  # PyTorch 0.4.0
        (lambda w: {k: v.double() for k, v in w.items()}, ()),
    ],
)
def test_wrapped_and_prefixed_weights(wrap, opened, weights, tmp_path):
    torch.save(wrap(weights), tmp_path / "public.pt")
    imported = import_weights(tmp_path / "public.pt", "rn18", width=4)
    assert imported.wrapper == opened
    assert imported.normalisation == "none"
    for name, tensor in imported.model.network.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(tensor, weights[name])


def test_safetensors(weights, tmp_path):
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "public.safetensors")
    imported = import_weights(tmp_path / "public.safetensors", "rn18", width=4)
    assert torch.equal(imported.model.network.conv1.weight, weights["conv1.weight"])


@pytest.mark.parametrize(
    ("mean", "std", "prefix"), [("mean", "std", ""), ("mu", "sigma", "module."), ("0.mean", "0.std", "1.")]
)
def test_normalisation_comes_from_the_file_or_from_the_user(mean, std, prefix, weights, tmp_path):
    m, s = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    content = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    torch.save({mean: m.view(1, 3, 1, 1), std: s.view(1, 3, 1, 1), **content}, tmp_path / "public.pt")
    imported = import_weights(tmp_path / "public.pt", "rn18", width=4)
    assert imported.normalisation == "file"
    assert torch.equal(imported.model.mean.flatten(), m)
    assert torch.equal(imported.model.std.flatten(), s)
    given = import_weights(tmp_path / "public.pt", "rn18", mean=[0.5] * 3, std=[0.25] * 3, width=4)
    assert given.normalisation == "given"
    assert given.model.mean.flatten().tolist() == [0.5] * 3


def test_what_a_scheme_implies_can_be_overruled(tmp_path):
    original = build_model("wrn34-10", 5, channels=1, **TINY["wrn34-10"]).network.state_dict()
    dead = {"sub_block1.layer.0.conv1.weight": torch.zeros(1)}
    torch.save({**original, **dead}, tmp_path / "trades.pt")
    assert import_weights(tmp_path / "trades.pt", "wrn34-10", **TINY["wrn34-10"]).model.spec["channels"] == 1
    torch.save({deepmind(name): tensor for name, tensor in original.items()}, tmp_path / "deepmind.pt")
    imported = import_weights(tmp_path / "deepmind.pt", "wrn34-10", activation="relu", **TINY["wrn34-10"])
    assert imported.options["padding"] == "asymmetric"
    assert imported.options["activation"] == "relu"
    assert "activation=relu" in imported.scheme.note


def test_every_scheme_is_of_networks_that_exist():
    for scheme in SCHEMES:
        for name in scheme.models:
            with torch.device("meta"):
                build_model(name, 2, **scheme.options)


class Harmful:
    """What an attacker would put in a pickle."""

    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def write(path, kind, weights):
    """A bad file of one kind."""
    head = weights["linear.weight"]
    if kind.startswith("cut"):
        torch.save(weights, path, _use_new_zipfile_serialization=kind != "cut legacy")
        path.write_bytes(path.read_bytes()[:-20_000])
        return
    if kind == "bytes":
        path.write_bytes(b"PK\x03\x04 not a checkpoint")
        return
    if kind == "empty":
        path.write_bytes(b"")
        return
    content = {
        "harmful": Harmful(),
        "module": nn.Linear(2, 2),
        "numpy": {"state_dict": weights, "acc": numpy.float64(3)},
        "list": [1, 2],
        "no tensors": {"state_dict": {"epoch": 3}},
        "unknown": {f"block.{i}": torch.zeros(1) for i in range(9)},
        "extra": {**weights, "attention.weight": torch.zeros(2)},
        "missing": {k: v for k, v in weights.items() if "layer3" not in k},
        "shape": {**weights, "layer2.0.conv1.weight": torch.zeros(8, 4, 5, 5)},
        "scalar head": {**weights, "linear.weight": torch.tensor(1.0)},
        "empty head": {**weights, "linear.weight": head[:0], "linear.bias": head[:0, 0]},
        "sparse": {**weights, "linear.weight": head.to_sparse()},
        "half normalised": {**weights, "mean": torch.zeros(3)},
        "odd normalisation": {**weights, "mean": torch.zeros(5), "std": torch.ones(5)},
        "zero std": {**weights, "mean": torch.zeros(3), "std": torch.zeros(3)},
    }[kind]
    torch.save(content, path)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor", "ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("cut", "cut off"),
        ("cut legacy", "cut off"),
        ("bytes", "not a PyTorch checkpoint"),
        ("empty", "not a PyTorch checkpoint"),
        ("harmful", "Python object (exec"),
        ("module", "Python object (torch.nn"),
        ("numpy", "Python object (numpy"),
        ("list", "no named tensors"),
        ("no tensors", "no named tensors"),
        ("unknown", "block.0, block.1, block.2 and 6 more"),
        ("extra", "no place for attention.weight"),
        ("missing", "nothing for layer3.0.bn1.bias"),
        ("shape", "layer2.0.conv1.weight has shape (8, 4, 5, 5)"),
        ("scalar head", "linear.weight has shape ()"),
        ("empty head", "linear.weight has shape (0, 32)"),
        ("sparse", "is sparse"),
        ("half normalised", "give mean and std"),
        ("odd normalisation", "one number a channel (3)"),
        ("zero std", "std above 0"),
    ],
)
def test_a_bad_file_gets_one_sentence(kind, says, weights, tmp_path, capsys):
    write(tmp_path / "public.pt", kind, weights)
    assert main(["import", str(tmp_path / "public.pt"), "--model", "rn18,width=4", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("clat: ")
    assert said.count("\n") == 1
    assert says in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "rn18,width=8"], "choose the network, or the options"),
        (["--model", "rn50,width=4"], "has nothing for layer1.0.bn3.bias"),
        (["--model", "vgg19"], "fit no scheme known for vgg19"),
        (["--model", "timm/resnet18"], "is it of another network than timm/resnet18"),
        (["--model", "rn18,width=4", "--classes", "10"], "has 5 classes, not 10"),
        (["--model", "rn18,width=4", "--mean", "0.5,0.5,0.5"], "both mean and std"),
        (["--model", "rn18,width=4", "--mean", "0.5,0.5", "--std", "1,1"], "one number a channel (3)"),
        (["--model", "rn18,width=4", "--mean", "0.5;0.5", "--std", "1,1"], "not a number"),
        (["--model", "rn18,depth=4"], "depth"),
        (["--model", "rn18,width=-4"], "negative"),
        (["--model", "rn18,classes=4"], "no option of a network"),
    ],
)
def test_wrong_options_get_one_sentence(arguments, says, weights, tmp_path, capsys):
    torch.save(weights, tmp_path / "public.pt")
    assert main(["import", str(tmp_path / "public.pt"), *arguments, "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err


def test_the_command_says_what_it_recognised_and_writes_a_checkpoint(weights, tmp_path, capsys):
    torch.save({"net": weights}, tmp_path / "public.pt")
    out = str(tmp_path / "net.safetensors")
    command = ["import", str(tmp_path / "public.pt"), "--model", "rn18,width=4", "--out", out]
    assert main([*command, "--classes", "5", "--mean", "0.5,0.4,0.3", "--std", "0.2,0.2,0.2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Names as in kuangliu (also TRADES, MART, RobustBench), under net." in printed
    assert "5 classes" in printed
    assert "Normalisation as given" in printed
    model, facts = load_checkpoint(out)
    assert facts["imported"]["scheme"].startswith("kuangliu")
    torch.testing.assert_close(model.mean.flatten(), torch.tensor([0.5, 0.4, 0.3]))
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert "give --mean and --std" in " ".join(capsys.readouterr().out.split())
    assert main(["import", str(tmp_path / "nowhere.pt"), "--model", "rn18", "--out", str(tmp_path / "x")]) == 2
    assert "There is no file at" in capsys.readouterr().err


CIFAR = Path(__file__).parents[2] / "shared/data/cifar10-jpeg"  # beside the repository, where it was put there


def test_a_real_checkpoint_classifies_cifar10(tmp_path, capsys):
    wheel = importlib.util.find_spec("pyautoattack")
    file = Path(wheel.origin).parent / "examples/model_test.pt" if wheel and wheel.origin else None
    if file is None or not file.exists():
        pytest.skip("pyautoattack, whose wheel has a CIFAR-10 ResNet-18, is not installed")
    out = str(tmp_path / "rn18.safetensors")
    assert main(["import", str(file), "--model", "rn18", "--out", out]) == 0
    assert "10 classes, 11,173,962 parameters" in capsys.readouterr().out
    if not CIFAR.exists():
        pytest.skip("no CIFAR-10 images to classify")
    model, _ = load_checkpoint(out)
    data = load_data(str(CIFAR), "test").subset(torch.arange(0, 5000, 50))
    pixels, y = next(data.batches(100, workers=0))
    with torch.inference_mode():
        assert (model(to_unit(pixels)).argmax(1) == y).float().mean() > 0.75


def test_import_without_the_command_line_raises_input_errors(tmp_path):
    with pytest.raises(InputError, match="no file"):
        import_weights(tmp_path / "nothing.pt", "rn18")
