"""Adapters, weights and ONNX files without clat, and the hub's folder: what is handed on is the same network."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

from clat.checkpoint import DIGEST, KEY, load_checkpoint, load_tensors, save_checkpoint, save_tensors
from clat.cli.main import main
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.models import build_model
from clat.network import same_bits
from clat.objectives import Clean
from clat.sharing import (
    apply_adapter,
    export_onnx,
    from_pretrained,
    load_adapter,
    push_to_hub,
    save_adapter,
    save_pretrained,
)
from clat.threat import Threat
from clat.training.recipe import Recipe
from clat.training.runs import Run
from clat.training.train import train
from clat.tuners import ConvLora, Critical, Rift, Whole
from conftest import Plain, network, same_tensors

PAGE = (Path(__file__).parents[1] / "docs/sharing.md").read_text()
ONE = Recipe(
    objective=Clean(),
    epochs=1,
    batch_size=60,
    holdout=60,
    threat=Threat(eps=0.1, step=0.05, steps=1),
    validation_steps=1,
    health=False,
    precision="fp32",
    augment=False,
)
TUNERS = {
    "critical": Critical(k=1),
    "critical with norms": Critical(k=2, norm_affine=True, norm_statistics="all"),
    "convlora": ConvLora(),
    "rift": Rift(batch=60, passes=1),
    "whole": Whole(),
}


def bars() -> Dataset:
    torch.manual_seed(0)
    labels = torch.arange(180) % 3
    pixels = torch.randint(0, 60, (180, 1, 12, 12), dtype=torch.uint8)
    for i, label in enumerate(labels):
        pixels[i, :, 4 * label : 4 * label + 3] += 150
    return Dataset(pixels, labels, ("top", "middle", "bottom"), "bars", "train")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with base.safetensors and a run over it by each tuner."""
    folder = tmp_path_factory.mktemp("runs")
    save_checkpoint(folder / "base.safetensors", network())
    for name, tuner in TUNERS.items():
        model, _ = load_checkpoint(folder / "base.safetensors")
        train(replace(ONE, tuner=tuner), model, bars(), out=folder / name)
    return folder


@pytest.fixture
def adapter(runs, tmp_path) -> Path:
    save_adapter(runs / "critical", tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


def refused(capsys, *arguments: object) -> str:
    """The one sentence that the command line refuses the arguments with."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("clat: ")
    assert said.count("\n") == 1
    assert len(said) < 600
    return said


# Adapters


@pytest.mark.parametrize("name", TUNERS)
def test_base_and_adapter_give_the_fine_tuned_network_bit_for_bit(name, runs, tmp_path, capsys):
    tuned, small, whole = Run(runs / name), tmp_path / "small.safetensors", tmp_path / "whole.safetensors"
    assert main(["adapter", "save", str(tuned.folder), "--out", str(small)]) == 0
    assert f"% of the {tuned.best.stat().st_size:,} of the whole checkpoint" in capsys.readouterr().out
    assert main(["adapter", "apply", str(runs / "base.safetensors"), str(small), "--out", str(whole)]) == 0
    assert f"the adapter has {small.stat().st_size:,} bytes" in capsys.readouterr().out
    assert same_tensors(whole, tuned.best)
    assert load_tensors(whole)[1] == load_tensors(tuned.best)[1]

    before, after = load_tensors(runs / "base.safetensors")[0], load_tensors(tuned.best)[0]
    stored = load_adapter(small).tensors
    assert stored.keys() == {key for key in after if not same_bits(before[key], after[key])}
    if name == "critical":
        assert stored.keys() == set(tuned.selections[0].trainable)
    if name == "critical with norms":
        moved = {key for key in after if key.endswith(("running_mean", "running_var", "num_batches_tracked"))}
        assert stored.keys() == {*tuned.selections[0].trainable, *moved}


def test_an_adapter_says_where_it_comes_from(runs, adapter):
    run, facts = Run(runs / "critical"), load_adapter(adapter).facts
    assert facts["validation"] == {key: run.metrics[0][key] for key in ("clean", "robust", "validation_images")}
    assert facts["adapter"]["recipe"] == run.recipe
    assert facts["adapter"]["selections"] == [{"epoch": 1, "layers": run.selected}]


def test_the_last_checkpoint_has_an_adapter_too(runs, tmp_path):
    save_adapter(Run(runs / "critical").last, tmp_path / "adapter.safetensors")
    base, _ = load_checkpoint(runs / "base.safetensors")
    tuned = apply_adapter(base, load_adapter(tmp_path / "adapter.safetensors"))
    last = load_tensors(Run(runs / "critical").last)[0]
    assert all(same_bits(tensor, last[key]) for key, tensor in tuned.state_dict().items())


def test_a_run_folder_is_a_base(runs, tmp_path):
    model, _ = load_checkpoint(runs / "whole")
    save_adapter(train(ONE, model, bars(), out=tmp_path / "next").folder, tmp_path / "adapter.safetensors")
    command = ["adapter", "apply", runs / "whole", tmp_path / "adapter.safetensors", "--out", tmp_path / "model"]
    assert main([str(word) for word in command]) == 0
    assert same_tensors(tmp_path / "model", Run(tmp_path / "next").best)


def test_several_adapters_over_one_base_in_one_process(runs, tmp_path):
    base, _ = load_checkpoint(runs / "base.safetensors")
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    names = ("critical", "critical with norms", "convlora")
    for name in names:
        save_adapter(runs / name, tmp_path / name)
    tuned = {name: apply_adapter(base, load_adapter(tmp_path / name)) for name in names}
    x = torch.rand(4, 1, 12, 12)
    for name, model in tuned.items():
        assert torch.equal(model(x), load_checkpoint(runs / name)[0](x))
        assert not torch.equal(model(x), base(x))
    assert all(same_bits(tensor, before[key]) for key, tensor in base.state_dict().items())
    stored, place = load_adapter(tmp_path / "critical").tensors, dict(base.state_dict())
    for key, tensor in tuned["critical"].state_dict().items():
        assert (tensor.data_ptr() == place[key].data_ptr()) == (key not in stored)  # shared unless changed
    tuned["critical"].requires_grad_(False).to(torch.float64)
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in base.parameters())


FACTORY = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, 4, 3, padding=1)
        self.second, self.third = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.third.weight = self.second.weight
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.head(torch.relu(self.third(torch.relu(self.second(x)))).mean((2, 3)))

def make(classes, channels):
    return Tied(classes, channels)
"""


@pytest.mark.parametrize("layer", ["second", "head"])
def test_a_factorys_network_with_tied_weights(layer, tmp_path, capsys):
    """The base is a plain module's; only --model says how the run named its tensors."""
    (tmp_path / "mine.py").write_text(FACTORY)
    made = build_model(f"{tmp_path}/mine.py:make", 3, channels=1)
    data = {**bars().identity(), "classes": bars().classes, "shape": bars().shape}  # how many classes and channels
    save_checkpoint(tmp_path / "base", made.network, data=data)
    recipe = replace(ONE, tuner=Critical(layers=(f"network.{layer}",)))
    run = train(recipe, made, bars(), out=tmp_path / "run")
    save = ["adapter", "save", tmp_path / "run", "--out", tmp_path / "small"]
    assert main([str(word) for word in save]) == 0
    apply = ["adapter", "apply", tmp_path / "base", tmp_path / "small", "--out", tmp_path / "whole"]
    assert "is not the base of this adapter" in refused(capsys, *apply)
    assert main([str(word) for word in [*apply, "--model", f"{tmp_path}/mine.py:make"]]) == 0
    assert same_tensors(tmp_path / "whole", run.best)
    with pytest.raises(InputError, match="may not call"):
        load_checkpoint(tmp_path / "whole")
    base = build_model(f"{tmp_path}/mine.py:make", 3, channels=1)
    base.network.load_state_dict(load_tensors(tmp_path / "base")[0])
    tuned = apply_adapter(base, load_adapter(tmp_path / "small")).network
    assert tuned.second.weight is tuned.third.weight
    assert (tuned.second.weight.data_ptr() == base.network.second.weight.data_ptr()) == (layer == "head")


# Adapters at fault


def flipped(path: Path, name: str) -> None:
    """Writes the checkpoint again, whole, with the lowest bit of one weight turned over."""
    stored, facts = load_tensors(path)
    stored[name].view(-1).view(torch.uint8)[0] ^= 1
    save_tensors(path, stored, **facts)


@pytest.mark.parametrize("name", ["an unchanged weight", "a changed weight", "mean"])
def test_another_base_is_refused(name, runs, adapter, tmp_path, capsys):
    base = shutil.copy(runs / "base.safetensors", tmp_path / "base.safetensors")
    changed = next(iter(load_adapter(adapter).tensors))
    flipped(base, {"an unchanged weight": "network.linear.weight", "a changed weight": changed}.get(name, name))
    said = refused(capsys, "adapter", "apply", base, adapter, "--out", tmp_path / "out")
    assert f"{base} is not the base of this adapter" in said
    with pytest.raises(InputError, match="This network is not the base"):
        apply_adapter(load_checkpoint(base)[0], load_adapter(adapter))
    assert "is not the base" in refused(capsys, "adapter", "apply", runs / "whole", adapter, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_earlier_adapter(call, runs, adapter, monkeypatch, capsys):
    before, write = adapter.read_bytes(), Path.write_bytes

    def full(*_):
        raise OSError(28, "No space left on device")

    def half(path, content):
        write(path, content[: len(content) // 2])
        full()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half) if call == "write" else patch.setattr(os, call, full)
        said = refused(capsys, "adapter", "save", runs / "whole", "--out", adapter, "--overwrite")
    assert "No space left on device" in said
    assert adapter.read_bytes() == before
    assert [path.name for path in adapter.parent.iterdir()] == [adapter.name]
    assert main(["adapter", "save", str(runs / "whole"), "--out", str(adapter), "--overwrite"]) == 0
    assert len(load_adapter(adapter).tensors) > 100


def test_nothing_is_overwritten(runs, adapter, capsys):
    before = adapter.read_bytes()
    assert "is there already" in refused(capsys, "adapter", "save", runs / "whole", "--out", adapter)
    apply = ("adapter", "apply", runs / "base.safetensors", adapter, "--out", adapter)
    assert "is there already" in refused(capsys, *apply)
    assert adapter.read_bytes() == before


def test_a_cut_adapter_is_refused(runs, adapter, tmp_path, capsys):
    content = adapter.read_bytes()
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        adapter.write_bytes(content[:length])
        apply = ("adapter", "apply", runs / "base.safetensors", adapter, "--out", tmp_path / "out")
        assert "is not a readable safetensors file" in refused(capsys, *apply)
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_in_an_adapter_is_noticed_wherever_it_is(adapter):
    content = bytearray(adapter.read_bytes())
    start = content.index(b'\\"epoch\\"')  # from the facts on; before them are the format's own fields
    for place in (start + torch.randint(len(content) - start, (40,))).tolist():
        content[place] ^= 1
        adapter.write_bytes(content)
        with pytest.raises(InputError, match=r"damaged|not a readable|no usable"):
            load_adapter(adapter)
        content[place] ^= 1
    adapter.write_bytes(content)
    load_adapter(adapter)


def test_an_adapter_is_no_network_and_a_network_no_adapter(runs, adapter, tmp_path, capsys):
    assert "is an adapter" in refused(capsys, "evaluate", adapter, "--data", "fashion-mnist-mini")
    with pytest.raises(InputError, match="is an adapter"):
        load_checkpoint(adapter, network())
    assert "is an adapter" in refused(capsys, "export", adapter, "--to", tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="is an adapter"):
        save_pretrained(adapter, tmp_path / "folder")
    base = runs / "base.safetensors"
    assert "no adapter" in refused(capsys, "adapter", "apply", base, base, "--out", tmp_path / "x")
    assert "is not a complete run folder" in refused(capsys, "adapter", "save", base, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def forge(file: Path, tensors=None, /, **changes) -> None:
    """The adapter with other facts, under a right digest, as a forger would write it."""
    stored, facts = load_tensors(file)
    save_tensors(file, stored if tensors is None else tensors, **{**facts, **changes})


HOSTILE = {
    "no mapping": {"adapter": [1]},
    "no base": {"adapter": {"base": None}},
    "tied is a text": {"adapter": {"base": "0", "tied": "x", "recipe": {}, "selections": []}},
    "a layer is a number": {"adapter": {"base": "0", "tied": [], "recipe": {}, "selections": [{"layers": [1]}]}},
    "tied beyond the file": {"adapter": {"base": "0", "tied": ["x\x1b[2J"], "recipe": {}, "selections": []}},
    "another base": {"adapter": {"base": "0" * 64, "tied": [], "recipe": {}, "selections": []}},
    "huge": {"epoch": 10**30},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_facts_get_one_sentence(kind, runs, adapter, tmp_path, capsys):
    forge(adapter, **HOSTILE[kind])
    said = refused(capsys, "adapter", "apply", runs / "base.safetensors", adapter, "--out", tmp_path / "out")
    assert "\x1b" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "[" * 10**5, "null", '{"adapter": ' * 500 + "1" + "}" * 500])
def test_hostile_metadata_gets_one_sentence(text, runs, adapter, tmp_path, capsys):
    adapter.write_bytes(save(load_file(adapter), {KEY: text, DIGEST: "0" * 64}))
    refused(capsys, "adapter", "apply", runs / "base.safetensors", adapter, "--out", tmp_path / "out")


@pytest.mark.parametrize("change", ["a strange name", "another shape", "another type"])
def test_tensors_that_the_base_lacks_are_refused(change, runs, adapter, tmp_path, capsys):
    ((name, tensor),) = load_adapter(adapter).tensors.items()
    stored = {
        "a strange name": {"network.x\x1b": tensor},
        "another shape": {name: tensor[:1]},
        "another type": {name: tensor.double()},
    }[change]
    forge(adapter, stored)
    said = refused(capsys, "adapter", "apply", runs / "base.safetensors", adapter, "--out", tmp_path / "out")
    assert "has another shape or type" in said
    assert "\x1b" not in said


def test_an_adapter_chooses_no_network(runs, adapter, tmp_path):
    """Another one of the same shapes would compute something else; the base says which one it is."""
    model = {"name": "os:system", "classes": 3, "command": f"touch {tmp_path}/mark"}
    forge(adapter, model=model, path=f"{tmp_path}/mark", tensors={})
    command = ["adapter", "apply", runs / "base.safetensors", adapter, "--out", tmp_path / "out"]
    assert main([str(word) for word in command]) == 0
    assert load_checkpoint(tmp_path / "out")[0].spec["name"] == "rn18"
    assert not (tmp_path / "mark").exists()


# Export


def test_weights_load_into_timms_network_without_clat(tmp_path, capsys):
    model = build_model("timm/resnet18", 5, mean=[0.4, 0.5, 0.6], std=[0.1, 0.2, 0.3]).eval()
    save_checkpoint(tmp_path / "net", model)
    assert main(["export", str(tmp_path / "net"), "--to", str(tmp_path / "plain.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "names of timm/resnet18 itself" in said
    assert "mean 0.4/0.5/0.6, std 0.1/0.2/0.3" in said
    theirs = timm.create_model("resnet18", num_classes=5).eval()
    theirs.load_state_dict(load_file(tmp_path / "plain.safetensors"))
    with safe_open(tmp_path / "plain.safetensors", framework="pt") as file:
        mean, std = (torch.tensor(json.loads(file.metadata()[key])).view(3, 1, 1) for key in ("mean", "std"))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(theirs((x - mean) / std), model(x))


def test_weights_of_a_run_that_does_not_normalise(tmp_path, capsys):
    save_checkpoint(tmp_path / "net", Plain())
    assert main(["export", str(tmp_path / "net"), "--to", str(tmp_path / "plain.safetensors")]) == 0
    assert "takes pixels in [0, 1] as they are" in capsys.readouterr().out
    Plain().load_state_dict(load_file(tmp_path / "plain.safetensors"))


def test_an_onnx_file_gives_the_networks_scores(runs, tmp_path, monkeypatch, capsys):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    monkeypatch.chdir(tmp_path)
    (line,) = re.findall(r"^clat (export .*onnx)$", PAGE, re.MULTILINE)
    assert main(line.replace("runs/clat", str(runs / "critical")).split()) == 0
    said = capsys.readouterr().out
    assert "pixels (batch x 1x12x12)" in said
    assert "the normalisation is inside: mean 0.3, std 0.2" in said
    file = onnx.load("model.onnx")
    onnx.checker.check_model(file)
    x = torch.rand(5, 1, 12, 12)
    (scores,) = ReferenceEvaluator(file).run(None, {"pixels": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(scores), load_checkpoint(runs / "critical")[0](x), rtol=1e-4, atol=1e-5)


class Wrong(nn.Module):
    """It computes something else while it is exported."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x.flatten(1)) * (2 if torch.compiler.is_exporting() else 1)


class Tricky(Wrong):
    """What it computes depends on the pixels, by an if in Python."""

    def forward(self, x):
        return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)


def test_onnx_faults_get_one_sentence(runs, tmp_path, monkeypatch, capsys):
    to = tmp_path / "net.onnx"
    with pytest.raises(InputError, match=r"differ by .* so it was not written"):
        export_onnx(Wrong(), to, (1, 2, 2))
    with pytest.raises(InputError, match="cannot be written as an ONNX file"):
        export_onnx(Tricky(), to, (1, 2, 2))
    with pytest.raises(InputError, match="at most 2 GB"):
        export_onnx(nn.Linear(2**15, 2**15, device="meta"), to, (1, 2, 2))
    capsys.readouterr()
    assert "give --size" in refused(capsys, "export", runs / "base.safetensors", "--to", to)
    monkeypatch.setattr("clat.sharing.onnx_file.find_spec", lambda name: None)
    assert "pip install onnx onnxscript" in refused(capsys, "export", runs / "critical", "--to", to)
    assert not to.exists()


def test_what_cannot_be_exported_is_said(runs, tmp_path, capsys):
    assert "neither a .safetensors nor an .onnx file" in refused(capsys, "export", runs / "whole", "--to", "x.pt")
    for flag in (["--model", "rn18"], ["--size", "12"]):
        said = refused(capsys, "export", runs / "whole", "--to", tmp_path / "x.safetensors", *flag)
        assert "for an ONNX file" in said
    assert not list(tmp_path.iterdir())


# The hub


@pytest.fixture
def folder(runs, tmp_path) -> Path:
    save_pretrained(runs / "critical", tmp_path / "folder")
    return tmp_path / "folder"


def test_a_folder_as_on_the_hub(runs, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    model = from_pretrained(folder)
    x = torch.rand(3, 1, 12, 12)
    assert torch.equal(model(x), load_checkpoint(runs / "critical")[0](x))
    assert not model.training
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "top", "1": "middle", "2": "bottom"}
    assert config["model"]["name"] == "rn18"
    assert main(["export", str(folder / "model.safetensors"), "--to", str(folder / "plain.safetensors")]) == 0


def test_the_card_says_what_the_run_found(runs, folder):
    run, card = Run(runs / "critical"), (folder / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "image-classification"
    assert f"changed only `{run.selected[0]}`" in body
    assert "`bars`: 3 classes, images of 1x12x12" in body
    robust = round(run.metrics[0]["robust"] * 60)
    assert re.search(rf"\| under PGD .*\({robust}/60\) \|", body)
    assert yaml.safe_load(re.search("```yaml\n(.*?)```", body, re.DOTALL)[1]) == run.recipe


def test_a_card_of_a_forged_checkpoint_stays_a_card(tmp_path):
    facts = {"model": {"name": "rn18`<script>\n# x", "classes": 3}, "selected": ["a`\n---"]}
    save_tensors(tmp_path / "net", {"x": torch.zeros(1)}, **facts, validation={"clean": 7e300, "robust": float("nan")})
    save_pretrained(tmp_path / "net", tmp_path / "folder")
    card = (tmp_path / "folder/README.md").read_text()
    assert card.count("\n# ") == 1
    assert "held-out" not in card


def test_a_card_of_ones_own_and_no_overwriting(runs, folder):
    with pytest.raises(InputError, match="is there already"):
        save_pretrained(runs / "whole", folder)
    save_pretrained(runs / "whole", folder, card="# Mine\n", overwrite=True)
    assert (folder / "README.md").read_text() == "# Mine\n"
    assert same_tensors(folder / "model.safetensors", runs / "whole/best.safetensors")


def test_a_hub_that_cannot_be_reached_loses_nothing(runs, tmp_path):
    before = {path: path.read_bytes() for path in (runs / "critical").iterdir() if path.is_file()}
    with pytest.raises(InputError, match=r"me/net could not be written on the hub .* as it was; push") as caught:
        push_to_hub(runs / "critical", "me/net", endpoint="http://127.0.0.1:9", token="x")
    assert "\n" not in str(caught.value)
    assert all(path.read_bytes() == content for path, content in before.items())
    with pytest.raises(InputError, match="no folder here and could not be read from the hub") as caught:
        from_pretrained("me/net", cache_dir=tmp_path, local_files_only=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="could not be read from the hub"):
        from_pretrained("no name / at all")


def test_push_and_from_pretrained_meet_on_the_hub(runs, tmp_path, monkeypatch):
    """The client's calls, with a local folder in the hub's place."""
    import huggingface_hub
    from huggingface_hub import RepoUrl

    def create_repo(_, repo_id, **keys):
        assert keys == {"private": True, "exist_ok": True}
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(_, *, repo_id, folder_path, **keys):
        assert keys == {"commit_message": "Push model using clat"}
        shutil.copytree(folder_path, tmp_path / repo_id)
        return "https://huggingface.co/me/net/commit/1"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(tmp_path / name / file))
    assert push_to_hub(runs / "critical", "me/net", private=True).endswith("commit/1")
    assert 'from_pretrained("me/net")' in (tmp_path / "me/net/README.md").read_text().replace("'", '"')
    x = torch.rand(2, 1, 12, 12)
    assert torch.equal(from_pretrained("me/net")(x), load_checkpoint(runs / "critical")[0](x))


def test_a_folder_of_others_runs_nothing(folder, tmp_path):
    model = {"name": "os:system", "classes": 3, "command": f"touch {tmp_path}/mark"}
    forge(folder / "model.safetensors", model=model)
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "evil.py--Net"}}))
    with pytest.raises(InputError, match="may not call"):
        from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="There is no checkpoint"):
        from_pretrained(folder)
    assert not (tmp_path / "mark").exists()


# The page


def test_the_page_runs(tmp_path, monkeypatch):
    """Its commands and its Python, in order, with runs of timm's ResNet-18 in place and a folder as the hub."""
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: huggingface_hub.RepoUrl("me/robust"))
    monkeypatch.setattr(
        huggingface_hub.HfApi, "upload_folder", lambda _, folder_path, **__: shutil.copytree(folder_path, "hub")
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, file: f"hub/{file}")
    pixels, labels = torch.randint(0, 255, (40, 3, 16, 16)).byte(), torch.arange(40) % 10
    data, recipe = (
        Dataset(pixels, labels, tuple("abcdefghij"), "noise", "train"),
        replace(ONE, holdout=10, batch_size=10),
    )
    save_checkpoint("runs/base/best.safetensors", build_model("timm/resnet18", 10, mean=[0.4] * 3, std=[0.2] * 3))
    for name, tuner in (("clat", Critical(k=1, batch=10)), ("convlora", ConvLora())):
        run = train(replace(recipe, tuner=tuner), load_checkpoint("runs/base")[0], data, out=f"runs/{name}")
    save_adapter(run.folder, "convlora.safetensors")
    names: dict[str, object] = {}
    for language, block in re.findall(r"```(python)?\n(.*?)```", PAGE, re.DOTALL):
        if language:
            exec(compile(block, "docs/sharing.md", "exec"), names)
            continue
        for line in block.splitlines():
            if ".onnx" not in line:  # see above
                assert main(line.removeprefix("clat ").split()) == 0
    assert names["scores"].shape == (1, 10)
    assert same_tensors(Path("model.safetensors"), Path("runs/clat/best.safetensors"))
    assert len(list(Path("robust-resnet18").iterdir())) == len(list(Path("hub").iterdir())) == 3
