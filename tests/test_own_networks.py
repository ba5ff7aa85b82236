"""Networks of timm, torchvision and transformers, by name: their weights, heads, normalisation and layers."""

import json
import re
import shlex
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clat.checkpoint import load_checkpoint, save_checkpoint
from clat.cli import shared
from clat.cli.main import main
from clat.cli.shared import network_named
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.evaluation.trust import CHECKS, trust
from clat.layers import trace
from clat.models import build_model, normalisation_of
from clat.models.importing import import_weights
from clat.models.normalisation import IMAGENET, of_preprocessor

SMALL = "--epochs 1 --holdout 6 --batch_size 6 --threat.steps 1 --validation_steps 1 --health false"
CHECKED = ("clean-accuracy", "batch", "gradients", "attack")

# Each with options that make it small, and one of its layers. VIT and RESNET are folders.
NETWORKS = {
    "timm/resnet18": ({}, "layer3.0.conv2"),
    "timm/vit_tiny_patch16_224": ({"img_size": 32, "depth": 2}, "blocks.1.attn.qkv"),
    "timm/convnext_atto": ({}, "stages.1.downsample.1"),
    "timm/mobilenetv3_small_100": ({}, "blocks.2.0.se.conv_reduce"),
    "timm/swin_tiny_patch4_window7_224": (
        {"img_size": 32, "embed_dim": 24, "depths": [1, 1, 1, 1]},
        "layers.1.downsample.reduction",
    ),
    "torchvision/densenet121": ({}, "features.denseblock4.denselayer16.conv2"),
    "transformers/VIT": ({}, "vit.layers.1.attention.q_proj"),
    "transformers/RESNET": ({}, "resnet.encoder.stages.1.layers.0.layer.1.convolution"),
}
HEADS = ("fc", "head", "head.fc", "classifier", "classifier.1")


@pytest.fixture
def colours() -> Dataset:
    """12 images of three classes in colour."""
    labels = torch.arange(12) % 3
    pixels = torch.randint(0, 80, (12, 3, 32, 32), dtype=torch.uint8)
    for i, label in enumerate(labels):
        pixels[i, label, :, 10 * label : 10 * label + 10] += 150
    return Dataset(pixels, labels, ("cat", "dog", "owl"), "colours", "train")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Folders vit and resnet, as save_pretrained writes them, for five classes."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("saved")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vit = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=5, **sizes)
    names = {i: name for i, name in enumerate(("cat", "dog", "owl", "bat", "ant"))}
    resnet = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=names
    )
    for name, network in (
        ("vit", transformers.ViTForImageClassification(vit)),
        ("resnet", transformers.ResNetForImageClassification(resnet)),
    ):
        network.save_pretrained(folder / name)
        colour = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
        (folder / name / "preprocessor_config.json").write_text(json.dumps(colour))
    logging.enable_progress_bar()
    return folder


@pytest.fixture
def mine(saved, tmp_path) -> Path:
    """Copies of the folders, to be changed."""
    shutil.copytree(saved, tmp_path / "saved")
    return tmp_path / "saved"


def changed(file: Path, **keys: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


@pytest.mark.parametrize("name", NETWORKS)
def test_they_are_ranked_tuned_measured_and_checked(name, colours, saved, tmp_path, monkeypatch, capsys):
    """By the commands, from random weights: what a run needs to build them is in its checkpoints."""
    options, layer = NETWORKS[name]
    name = name.replace("VIT", f"{saved}/vit").replace("RESNET", f"{saved}/resnet")
    model = build_model(name, 3, **options)
    calls = [call.name.removeprefix("network.") for call in trace(model, torch.rand(1, 3, 32, 32))]
    assert layer in calls
    assert calls[-1] in HEADS
    save_checkpoint(tmp_path / "net.safetensors", model)
    monkeypatch.setattr(shared, "load_data", lambda source, split: colours)
    monkeypatch.chdir(tmp_path)
    for command in (
        "layers net.safetensors --batch 3 --steps 1 --data colours --json layers.json",
        f"finetune clat --from net.safetensors --out run {SMALL} --data colours",
        "evaluate run --limit 3 --steps 1 --starts 1 --split train --data colours",
    ):
        assert main(command.split()) == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "layers.json").read_text())["layers"]
    assert {row["name"].removeprefix("network.") for row in rows} == set(calls)
    assert next(row["note"] for row in rows if row["name"].endswith(calls[-1])) == "head"
    checks = [check for check in CHECKS if check.id in CHECKED]
    verdict = trust(load_checkpoint("run")[0], colours, limit=4, checks=checks)
    found = {finding.check: finding.status for finding in verdict.findings}
    assert found["batch"] == found["gradients"] == "pass"
    assert found["attack"] in ("pass", "skipped")  # there is nothing to attack where no image is right


# transformers


def test_a_checkpoint_makes_a_network_of_transformers_without_its_folder(mine, tmp_path):
    x = torch.rand(2, 1, 64, 64)
    model = build_model(f"transformers/{mine}/vit", 3, channels=1, image_size=64).eval()
    save_checkpoint(tmp_path / "net.safetensors", model)
    torch.save(model.network.state_dict(), tmp_path / "weights.pt")
    imported = import_weights(tmp_path / "weights.pt", f"transformers/{mine}/vit", image_size=64).model
    shutil.rmtree(mine)
    found, facts = load_checkpoint(tmp_path / "net.safetensors")
    assert facts["model"]["name"] == "transformers/vit"  # not where it lay
    for other in (found, imported):
        assert other.spec["classes"] == 3
        assert torch.equal(other(x).logits, model(x).logits)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_pretrained_weights_come_with_their_normalisation_and_head(kind, saved, colours):
    import transformers

    name = f"transformers/{saved}/{kind}"
    theirs = transformers.AutoModelForImageClassification.from_pretrained(saved / kind).eval()
    x = torch.rand(2, 3, 32, 32)
    kept = build_model(name, 5, pretrained=True)
    assert kept.training
    assert not kept.new_head
    normal = (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    torch.testing.assert_close(kept.eval()(x).logits, theirs(normal).logits)
    assert normalisation_of(kept) == "mean 0.5/0.4/0.3, std 0.2/0.3/0.4 (as it was pre-trained)"
    listed = " (cat, dog, owl, ...)" if kind == "resnet" else ""
    assert f"is kept: its 5 classes{listed} must be those of the data, in this order" in kept.notes[0]
    new = network_named(f"{name},pretrained=true", colours)
    assert new.new_head
    assert new.notes == (f"The head is new, with random weights for 3 classes; that of {name} is for 5.",)
    for key, tensor in new.network.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[key]) != key.startswith("classifier"), key
    told = build_model(name, 3, pretrained=True, normalise="imagenet")
    assert told.mean.flatten().tolist() == pytest.approx(IMAGENET[0])


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, lambda x: (x - 0.5) / 0.25),
        ({"do_normalize": False}, lambda x: x),
        ({"do_rescale": False}, lambda x: (255 * x - 0.5) / 0.25),
        ({"rescale_factor": 1 / 127.5, "rescale_offset": True}, lambda x: (2 * x - 1 - 0.5) / 0.25),
        ({"image_processor_type": "EfficientNetImageProcessor"}, lambda x: (x - 0.5) / 0.25 / 0.25),
        ({"do_flip_channel_order": True}, "trained with do_flip_channel_order, which clat does not do"),
        ({"image_mean": None}, "does not say how it normalises"),
    ],
)
def test_what_a_preprocessor_does_to_colours_is_done(found, expected, tmp_path):
    content = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_resize": True, **found}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            of_preprocessor(tmp_path, "net")
        return
    mean, std = of_preprocessor(tmp_path, "net")
    x = torch.rand(3)
    torch.testing.assert_close((x - torch.tensor(mean)) / torch.tensor(std), expected(x))


def test_a_configuration_never_chooses_code(mine):
    changed(
        mine / "vit/config.json",
        auto_map={"AutoModelForImageClassification": "evil.Net"},
        _attn_implementation="somebody/kernel",
        quantization_config={"quant_method": "x"},
        dtype="float16",
        architectures=["os.system"],
    )
    (mine / "vit/evil.py").write_text("raise SystemExit")
    (mine / "vit/pytorch_model.bin").write_bytes(b"a pickle, which is not looked at")
    network = build_model(f"transformers/{mine}/vit", 5, pretrained=True).network
    assert type(network).__name__ == "ViTForImageClassification"
    assert network.config._attn_implementation == "sdpa"
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert not {"auto_map", "quantization_config"} & set(vars(network.config))


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (lambda f: (f / "config.json").unlink(), {}, "no config.json"),
        (lambda f: (f / "config.json").write_text("[1"), {}, "no config.json"),
        (lambda f: changed(f / "config.json", model_type="bert"), {}, "is of the kind bert, but clat takes beit"),
        (lambda f: changed(f / "config.json", hidden_size="wide"), {}, "could not make .* 'hidden_size'"),
        (lambda f: None, {"image_sise": 32}, "no setting image_sise. Did you mean image_size?"),
        (lambda f: None, {"pretrained": True, "image_size": 64}, "position_embeddings is missing or has another shape"),
        (lambda f: None, {"pretrained": True, "channels": 1}, "3 channels; these have 1"),
        (lambda f: (f / "preprocessor_config.json").unlink(), {"pretrained": True}, "how it normalises"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), {"pretrained": True}, "reads no pickle"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), {"pretrained": True}, "could not make"),
        (shutil.rmtree, {}, "There is no folder"),
    ],
)
def test_a_folder_that_does_not_do_gets_one_sentence(change, options, says, mine):
    change(mine / "vit")
    with pytest.raises(InputError, match=says) as error:
        build_model(f"transformers/{mine}/vit", 5, **options)
    assert "\n" not in str(error.value)


def test_transformers_is_named_where_it_is_missing(saved, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'torch-clat\[transformers\]'"):
        build_model(f"transformers/{saved}/vit", 3)


# timm and torchvision


def test_pretrained_weights_of_timm_are_read_from_safetensors(tmp_path, monkeypatch, colours):
    import timm

    torch.manual_seed(1)
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr("clat.models.bridges.from_hub", lambda *asking: asked.append(asking) or tmp_path)
    new = network_named("timm/resnet10t,pretrained=true", colours)
    assert asked[0][:2] == ("timm/resnet10t.c3_in1k", ["model.safetensors", "open_clip_model.safetensors"])
    assert new.notes == ("The head is new, with random weights for 3 classes; that of timm/resnet10t is for 1,000.",)
    kept = build_model("timm/resnet10t", 1000, pretrained=True)
    assert kept.notes == (
        "The head of timm/resnet10t is kept: its 1,000 classes must be those of the data, in this order.",
    )
    assert torch.equal(new.network.conv1[0].weight, kept.network.conv1[0].weight)
    assert kept.mean.flatten().tolist() == pytest.approx(IMAGENET[0])
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="not on the hub as safetensors"):
        build_model("timm/resnet10t", 3, pretrained=True)


def test_pretrained_weights_of_torchvision(monkeypatch, colours, tmp_path):
    from torchvision import models
    from torchvision.models._api import WeightsEnum

    torch.manual_seed(1)
    made = {name: models.get_model(name, weights=None, num_classes=1000, init_weights=False) for name in ("googlenet",)}
    made["squeezenet1_1"] = models.squeezenet1_1()
    read = []

    def state(weights, **keys):
        read.append(keys)
        return made["googlenet" if "GoogLe" in type(weights).__name__ else "squeezenet1_1"].state_dict()

    monkeypatch.setattr(WeightsEnum, "get_state_dict", state)
    new = network_named("torchvision/squeezenet1_1,pretrained=true", colours)
    assert read[0]["weights_only"]
    assert new.new_head
    assert "is for 1,000" in new.notes[0]
    assert torch.equal(new.network.features[0].weight, made["squeezenet1_1"].features[0].weight)
    assert new.mean.flatten().tolist() == pytest.approx(IMAGENET[0])
    kept = build_model("torchvision/squeezenet1_1", 1000, pretrained=True)
    assert "(tench, goldfish, great white shark, ...)" in kept.notes[0]
    assert torch.equal(kept.network.classifier[1].weight, made["squeezenet1_1"].classifier[1].weight)
    # GoogLeNet's weights take pixels in [-1, 1], which it makes itself of those that are normalised for ImageNet.
    googlenet = build_model("torchvision/googlenet", 3, pretrained=True, init_weights=False)
    save_checkpoint(tmp_path / "net.safetensors", googlenet)
    assert googlenet.network.transform_input
    assert load_checkpoint(tmp_path / "net.safetensors")[0].network.transform_input
    other = {**made["squeezenet1_1"].state_dict(), "features.0.weight": torch.zeros(64, 3, 5, 5)}
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda weights, **keys: other)
    with pytest.raises(InputError, match="do not fit these options"):
        build_model("torchvision/squeezenet1_1", 3, pretrained=True)


# Hubs that do not answer


@pytest.mark.parametrize(
    "name",
    [
        "timm/resnet18,pretrained=true",
        "torchvision/resnet18,pretrained=true",
        "transformers/google/vit-base-patch16-224",
        "transformers/google/vit-base-patch16-224,pretrained=true",
    ],
)
def test_a_hub_that_cannot_be_reached_gets_one_sentence_soon(name, colours, tmp_path, monkeypatch, capfd):
    def unreachable(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for cache in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.setattr(f"huggingface_hub.constants.{cache}", str(tmp_path / "hub"))
    monkeypatch.setattr(shared, "load_data", lambda source, split: colours)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text("epochs: 3\n")
    start = time.monotonic()
    command = ["train", "clean", "--model", name, "--data", "colours", "--out", str(tmp_path / "run"), "--overwrite"]
    assert main(command) == 2
    assert time.monotonic() - start < 10
    said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("Downloading:")]
    assert len(said) == 1
    assert "cannot be reached for" in said[0]
    assert "try again with a connection" in said[0]
    assert (tmp_path / "run/recipe.yaml").read_text() == "epochs: 3\n"  # nothing is lost


# Fine-tuning by name


def test_fine_tuning_starts_from_trained_weights_alone(saved, colours, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shared, "load_data", lambda source, split: colours)

    def finetuned(name: str, recipe: str = "clat") -> tuple[int, str]:
        command = ["finetune", recipe, "--from", name, "--data", "colours", "--out", str(tmp_path / "run")]
        code = main([*command, "--overwrite", *SMALL.split()])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    name = f"transformers/{saved}/resnet"
    assert (
        finetuned("rn18")[1]
        == "clat: rn18 has random weights and nothing to fine-tune; train it first by clat train.\n"
    )
    code, said = finetuned(name)
    assert (code, "has random weights" in said, f"add pretrained=true ({name},pretrained=true)" in said) == (
        2,
        True,
        True,
    )
    code, said = finetuned(f"{name},pretrained=true")
    assert code == 2
    assert "has a new head, which stays random" in said
    assert finetuned(f"{name},pretrained=true", "pgd-at")[0] == 0
    monkeypatch.setattr(shared, "load_data", lambda source, split: five(colours))
    code, said = finetuned(f"{name},pretrained=true")
    assert code == 0, said
    assert "The head of" in said
    assert "Normalisation: mean 0.5/0.4/0.3, std 0.2/0.3/0.4 (as it was pre-trained)" in said
    assert "selected network.resnet" in said


def five(data: Dataset) -> Dataset:
    return Dataset(data.pixels, torch.arange(len(data)) % 5, tuple("abcde"), "colours", "train")


def test_a_network_for_another_size_says_what_to_do(saved, monkeypatch, capsys, colours):
    monkeypatch.setattr(shared, "load_data", lambda source, split: colours)
    advice = "give it images of its size (size= of the data), or make the network for theirs"
    for name in ("timm/vit_tiny_patch16_224,depth=1", f"transformers/{saved}/vit,image_size=64"):
        assert main(["layers", name, "--data", "colours", "--batch", "2"]) == 2
        said = capsys.readouterr().err
        assert advice in said
        assert said.count("\n") == 1


def test_a_network_that_normalises_itself_is_not_normalised_twice(tmp_path):
    from torchvision.transforms import Normalize

    (tmp_path / "net.py").write_text(
        "from torch import nn\nfrom torchvision.transforms import Normalize\n"
        "def make(): return nn.Sequential(Normalize([0.5], [0.5]), nn.Flatten(), nn.Linear(4, 3))\n"
    )
    name = f"{tmp_path / 'net.py'}:make"
    assert normalisation_of(build_model(name, 3, channels=1)).endswith("a mean and a std of its own (in 0)")
    for keys in ({"normalise": "0.5;0.5"}, {"mean": [0.5], "std": [0.5]}):
        with pytest.raises(InputError, match=r"normalises by itself \(in 0\)"):
            build_model(name, 3, channels=1, **keys)
    assert normalisation_of(nn.Sequential(Normalize([0.5], [0.5]))).startswith("none by clat; the network has")


PAGE = (Path(__file__).parents[1] / "docs/models.md").read_text()


def test_the_commands_of_the_page_run(mine, tmp_path, monkeypatch, colours, capsys):
    import timm

    monkeypatch.chdir(tmp_path)
    shutil.copytree(mine / "vit", "my-vit")
    changed(Path("my-vit/config.json"), id2label={"0": "cat", "1": "dog", "2": "owl"})
    weights = timm.create_model("mobilenetv3_small_100").state_dict()
    save_file(weights, "model.safetensors")
    monkeypatch.setattr("clat.models.bridges.from_hub", lambda *_: tmp_path)
    monkeypatch.setattr(shared, "load_data", lambda source, split: colours)
    Path("mynet.py").write_text(
        "from torch import nn\ndef make(classes, channels, width):\n"
        "    first, last = nn.Conv2d(channels, width, 8, 8), nn.Linear(16 * width, classes)\n"
        "    return nn.Sequential(first, nn.ReLU(), nn.Flatten(), last)\n"
    )
    small = {"train": SMALL, "finetune": SMALL, "layers": "--batch 3 --steps 1", "evaluate": "--limit 3 --steps 1"}
    lines = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        words = shlex.split(line)[1:]
        assert main([*words, *small[words[0]].split()]) == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    assert "The head is new, with random weights for 3 classes" in printed.err
    selected = next(line for line in printed.out.splitlines() if "selected" in line)
    assert ".se." not in selected
