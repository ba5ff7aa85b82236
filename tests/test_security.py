"""What a received file can do: nothing but be read. Each attack leaves a mark if it gets through."""

import json
import struct
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from clat import export_weights, load_checkpoint
from clat.checkpoint import KEY, load_tensors, save_checkpoint, save_tensors
from clat.cli import shared
from clat.cli.main import main
from clat.errors import DamagedError, InputError
from clat.models import build_model
from clat.training.extra import Extra
from clat.training.runs import Run

DATA = ["--data", "fashion-mnist-mini"]


@pytest.fixture(autouse=True)
def _few(monkeypatch, tmp_path):
    """Few images, and a folder of the test's own to work in."""
    real = shared.load_data
    monkeypatch.setattr(shared, "load_data", lambda *a, **o: real(*a, **o).subset(torch.arange(8)))
    monkeypatch.chdir(tmp_path)


def forged(path, model, tensors=None, **facts):
    """A checkpoint with facts that clat would not write."""
    content = {name: t.contiguous() for name, t in tensors.items()} if tensors else {"weight": torch.zeros(1)}
    path.write_bytes(save(content, {KEY: json.dumps({"model": model, **facts})}))
    return str(path)


def sized(name, **options):
    return {"name": name, "classes": 10, "channels": 1, **options}


@pytest.fixture
def attacks(tmp_path):
    """Specifications that would touch the file ``mark`` if they were built, by name."""
    mark = tmp_path / "mark"
    (tmp_path / "beside.py").write_text(f"open({str(mark)!r}, 'w')\ndef make(**options): pass\n")
    (tmp_path / "hubconf.py").write_text(
        f"import torch\ndef net(**options):\n    open({str(mark)!r}, 'w')\n    return torch.nn.Flatten()\n"
    )
    call = sized("os:system", command=f"touch {mark}")
    return {
        "a shell": call,
        "a process": sized("subprocess:Popen", args=["touch", str(mark)]),
        "a script": sized("runpy:run_path", path_name=str(tmp_path / "beside.py")),
        "a module in the folder": sized("beside:make"),
        "a file": sized(f"{tmp_path}/beside.py:make"),
        "nested": sized("mixed", accurate={**call}, robust="rn18"),
        "nested by name": sized("mixed", accurate="rn18", robust="beside:make"),
        "the hub": sized("torch.hub:load", repo_or_dir=str(tmp_path), model="net", source="local"),
        "timm's hub": sized("timm/hf-hub:someone/net"),
        "timm's folders": sized(f"timm/local-dir:{tmp_path}"),
    }


KINDS = (
    *("a shell", "a process", "a script", "a module in the folder", "a file", "nested", "nested by name"),
    *("the hub", "timm's hub", "timm's folders"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_calls_nothing(kind, attacks, tmp_path):
    path = forged(tmp_path / "net.safetensors", attacks[kind])
    before = list(sys.path)
    with pytest.raises(InputError, match=r"which a file may not call; name it in this call: --model mynet\.py:make"):
        load_checkpoint(path)
    assert not (tmp_path / "mark").exists()
    assert "beside" not in sys.modules
    assert sys.path == before


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "FILE", *DATA],
        ["layers", "FILE", *DATA],
        ["trust", "FILE", *DATA],
        ["sweep", "FILE", *DATA],
        ["transfer", "FILE", "OTHER", *DATA],
        ["finetune", "clat", "--from", "FILE", *DATA, "--out", "out"],
        ["train", "pgd-at", "--model", "FILE", *DATA, "--out", "out"],
        ["status", "RUN"],
    ],
    ids=lambda command: command[0],
)
def test_no_command_calls_what_a_file_names(command, attacks, tmp_path, capsys):
    path = forged(tmp_path / "net.safetensors", attacks["a shell"])
    run = Run(tmp_path / "run")
    forged_last = attacks["a shell"]
    run.folder.mkdir()
    forged(run.last, forged_last, epoch=1)
    run.write("start.json", {"weight": "0" * 64})
    run.write("selections.jsonl", [])
    run.write("recipe.yaml", {"tuner": "whole", "precision": "fp32"})
    places = {"FILE": path, "RUN": str(run.folder), "OTHER": path + "x"}
    assert main([places.get(word, word) for word in command]) == 2
    said = capsys.readouterr().err
    assert "which a file may not call" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "mark").exists()


def test_labels_of_extra_data_call_nothing(attacks, tmp_path, blobs):
    path = forged(tmp_path / "net.safetensors", attacks["a shell"])
    with pytest.raises(InputError, match="may not call"):
        Extra(source="x", labels=path)._pseudo_labelled(blobs, blobs, torch.device("cpu"))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "option",
    [
        {"pretrained_cfg": {"file": "/etc/passwd"}},
        {"pretrained_cfg_overlay": {"url": "http://localhost/x"}},
        {"cache_dir": "/tmp"},
        {"features_only": True},
        {"scriptable": True},
        {"exportable": True},
        {"drop_rate": "0.5"},
        {"img_size": 10**9},
        {"depth": 10**9},
        {"global_pool": ["avg"]},
        {"act_layer": "os.system"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_a_file_sets_no_dangerous_option_of_timm(option, tmp_path, monkeypatch):
    monkeypatch.setattr("timm.create_model", lambda *a, **o: pytest.fail("timm was called"))
    with pytest.raises(InputError, match=next(iter(option))):
        load_checkpoint(forged(tmp_path / "net.safetensors", sized("timm/resnet10t", **option)))


RESNET = {"model_type": "resnet", "architectures": ["ResNetForImageClassification"], "depths": [1, 1]}


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        {"depths": [1]},
        {**RESNET, "model_type": "bert"},
        {**RESNET, "model_type": "timm_wrapper", "architecture": "resnet18"},
        {**RESNET, "auto_map": {"AutoModel": "evil.Net"}},
        {**RESNET, "_attn_implementation": "somebody/kernel"},
        {**RESNET, "quantization_config": {"load_in_8bit": True}},
        {**RESNET, "name_or_path": "/etc"},
        {**RESNET, "depths": [10**9]},
        {**RESNET, "depths": [1] * 1000},
        {**RESNET, "hidden_sizes": [10**9, 10**9]},
        {**RESNET, "embedding_size": float("nan")},
        {**RESNET, "layer_type": "x" * 100},
        {**RESNET, "layer_type": {"a": 1}},
    ],
    ids=str,
)
def test_a_file_sets_nothing_dangerous_in_a_network_of_transformers(config, tmp_path, monkeypatch):
    import transformers

    def called(*_, **__):
        pytest.fail("transformers made a network")

    monkeypatch.setattr(transformers.ResNetForImageClassification, "__init__", called)
    monkeypatch.setattr("clat.models.hugging_face.from_hub", called)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    spec = sized(f"transformers/{tmp_path}", **({} if config is None else {"config": config}))
    with pytest.raises(InputError, match="config"):
        load_checkpoint(forged(tmp_path / "net.safetensors", spec))


def test_where_weights_came_from_does_not_stay_in_a_checkpoint(tmp_path, monkeypatch):
    model = build_model("timm/resnet10t", 10, channels=1)
    model.spec |= {"pretrained": True, "checkpoint_path": "/etc/passwd"}
    save_checkpoint(tmp_path / "net.safetensors", model)
    assert load_tensors(tmp_path / "net.safetensors")[1]["model"] == sized("timm/resnet10t")
    seen = []
    import timm

    real = timm.create_model
    monkeypatch.setattr("timm.create_model", lambda *a, **o: (seen.append(o), real(*a, **o))[1])
    path = forged(tmp_path / "old.safetensors", dict(model.spec), model.state_dict())  # as clat once wrote it
    load_checkpoint(path)
    assert seen
    assert not any(set(options) & {"pretrained", "checkpoint_path"} for options in seen)


@pytest.mark.parametrize(
    "spec",
    [
        sized("rn18", width=10**9),
        sized("rn18", width=True),
        sized("rn18", width="8"),
        sized("rn18", depth=2),
        {"name": "rn18", "classes": 10, "channels": 10**9},
        {"name": "rn18", "classes": 1e9},
        {"name": "rn18", "classes": 10**12},
        sized("dn121", blocks=[10**8] * 4),
        sized("dn121", blocks=[1] * 10**4),
        sized("wrn34-10", depth=6 * 10**9 + 4),
        sized("rawrn70-16", widths=[1, 2]),
        sized("mixed", accurate="rn18", robust="rn18", alpha=float("nan")),
        sized("mixed", accurate={"name": "rn18", "width": 10**9}, robust="rn18"),
        sized("transformers/bert"),
        sized("torchvision/../x"),
        sized("rn99"),
        sized("rn18", width=4096),  # allowed, but not what the file holds
        sized("timm/vit_giant_patch14_224"),
    ],
    ids=lambda spec: "-".join(map(str, spec.values()))[:40],
)
def test_sizes_are_checked_before_memory_is_taken(spec, tmp_path):
    import resource

    path = forged(tmp_path / "net.safetensors", spec)
    build_model("timm/resnet10t", 2)  # imports are no part of it
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(InputError):
        load_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB; of width 4096, 176 GB
    assert time.process_time() - start < 20


GOOD = sized("rn18")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "nonsense",
        "[1, 2]",
        '"rn18"',
        "null",
        "[" * 100_000,
        '{"model": ' * 900 + "1" + "}" * 900,
        json.dumps({"model": 3}),
        json.dumps({"model": ["rn18"]}),
        json.dumps({"model": {"classes": 10}}),
        json.dumps({"model": {"name": "rn18"}}),
        json.dumps({"model": {"name": ["rn18"], "classes": 10}}),
        json.dumps({"model": {"name": "rn18", "classes": "10"}}),
        json.dumps({"model": {"name": "rn18", "classes": -1}}),
        json.dumps({"model": {"name": "rn18", "classes": 10, "channels": None}}),
        json.dumps({"model": {"name": "rn18", "classes": {"a": 1}}}),
        *(json.dumps({"model": GOOD, "epoch": epoch}) for epoch in ("one", -1, None, 1.5, True, 10**30)),
        *(json.dumps({"model": GOOD, "data": data}) for data in (None, "cifar", {}, {"source": 1}, [])),
        json.dumps({"model": GOOD, "data": {"source": "x", "classes": 10, "shape": [1, 28, 28]}}),
        json.dumps({"model": GOOD, "data": {"source": "x", "classes": ["a"], "shape": "1x28x28"}}),
        *(json.dumps({"model": GOOD, "holdout": holdout}) for holdout in (None, 1000, {"images": "many"})),
        json.dumps({"model": GOOD, "validation": {"clean": "high"}}),
        json.dumps({"model": GOOD, "selected": "linear"}),
    ],
    ids=lambda text: text[:60],
)
def test_facts_of_another_form_get_one_sentence(text, tmp_path, capsys):
    (tmp_path / "net.safetensors").write_bytes(save({"weight": torch.zeros(1)}, {KEY: text}))
    for command in (["evaluate"], ["finetune", "clat", "--out", "out", "--from"]):
        assert main([*command, str(tmp_path / "net.safetensors"), *DATA]) == 2
        said = capsys.readouterr().err
        assert said.startswith("clat: ")
        assert said.count("\n") == 1
        assert len(said) < 500
        assert "do not fit" not in said


def test_text_from_a_file_cannot_steer_the_terminal(tmp_path, capsys):
    path = forged(tmp_path / "net.safetensors", sized("\x1b[2Jx[/red]\n"))
    assert main(["evaluate", path, *DATA]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "\\x1b[2Jx[/red]" in said


# Digests


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "net.safetensors"
    save_checkpoint(path, build_model("rn18", 3, channels=1, width=2), epoch=3)
    return path


def test_a_flipped_bit_is_noticed_wherever_it_is(saved, capsys):
    content = saved.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    generator = torch.Generator().manual_seed(0)
    for place in (header + torch.randint(len(content) - header, (20,), generator=generator)).tolist():
        saved.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DamagedError, match="does not match the digest"):
            load_checkpoint(saved)
    saved.write_bytes(content.replace(b'\\"epoch\\": 3', b'\\"epoch\\": 9'))
    with pytest.raises(DamagedError, match="does not match the digest"):
        load_tensors(saved)
    assert main(["evaluate", str(saved), *DATA]) == 2
    assert "is damaged" in capsys.readouterr().err
    saved.write_bytes(content)
    assert load_checkpoint(saved)[1]["epoch"] == 3


def test_a_cut_file_is_damaged_too(saved):
    saved.write_bytes(saved.read_bytes()[:-1])
    with pytest.raises(DamagedError, match="not a readable safetensors file"):
        load_tensors(saved)


def test_swapped_tensors_are_noticed(tmp_path):
    tensors = {
        "a": torch.tensor([1.0]),
        "b": torch.tensor([2.0]),
        "empty": torch.zeros(0, 3),
        "flag": torch.tensor(True),
    }
    save_tensors(tmp_path / "x.safetensors", tensors, epoch=1)
    found, _ = load_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        metadata = file.metadata()
    save_file({**found, "a": found["b"], "b": found["a"]}, tmp_path / "y.safetensors", metadata)
    with pytest.raises(DamagedError):
        load_tensors(tmp_path / "y.safetensors")


def test_files_from_before_there_was_a_digest_still_load(saved):
    tensors, facts = load_tensors(saved)
    saved.write_bytes(save(tensors, {KEY: json.dumps(facts)}))
    assert load_checkpoint(saved)[1]["epoch"] == 3


def test_a_digest_costs_little(tmp_path):
    tensors = {"weight": torch.rand(45 * 2**20 // 4)}
    start = time.process_time()
    save_tensors(tmp_path / "x.safetensors", tensors)
    load_tensors(tmp_path / "x.safetensors")
    assert time.process_time() - start < 2  # about 0.5 on a slow core, writing and reading included


# Recipes


@pytest.mark.usefixtures("attacks")
def test_a_recipe_file_chooses_no_network(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("model: beside:make\nepochs: 1\n")
    (tmp_path / "inner.yaml").write_text("epochs: 1\n")
    (tmp_path / "nested.yaml").write_text("config: inner.yaml\n")
    (tmp_path / "replaces.yaml").write_text("overwrite: true\n")
    for recipe, key in (("mine", "model"), ("nested", "config"), ("replaces", "overwrite")):
        for way in ([f"{recipe}.yaml"], ["--config", f"{recipe}.yaml"], ["pgd-at", "--config", f"{recipe}.yaml"]):
            assert main(["train", *way, *DATA, "--out", "out"]) == 2
            assert f"has no key {key!r}" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


def test_a_recipe_of_nested_aliases_is_refused_at_once(tmp_path, capsys):
    lines = ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
    (tmp_path / "laughs.yaml").write_text("\n".join([*lines, "epochs: 1"]))
    start = time.process_time()
    assert main(["train", "laughs.yaml", "--model", "rn18", *DATA, "--out", "out"]) == 2
    assert "aliases" in capsys.readouterr().err
    assert time.process_time() - start < 10


def test_an_export_of_a_forged_file_builds_nothing(attacks, tmp_path):
    export_weights(forged(tmp_path / "net.safetensors", attacks["a shell"]), tmp_path / "plain.safetensors")
    assert not (tmp_path / "mark").exists()
