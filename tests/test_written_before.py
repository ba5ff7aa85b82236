"""What an earlier clat wrote is still read: checkpoints, run folders, recipes; and a run that it began is finished.

``written_before`` was made by commit 95ab102, with ``images`` as in the fixture below and one thread:

    clat train recipe.yaml --model rn18,width=1 --data images --out finished
    clat train recipe.yaml --model rn18,width=1 --data images --out stopped    (killed while it wrote the second epoch)

These files are never written again. What a later format adds, it adds beside them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from clat.checkpoint import load_checkpoint, load_tensors
from clat.cli.main import main
from clat.training.runs import Run

BEFORE = Path(__file__).with_name("written_before")
CLASSES = ("bottom", "middle", "top")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with copies of both runs and with the images that they were trained on."""
    shutil.copytree(BEFORE, tmp_path, dirs_exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(CLASSES):
        folder = tmp_path / "images" / "train" / name
        folder.mkdir(parents=True)
        for number in range(12):
            pixels = torch.randint(0, 120, (9, 9), dtype=torch.uint8, generator=generator)
            pixels[6 - 3 * label : 9 - 3 * label] += 100
            Image.fromarray(pixels.numpy()).save(folder / f"{number:02}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("path", "epoch"), [("finished", 3), ("finished/last.safetensors", 3), ("stopped", 1)])
def test_a_checkpoint_loads_with_its_facts(path, epoch):
    model, facts = load_checkpoint(BEFORE / path)
    stored, _ = load_tensors(BEFORE / path if path.endswith("safetensors") else BEFORE / path / "best.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    assert facts["epoch"] == epoch
    assert facts["model"] == {"name": "rn18", "classes": 3, "channels": 1, "width": 1}
    assert facts["data"] == {"source": "images", "classes": list(CLASSES), "shape": [1, 9, 9]}
    assert facts["holdout"] == {"images": 12, "seed": 0}
    assert model(torch.rand(2, 1, 9, 9)).shape == (2, 3)


@pytest.mark.parametrize(("name", "epoch", "selected_at"), [("finished", 3, [1, 3]), ("stopped", 1, [1])])
def test_a_run_folder_tells_all(name, epoch, selected_at):
    run = Run(BEFORE / name)
    assert run.exists
    assert run.finished == (name == "finished")
    assert run.epoch == epoch
    assert [entry["epoch"] for entry in run.metrics] == list(range(1, epoch + 1))
    assert [selection.epoch for selection in run.selections] == selected_at
    assert all(len(selection.layers) == 2 and len(selection.scores) == 21 for selection in run.selections)
    assert set(run.selected) == {layer for selection in run.selections for layer in selection.layers}
    assert run.start.keys() == load_tensors(run.last)[0].keys()
    assert run.environment["data"]["images"] == 36
    assert (run.recipe["objective"], run.recipe["tuner"], run.recipe["critical"]["k"]) == ("clat", "critical", 2)
    if run.finished:
        assert run.result["epochs"] == 3
        assert run.result["last"] == run.metrics[-1]


@pytest.mark.parametrize("name", ["finished", "stopped"])
def test_status_lists_the_layers_that_were_trained(name, capsys):
    assert main(["status", str(BEFORE / name), "--json", "-"]) == 0
    layers = json.loads(capsys.readouterr().out)
    assert {layer["name"] for layer in layers if layer["state"] == "trained"} == set(Run(BEFORE / name).selected)
    assert {layer["state"] for layer in layers} == {"trained", "frozen"}


@pytest.mark.parametrize("recipe", ["recipe.yaml", "stopped/recipe.yaml"])
def test_a_run_that_was_stopped_goes_on_to_the_same_end(recipe, here):
    command = ["train", recipe, "--model", "rn18,width=1", "--data", "images", "--out", "stopped", "--resume"]
    assert main(command) == 0
    stopped, finished = Run(here / "stopped"), Run(here / "finished")
    assert stopped.finished
    assert stopped.metrics[0] == Run(BEFORE / "stopped").metrics[0]
    assert [s.layers for s in stopped.selections] == [s.layers for s in finished.selections]
    for found, expected in zip(stopped.metrics, finished.metrics, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)  # another machine may round otherwise
    tensors, expected = load_tensors(stopped.last)[0], load_tensors(finished.last)[0]
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-3)


def test_a_finished_run_is_fine_tuned(here):
    keys = ["--epochs=1", "--holdout=12", "--batch_size=8", "--threat.steps=1", "--validation_steps=1"]
    fixed = ["--precision=fp32", "--layout=contiguous", "--health=false"]
    assert main(["finetune", "pgd-at", "--from=finished", "--data=images", "--out=further", *keys, *fixed]) == 0
    assert Run(here / "further").environment["from"] == "finished/best.safetensors"
