"""Networks of the user's own: how they come in, how they normalise, and how they leave."""

import json
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from clat import export_weights, load_checkpoint
from clat.checkpoint import load_tensors, save_checkpoint
from clat.cli import shared
from clat.cli.main import main
from clat.cli.shared import checkpoint_named, network_named
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.models import build_model, normalisation_of
from clat.models.importing import import_weights
from clat.models.normalisation import IMAGENET
from clat.training.recipe import Recipe
from clat.training.train import train

NETWORK = """
import torch
from torch import nn
from beside import width

class Net(nn.Module):
    '''Normalises inside, as many people's networks do.'''
    def __init__(self, classes, channels, width):
        super().__init__()
        self.register_buffer("mean", torch.full((1, channels, 1, 1), 0.25))
        self.register_buffer("std", torch.full((1, channels, 1, 1), 0.5))
        self.conv = nn.Conv2d(channels, width, 3, 2)
        self.bn = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv((x - self.mean) / self.std)))
        return self.head(x.mean((2, 3)))

def make(classes=10, channels=1, width=width):
    return Net(classes, channels, width)

def fixed():
    return Net(3, 1, 2)

def bare(classes, channels):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))

def broken(**options):
    raise KeyError("gone")

def wordy():
    return "a network"
"""


@pytest.fixture
def mynet(tmp_path, monkeypatch):
    """A file with a factory, which imports another that lies beside it; the current folder is elsewhere."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "beside.py").write_text("width = 3\n")
    (folder / "mynet.py").write_text(NETWORK)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield str(folder / "mynet.py")
    sys.modules.pop("beside", None)


@pytest.fixture
def colours() -> Dataset:
    labels = torch.arange(60) % 3
    pixels = torch.randint(0, 255, (60, 3, 12, 12), dtype=torch.uint8)
    return Dataset(pixels, labels, ("a", "b", "c"), "colours", "train")


TRAINING = Recipe(
    epochs=1, batch_size=20, holdout=40, validation_steps=1, health=False, precision="fp32", layout="contiguous"
)
TINY = ["--holdout", "40", "--batch-size", "20", "--threat.steps", "1", "--validation_steps", "1", "--health", "false"]


# Factories


def test_a_factory_in_a_file(mynet):
    before = list(sys.path)
    model = build_model(f"{mynet}:make", 4, channels=2, width=5)
    assert model(torch.rand(1, 2, 8, 8)).shape == (1, 4)
    assert model.network.conv.out_channels == 5
    assert sys.path == before
    assert "mynet" not in sys.modules


def test_a_module_in_the_current_folder_can_be_named(tmp_path, monkeypatch):
    (tmp_path / "lying_here.py").write_text("import torch\ndef make(classes): return torch.nn.Linear(4, classes)\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert build_model("lying_here:make", 3).network.out_features == 3
    assert sys.path == before
    sys.modules.pop("lying_here")


@pytest.mark.parametrize(
    ("factory", "options", "says"),
    [
        ("broken", {}, "failed with the options {}: KeyError: 'gone'"),
        ("make", {"height": 3}, "failed with the options"),
        ("wordy", {}, "returned str"),
        ("missing", {}, r"mynet.py has no function or class 'missing'; there are .*make.*\."),
    ],
)
def test_a_factory_that_fails_gets_one_sentence(factory, options, says, mynet):
    with pytest.raises(InputError, match=says):
        build_model(f"{mynet}:{factory}", 3, **options)
    with pytest.raises(InputError, match="no Python file"):
        build_model("nowhere/net.py:make", 3)


def test_a_lazy_layer_gets_one_sentence_and_trains_once_it_has_its_shape(mynet, blobs, tmp_path, capsys):
    command = ["train", "pgd-at", "--model", f"{mynet}:bare", "--data", "fashion-mnist-mini", *TINY]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert "1.weight has no shape before it has seen images" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "run").exists()
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(InputError, match="run a batch of images through the network"):
        train(TRAINING, network, blobs, out=tmp_path / "run")
    network(torch.zeros(1, 1, 12, 12))
    train(TRAINING, network, blobs, out=tmp_path / "run")


# Normalisation


def test_a_factorys_network_is_taken_as_it_is(mynet, blobs):
    model = network_named(f"{mynet}:make", blobs).eval()
    x = torch.rand(4, 1, 12, 12)
    assert torch.equal(model(x), model.network(x))
    assert normalisation_of(model) == "none by clat; the network has a mean and a std of its own (in Net)"
    with pytest.raises(InputError, match=r"normalises by itself \(in Net\); leave"):
        network_named(f"{mynet}:make,normalise=data", blobs)
    told = network_named(f"{mynet}:bare,normalise=data", blobs)
    assert torch.allclose(told.mean.flatten(), torch.tensor(blobs.statistics()[0]))


def test_how_a_network_normalises_can_be_chosen_and_is_said(colours):
    mean, std = colours.statistics()
    by_data = network_named("rn18,width=2", colours)
    assert by_data.mean.flatten().tolist() == pytest.approx(mean)
    assert by_data.std.flatten().tolist() == pytest.approx(std)
    assert normalisation_of(by_data).endswith("(statistics of the data)")
    assert f"mean {mean[0]:.4g}/" in normalisation_of(by_data)
    none = network_named("rn18,width=2,normalise=none", colours)
    assert not none.mean.any()
    assert normalisation_of(none).startswith("none")
    imagenet = network_named("timm/resnet10t,normalise=imagenet", colours)
    assert imagenet.mean.flatten().tolist() == pytest.approx(IMAGENET[0])
    assert imagenet.std.flatten().tolist() == pytest.approx(IMAGENET[1])
    given = network_named("rn18,width=2,normalise=0.5/0.4/0.3;0.25/0.2/0.1", colours)
    assert given.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert given.std.flatten().tolist() == pytest.approx([0.25, 0.2, 0.1])
    assert normalisation_of(nn.Flatten()).startswith("none")


def test_a_pretrained_timm_network_gets_what_it_was_trained_with(colours, monkeypatch):
    import timm

    def pretrained(name, **options):
        model = timm_create(name, **{**options, "pretrained": False})
        model.pretrained_cfg = {"mean": (0.1, 0.2, 0.6), "std": (0.5, 0.5, 0.8)}
        return model

    timm_create = timm.create_model
    monkeypatch.setattr("clat.models.bridges._downloaded", lambda name: {})
    monkeypatch.setattr("timm.create_model", pretrained)
    model = network_named("timm/resnet10t,pretrained=true", colours)
    assert model.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.6])
    assert model.std.flatten().tolist() == pytest.approx([0.5, 0.5, 0.8])
    assert "pre-trained" in normalisation_of(model)
    grey = build_model("timm/resnet10t", 3, channels=1, pretrained=True)
    assert grey.mean.flatten().tolist() == pytest.approx([0.3])
    inside = {"name": "timm/resnet10t", "pretrained": True}
    with pytest.raises(InputError, match="normalises by itself"):
        build_model("mixed", 3, mean=[0.5] * 3, std=[0.5] * 3, accurate=inside, robust="rn18")


@pytest.mark.parametrize("normalise", ["all", "0.5", "0.5;0.5;0.5", "0.5/0.5;1/1", "0.5/x/1;1/1/1", "0/0/0;1/1/0", 3])
def test_a_normalisation_that_is_none_gets_one_sentence(normalise):
    with pytest.raises(InputError, match="normalis"):
        build_model("rn18", 3, width=2, normalise=normalise)


def test_two_normalisations_are_one_too_many():
    with pytest.raises(InputError, match="give one"):
        build_model("rn18", 3, width=2, mean=[0.5] * 3, std=[0.5] * 3, normalise="imagenet")
    with pytest.raises(InputError, match="mean and std of the data"):
        build_model("rn18", 3, width=2, normalise="data")


def test_a_mixed_classifier_says_how_each_part_normalises():
    model = build_model("mixed", 3, accurate={"name": "rn18", "width": 2, "normalise": "imagenet"}, robust="rn18")
    said = normalisation_of(model)
    assert "accurate: mean 0.485/0.456/0.406" in said
    assert "robust: none" in said


def test_networks_of_torchvision():
    model = build_model("torchvision/mobilenet_v3_small", 5)
    assert model.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 5)
    for name, options, says in (
        ("resnet", {}, "no classifier"),
        ("fasterrcnn_resnet50_fpn", {}, "no classifier"),
        ("resnet18", {"channels": 1}, "3 channels"),
        ("resnet18", {"weights": "DEFAULT"}, "resnet18,pretrained=true in place of"),
    ):
        with pytest.raises(InputError, match=says):
            build_model(f"torchvision/{name}", 5, **options)
    with pytest.raises(InputError, match="clat import"):
        build_model("timm/resnet10t", 5, checkpoint_path="x.pth")


# Weights that need their network named


@pytest.fixture
def trained(mynet, blobs, tmp_path):
    """A run that trained a factory's network."""
    network = network_named(f"{mynet}:make,width=4", blobs)
    return train(TRAINING, network, blobs, out=tmp_path / "run", origin="here"), network.eval()


def test_a_factorys_checkpoint_opens_when_the_factory_is_named(trained, mynet, blobs):
    run, network = trained
    x = torch.rand(3, 1, 12, 12)
    with pytest.raises(InputError, match="may not call; name it in this call"):
        network_named(str(run.last), blobs)
    for model in (
        network_named(str(run.last), blobs, f"{mynet}:make,width=4"),
        checkpoint_named(str(run.last), f"{mynet}:make,width=4")[0],
        load_checkpoint(run.last, build_model(f"{mynet}:make", 3, channels=1, width=4))[0],
        load_checkpoint(run.last, build_model(f"{mynet}:make", 3, channels=1, width=4).network)[0],
    ):
        assert torch.equal(model(x), network(x))
        assert not model.training
    with pytest.raises(InputError, match="do not fit"):
        network_named(str(run.last), blobs, f"{mynet}:make,width=5")
    with pytest.raises(InputError, match="leave normalise out"):
        network_named(str(run.last), blobs, f"{mynet}:make,normalise=imagenet")


def test_a_module_of_ones_own_is_trained_saved_and_given_again(plain, blobs, tmp_path):
    plain.spec = {"name": "os:system"}  # an attribute of the user's, which means nothing to clat
    run = train(TRAINING, plain, blobs, out=tmp_path / "run")
    x = torch.rand(2, 1, 12, 12)
    assert load_tensors(run.best)[1]["model"] is None
    with pytest.raises(InputError, match="build_model did not make; give it"):
        load_checkpoint(run.best)
    mine = type(plain)()
    model, facts = load_checkpoint(tmp_path / "run", mine)
    assert model is mine
    assert facts["epoch"] == 1
    assert torch.equal(model(x), plain.eval()(x))


def test_stored_normalisation_stays_with_weights_given_to_a_bare_network(tmp_path):
    model = build_model("rn18", 3, channels=1, width=2, mean=[0.3], std=[0.2]).eval()
    save_checkpoint(tmp_path / "net.safetensors", model)
    bare = build_model("rn18", 3, channels=1, width=2).network
    found, _ = load_checkpoint(tmp_path / "net.safetensors", bare)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(found(x), model(x))
    assert found.network is bare


def test_finetune_and_status_name_the_factory(trained, mynet, monkeypatch, blobs, tmp_path, capsys):
    run, _ = trained
    monkeypatch.setattr(shared, "load_data", lambda source, split: blobs)
    command = ["finetune", "clat", "--from", str(run.folder), "--data", "blobs", "--out", str(tmp_path / "tuned")]
    command += ["--epochs", "1", "--critical.k", "1", *TINY]
    assert main(command) == 2
    assert "name it in this call" in capsys.readouterr().err
    named = ["--model", f"{mynet}:make,width=4"]
    assert main([*command, *named]) == 0
    assert "Normalisation: none" in capsys.readouterr().out
    assert main(["status", str(tmp_path / "tuned"), *named]) == 0
    assert "trained" in capsys.readouterr().out


def test_weights_of_others_open_when_their_network_is_named(mynet, blobs, tmp_path):
    network = build_model(f"{mynet}:make", 3, channels=1, width=2).network.eval()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pt")
    x = torch.rand(2, 1, 12, 12)
    found = network_named(str(tmp_path / "weights.pt"), blobs, f"{mynet}:make,width=2")
    assert torch.equal(found(x), network(x))


def test_a_name_that_is_nothing_gets_one_sentence(blobs):
    for name in ("nowhere", "runs/nowhere", "x" * 5000, "a\0b"):
        with pytest.raises(InputError, match="no checkpoint or run folder"):
            network_named(name, blobs)
        with pytest.raises(InputError, match="no checkpoint or run folder"):
            load_checkpoint(name)


# Import by the network's own names


@pytest.mark.parametrize(
    ("name", "channels", "options"),
    [
        ("timm/resnet10t", 3, {}),
        ("timm/resnet10t", 1, {}),
        ("timm/vit_tiny_patch16_224", 3, {"img_size": 32, "depth": 1}),
        ("torchvision/squeezenet1_1", 3, {}),  # its head is a convolution
        ("FILE:make", 2, {"width": 4}),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_any_network_by_its_own_names(name, channels, options, prefix, mynet, tmp_path, capsys):
    name = name.replace("FILE", mynet)
    original = build_model(name, 7, channels=channels, **options).eval()
    state = {prefix + key: tensor for key, tensor in original.network.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "weights.pt")
    imported = import_weights(tmp_path / "weights.pt", name, **options)
    assert imported.model.spec["classes"] == 7
    assert imported.model.spec["channels"] == channels
    x = torch.rand(2, channels, 32, 32)
    assert torch.equal(imported.model(x), original(x))
    text = ",".join([name, *(f"{key}={value}" for key, value in options.items())])
    out = str(tmp_path / "net.safetensors")
    assert main(["import", str(tmp_path / "weights.pt"), "--model", text, "--out", out]) == 0
    assert "7 classes" in capsys.readouterr().out
    given = None if ":" not in name else text
    assert torch.equal(checkpoint_named(out, given)[0](x), original(x))


def test_import_of_a_network_with_a_normalisation_before_it(tmp_path):
    network = build_model("timm/resnet10t", 3).network.eval()
    state = {f"1.{key}": tensor for key, tensor in network.state_dict().items()}
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    torch.save({"0.mean": mean, "0.std": std, **state}, tmp_path / "weights.pt")
    imported = import_weights(tmp_path / "weights.pt", "timm/resnet10t")
    assert imported.normalisation == "file"
    x = torch.rand(2, 3, 32, 32)
    expected = network((x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    torch.testing.assert_close(imported.model(x), expected)
    torch.save(network.state_dict(), tmp_path / "bare.pt")
    given = import_weights(tmp_path / "bare.pt", "timm/resnet10t", normalise="imagenet")
    assert given.normalisation == "given"
    assert given.model.mean.flatten().tolist() == pytest.approx(IMAGENET[0])


def test_a_factory_without_classes(mynet, tmp_path):
    torch.save(build_model(f"{mynet}:fixed", 3).network.state_dict(), tmp_path / "weights.pt")
    assert import_weights(tmp_path / "weights.pt", f"{mynet}:fixed").model.spec["classes"] == 3


def bad(kind, good):
    head = good["head.weight"]
    return {
        "nan": {**good, "conv.weight": good["conv.weight"] * torch.nan},
        "inf": {**good, "bn.running_var": good["bn.running_var"] + torch.inf},
        "complex": {**good, "head.weight": head.to(torch.complex64)},
        "meta": {**good, "head.weight": head.to("meta")},
        "sparse": {**good, "head.weight": head.to_sparse()},
        "quantised": {**good, "head.weight": torch.quantize_per_tensor(head, 0.1, 0, torch.qint8)},
        "expanded": {**good, "head.weight": torch.zeros(1, 1).expand(10**9, 3)},
        "whole": {**good, "head.weight": head.to(torch.int32)},
        "shape": {**good, "conv.weight": torch.zeros(3, 1, 5, 5)},
        "missing": {key: tensor for key, tensor in good.items() if key != "head.bias"},
        "strange": {**good, "tail.weight": head},
    }[kind]


@pytest.mark.filterwarnings("ignore:Validating sparse tensor", "ignore:TypedStorage", "ignore:.*quant")
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("nan", "not finite"),
        ("inf", "not finite"),
        ("complex", "head.weight in .* is complex"),
        ("meta", "meta device"),
        ("sparse", "is sparse"),
        ("quantised", "is quantised"),
        ("expanded", "repeats few values"),
        ("whole", "whole numbers"),
        ("shape", r"\(3, 1, 5, 5\)"),
        ("missing", "nothing for head.bias"),
        ("strange", "no place in the network for tail.weight"),
    ],
)
def test_bad_tensors_get_one_sentence(kind, says, mynet, tmp_path):
    good = build_model(f"{mynet}:make", 3, channels=1).network.state_dict()
    torch.save(bad(kind, good), tmp_path / "weights.pt")
    with pytest.raises(InputError, match=says):
        import_weights(tmp_path / "weights.pt", f"{mynet}:make")


def test_not_finite_weights_of_a_known_scheme_are_refused(tmp_path):
    weights = build_model("rn18", 3, width=2).network.state_dict()
    weights["layer1.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"layer1\.0\.conv1\.weight in .* not finite"):
        import_weights(tmp_path / "weights.pt", "rn18", width=2)


def test_a_dict_that_holds_itself_ends(tmp_path):
    content: dict = {"epoch": 3}
    content["model"] = content
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="no named tensors"):
        import_weights(tmp_path / "weights.pt", "rn18")


def test_a_zip_bomb_is_refused_before_it_is_read(tmp_path, monkeypatch):
    torch.save({"weight": torch.zeros(2**22)}, tmp_path / "weights.pt")
    with zipfile.ZipFile(tmp_path / "weights.pt") as stored, zipfile.ZipFile(tmp_path / "bomb.pt", "w", 8) as bomb:
        for entry in stored.namelist():
            bomb.writestr(entry, stored.read(entry))
    assert (tmp_path / "bomb.pt").stat().st_size < 100_000
    monkeypatch.setattr(torch, "load", lambda *a, **o: pytest.fail("it was read"))
    with pytest.raises(InputError, match="compressed"):
        import_weights(tmp_path / "bomb.pt", "rn18")


def test_import_of_a_place_that_is_none(tmp_path, capsys):
    for place in ("x" * 5000, str(tmp_path / "file/below"), str(tmp_path)):
        (tmp_path / "file").touch()
        assert main(["import", place, "--model", "rn18", "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.count("\n") == 1


# Export


def test_an_export_loads_without_clat(tmp_path):
    model = build_model("rn18", 3, width=2, mean=[0.5, 0.4, 0.3], std=[0.25, 0.2, 0.1])
    save_checkpoint(tmp_path / "net.safetensors", model)
    for source in (model, tmp_path / "net.safetensors"):
        export_weights(source, tmp_path / "plain.safetensors")
        bare = build_model("rn18", 3, width=2).network
        bare.load_state_dict(load_file(tmp_path / "plain.safetensors"))
        assert torch.equal(bare.conv1.weight, model.network.conv1.weight)
    from safetensors import safe_open

    with safe_open(tmp_path / "plain.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["mean"]) == pytest.approx([0.5, 0.4, 0.3])


def test_an_export_of_a_module_of_ones_own(plain, tmp_path):
    export_weights(plain, tmp_path / "plain.safetensors")
    save_checkpoint(tmp_path / "net.safetensors", plain)
    export_weights(tmp_path / "net.safetensors", tmp_path / "again.safetensors")
    for name in ("plain", "again"):
        found = load_file(tmp_path / f"{name}.safetensors")
        assert found.keys() == plain.state_dict().keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in plain.state_dict().items())


def test_safetensors_of_others_are_not_taken_for_ours(mynet, blobs, tmp_path):
    network = build_model(f"{mynet}:make", 3, channels=1).network
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match="not written by clat"):
        network_named(str(tmp_path / "weights.safetensors"), blobs)
    found = network_named(str(tmp_path / "weights.safetensors"), blobs, f"{mynet}:make")
    assert torch.equal(found.network.head.weight, network.head.weight)
