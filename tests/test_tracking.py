"""Trackers: what TensorBoard's event file says is what the run folder says, and one sentence where there is none."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from clat.cli.main import main
from clat.errors import InputError
from clat.objectives import Clat
from clat.threat import Threat
from clat.training import tracking
from clat.training.recipe import Recipe
from clat.training.runs import Run
from clat.training.train import train
from clat.tuners import Critical
from conftest import dies_before, network

RECIPE = Recipe(
    objective=Clat(weight=0.1), tuner=Critical(every=2), epochs=3, batch_size=60, holdout=60, health=False,
    threat=Threat(eps=0.1, step=0.05, steps=1), validation_steps=1,
)  # fmt: skip
STEPS = 3  # of an epoch


def events(run: Run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    return found.Reload()


@pytest.mark.filterwarnings("ignore")  # of protobuf and numpy, in tensorboard
def test_tensorboard_has_what_the_run_folder_has(blobs, tmp_path):
    """Through a kill in the second epoch, and a resume that takes its steps again."""
    with dies_before("last", time=2):
        train(RECIPE, network(), blobs, out=tmp_path / "run", tracker="tensorboard")
    run = train(RECIPE, network(), blobs, out=tmp_path / "run", resume=True, tracker="tensorboard")
    found = events(run)
    for key in ("clean", "robust", "loss", "loss/cross_entropy", "loss/criticality", "learning_rate", "seconds"):
        told = [(event.step, event.value) for event in found.Scalars(key)]
        assert told == [(STEPS * entry["epoch"], pytest.approx(entry[key])) for entry in run.metrics], key
    for selection in run.selections:
        step = STEPS * (selection.epoch - 1)
        told = {event.step: event.tensor_proto for event in found.Tensors("selected/text_summary")}
        assert told[step].string_val[0].decode() == selection.in_words()
        for score in selection.scores:
            told = {event.step: event.value for event in found.Scalars(f"criticality/{score.name}")}
            assert told[step] == pytest.approx(score.criticality)
    within = [event.step for event in found.Scalars("loss_within_epoch")]
    assert within == [STEPS * epoch + step for epoch in range(3) for step in (1, STEPS)]
    assert '"weight": 0.1' in found.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()


@pytest.mark.filterwarnings("ignore")
def test_a_replaced_run_loses_its_events_and_no_other_file(blobs, tmp_path):
    once = replace(RECIPE, epochs=1)
    run = train(once, network(), blobs, out=tmp_path / "run", tracker="tensorboard")
    (run.folder / "tensorboard/notes.txt").write_text("mine")
    train(once, network(), blobs, out=tmp_path / "run", overwrite=True)
    assert [path.name for path in (run.folder / "tensorboard").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_else(name, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    line = ["train", "pgd-at", "--model", "rn18", "--data", "nowhere", "--out", str(tmp_path / "run")]
    assert main([*line, "--tracker", name]) == 2
    said = f"clat: The tracker {name} is not installed; run pip install {name}, or leave tracker out.\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "run").exists()


def test_another_tracker_gets_one_sentence(blobs, tmp_path):
    with pytest.raises(InputError, match="tracker"):
        train(RECIPE, network(), blobs, out=tmp_path / "run", tracker="mlflow")
    assert not (tmp_path / "run").exists()


class Silent:
    """In the place of a tracker's package."""

    def init(self, **keys):
        raise RuntimeError(f"nobody is logged in to {keys['project']}\nat all")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="a stand-in takes wandb's place")
def test_a_tracker_that_does_not_start_loses_nothing(blobs, tmp_path, monkeypatch):
    """wandb, of which only what Accelerate calls is here."""
    from accelerate import accelerator

    monkeypatch.setattr(tracking, "find_spec", lambda _: True)
    monkeypatch.setattr(accelerator, "filter_trackers", lambda names, _folder: [names] if names else [])
    monkeypatch.setitem(sys.modules, "wandb", Silent())
    with pytest.raises(InputError, match=r"The tracker wandb did not start \(nobody is logged in to clat at all\); "):
        train(RECIPE, network(), blobs, out=tmp_path / "run", tracker="wandb")
    assert train(RECIPE, network(), blobs, out=tmp_path / "run", resume=True).result["epochs"] == 3


def test_no_tracker_writes_no_events(blobs, tmp_path):
    train(replace(RECIPE, epochs=1), network(), blobs, out=tmp_path / "run")
    assert not (Path(tmp_path) / "run/tensorboard").exists()
