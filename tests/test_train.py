"""The loop: what a run leaves behind, how it resumes, and when it stops."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from clat.checkpoint import load_checkpoint, load_tensors
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.network import same_bits
from clat.objectives import Clat, Clean
from clat.threat import Threat
from clat.training import saving
from clat.training.health import HealthError
from clat.training.integrity import IntegrityError, status_since
from clat.training.recipe import Recipe
from clat.training.train import train
from clat.tuners import Critical
from conftest import dies_before, network, same_tensors

BASE = Recipe(
    epochs=2, batch_size=32, lr=0.02, holdout=60, threat=Threat(eps=0.1, step=0.05, steps=2), validation_steps=2
)
CLAT = replace(
    BASE,
    epochs=4,
    lr=0.05,
    health=False,
    objective=Clat(weight=0.1),
    tuner=Critical(every=2),
)


def tensors(path):
    return load_tensors(path)[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished CLAT run with its data."""
    torch.manual_seed(0)
    labels = torch.arange(240) % 3
    pixels = torch.randint(0, 60, (240, 1, 12, 12), dtype=torch.uint8)
    for i, label in enumerate(labels):
        pixels[i, :, 4 * label : 4 * label + 3] += 150
    data = Dataset(pixels, labels, ("top", "middle", "bottom"), "blobs", "train")
    base = train(replace(BASE, epochs=8, augment=False), network(), data, out=tmp_path_factory.mktemp("runs") / "base")
    model, _ = load_checkpoint(base.last)
    return train(CLAT, model, data, out=base.folder.parent / "clat", origin=str(base.last)), base, data


def test_training_learns_and_the_run_folder_tells_all(finished):
    run, base, data = finished
    assert base.result["best"]["clean"] > 0.8
    assert run.recipe["critical"]["every"] == 2
    assert run.environment["data"]["sha256"] == data.digest()
    assert run.environment["from"] == str(base.last)
    assert run.environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert [entry["epoch"] for entry in run.metrics] == [1, 2, 3, 4]
    for entry in run.metrics:
        total = entry["loss/cross_entropy"] + entry["loss/criticality"]
        assert entry["loss"] == pytest.approx(total, rel=1e-4)
        assert entry["validation_images"] == 60
        assert entry["seconds"] > 0
        assert entry["peak_memory_bytes"] > 1e7
    assert [selection.epoch for selection in run.selections] == [1, 3]
    assert all(len(selection.scores) == 21 for selection in run.selections)
    best = max(run.metrics, key=lambda entry: (entry["robust"], entry["clean"], entry["epoch"]))
    assert run.result["best"] == best
    assert load_tensors(run.best)[1]["epoch"] == best["epoch"]
    assert load_tensors(run.last)[1]["epoch"] == 4


def test_only_the_selected_layers_moved(finished):
    run, base, _ = finished
    before, after = tensors(base.last), tensors(run.last)
    moved = {name for name in after if not same_bits(before[name], after[name])}
    assert moved == {name for selection in run.selections for name in selection.trainable}
    model, _ = load_checkpoint(run.last)
    states = {layer.name: layer.state for layer in status_since(model, run.start, run.selections)}
    assert {name for name, state in states.items() if state == "trained"} == {
        name for selection in run.selections for name in selection.layers
    }
    assert "irregular" not in states.values()


def test_the_learning_rate_follows_its_policy(finished, tmp_path):
    run, _, data = finished
    assert [entry["learning_rate"] for entry in run.metrics] == pytest.approx(
        [0.05, 0.05 * 0.8535534, 0.025, 0.05 * 0.1464466]
    )
    recipe = replace(CLAT, tuner=Critical(every=2, lr_schedule="restart", optimizer_state="keep"))
    restarted = train(recipe, network(), data, out=tmp_path / "r")
    assert [entry["learning_rate"] for entry in restarted.metrics] == pytest.approx([0.05, 0.025, 0.05, 0.025])


@pytest.mark.parametrize("recipe", [BASE, CLAT], ids=["whole", "critical"])
def test_the_same_seed_trains_the_same_weights(recipe, blobs, tmp_path):
    runs = [train(replace(recipe, epochs=1, seed=s), network(), blobs, out=tmp_path / n) for s, n in
            ((3, "a"), (3, "b"), (4, "c"))]  # fmt: skip
    assert same_tensors(runs[0].last, runs[1].last)
    assert not same_tensors(runs[0].last, runs[2].last)


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_train import CLAT, BASE, network, replace, Critical
from clat.data.dataset import Dataset
from clat.training.train import train
pixels, labels = torch.load({data!r}, weights_only=True)
data = Dataset(pixels, labels, ("top", "middle", "bottom"), "blobs", "train")
recipe = replace(BASE, epochs=6, health=False) if {name!r} == "whole" else replace(
    CLAT, epochs=6, tuner=Critical(k=2, every=2, optimizer_state="keep", norm_statistics="selected"))
recipe = replace(recipe, precision="fp32")
print("started", flush=True)
train(recipe, network(), data, out={out!r}, resume=True)
print("finished", flush=True)
"""


@pytest.mark.parametrize("name", ["whole", "critical"])
def test_a_run_killed_at_random_moments_ends_bit_identical(name, blobs, tmp_path):
    """Slow (30 s alone): ten processes; only real kills show that no moment of a run is special."""
    torch.save((blobs.pixels, blobs.labels), tmp_path / "data.pt")

    def start(out):
        script = SCRIPT.format(
            tests=os.path.dirname(__file__), data=str(tmp_path / "data.pt"), out=str(tmp_path / out), name=name
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "started\n"
        return process

    with start("whole") as process:
        began = time.monotonic()
        assert process.stdout.readline() == "finished\n"
        seconds = time.monotonic() - began
    kills, moments = 0, random.Random(0)
    for _ in range(8):
        with start("killed") as process:
            time.sleep(moments.uniform(0, 0.4) * seconds)
            process.kill()
        kills += process.returncode == -signal.SIGKILL
    with start("killed") as process:
        assert process.stdout.readline() == "finished\n"
    assert kills > 0
    assert same_tensors(tmp_path / "whole/last.safetensors", tmp_path / "killed/last.safetensors")
    assert same_tensors(tmp_path / "whole/best.safetensors", tmp_path / "killed/best.safetensors")
    lines = [json.loads(line) for line in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("moment", ["optimizer-2", "selections", "metrics", "last", "best"])
def test_a_kill_between_any_two_writes_of_an_epoch_is_harmless(moment, blobs, tmp_path, monkeypatch):
    """Dies just before the file of that name is renamed into place in epoch 2, then resumes."""
    recipe = replace(CLAT, epochs=3, tuner=Critical(every=1))
    whole = train(recipe, network(), blobs, out=tmp_path / "whole")
    if moment == "best":  # make sure that there is a second best to write
        monkeypatch.setattr(saving, "best_epoch", lambda metrics, recipe: metrics[-1]["epoch"])
    with dies_before(moment, time=1 if moment == "optimizer-2" else 2):
        train(recipe, network(), blobs, out=tmp_path / "killed")
    killed = train(recipe, network(), blobs, out=tmp_path / "killed", resume=True)
    assert same_tensors(whole.last, killed.last)
    assert [entry["epoch"] for entry in killed.metrics] == [1, 2, 3]
    assert killed.selections == whole.selections


def test_an_existing_run_is_never_overwritten_unless_asked(blobs, tmp_path):
    once = replace(BASE, epochs=1)
    run = train(once, network(), blobs, out=tmp_path / "run")
    kept = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    with pytest.raises(InputError, match="--resume"):
        train(once, network(), blobs, out=tmp_path / "run")
    with pytest.raises(InputError, match="another lr"):
        train(replace(once, lr=0.2), network(), blobs, out=tmp_path / "run", resume=True)
    other = Dataset(blobs.pixels.flip(0), blobs.labels, blobs.classes, "other", "train")
    with pytest.raises(InputError, match="other data"):
        train(once, network(), other, out=tmp_path / "run", resume=True)
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == kept
    train(replace(once, lr=0.2), network(), blobs, out=tmp_path / "run", overwrite=True)
    assert run.recipe["lr"] == 0.2


def test_a_folder_with_other_files_is_never_touched(blobs, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="other files"):
            train(BASE, network(), blobs, out=tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_diverging_run_stops_with_the_likely_cause(blobs, tmp_path):
    with pytest.raises(HealthError, match="learning rate"):
        train(replace(BASE, lr=1e20, precision="fp32"), network(), blobs, out=tmp_path / "run")


def test_a_run_that_does_not_learn_stops_after_two_epochs(blobs, tmp_path):
    shuffled = Dataset(blobs.pixels, blobs.labels.flip(0).roll(7), tuple("abcdefghij"), "blobs", "train")
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(200, 10))
    with pytest.raises(HealthError, match="chance level"):
        train(replace(BASE, lr=1e-5, epochs=5, objective=Clean()), model, shuffled, out=tmp_path / "run")
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2


def test_an_attack_that_does_not_move_is_noticed(blobs, tmp_path):
    weak = replace(BASE, threat=Threat(eps=0.1, step=1e-4, steps=2, start="gaussian"))
    with pytest.raises(HealthError, match="far below eps"):
        train(weak, network(), blobs, out=tmp_path / "run")
    train(replace(weak, health=False, epochs=1), network(), blobs, out=tmp_path / "unchecked")


class Drifting(nn.Module):
    """Changes a frozen buffer behind everybody's back."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            self.calls += 1
        return self.body(x)


def test_a_frozen_buffer_that_drifts_stops_the_run(blobs, tmp_path):
    with pytest.raises(IntegrityError, match="calls is frozen but changed"):
        train(CLAT, Drifting(), blobs, out=tmp_path / "run")


class Unused(nn.Module):
    """A layer that runs but whose output goes nowhere, so that its weight gets no gradient."""

    def __init__(self):
        super().__init__()
        self.used = nn.Conv2d(1, 4, 3)
        self.unused = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(400, 3)

    def forward(self, x):
        x = torch.relu(self.used(x))
        self.unused(x)
        return self.head(x.flatten(1))


def test_a_selected_layer_that_does_not_train_stops_the_run(blobs, tmp_path):
    with pytest.raises(IntegrityError, match=r"unused\.weight is selected but did not move"):
        train(replace(BASE, weight_decay=0.0), Unused(), blobs, out=tmp_path / "run")


def test_a_full_disk_loses_nothing(blobs, tmp_path, monkeypatch):
    recipe = replace(BASE, epochs=3, health=False)  # on some CPUs two epochs in bf16 learn nothing yet
    whole = train(recipe, network(), blobs, out=tmp_path / "whole")
    real = os.replace

    def full(source, target):
        if "last" in str(target) and (tmp_path / "run/last.safetensors").exists():
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        train(recipe, network(), blobs, out=tmp_path / "run")
    assert load_tensors(tmp_path / "run/last.safetensors")[1]["epoch"] == 1
    assert not list((tmp_path / "run").glob(".*.partial"))
    monkeypatch.setattr(os, "replace", real)
    resumed = train(recipe, network(), blobs, out=tmp_path / "run", resume=True)
    assert same_tensors(whole.last, resumed.last)
