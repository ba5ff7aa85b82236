"""docs/guide.md and docs/moving.md: their code runs as it stands, shortened in epochs, images and attack steps only."""

import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import dill
import pytest
import torch

import clat
from clat.checkpoint import load_checkpoint
from clat.cli.main import main
from clat.models import build_model
from clat.training.runs import Run
from test_readme import SMALL

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.fixture
def short(tmp_path, monkeypatch):
    """In a folder of its own, runs and evaluations are short; returns the recipes that were asked for."""
    from clat.cli import shared
    from clat.data import loading

    asked = []
    train, evaluate, real = clat.train, clat.evaluate, loading.load_data

    def shortly(recipe, model, data, **keys):
        asked.append(recipe)
        less = {"epochs": 1, "holdout": 20, "batch_size": 20, "validation_steps": 1, "health": False}
        return train(
            replace(recipe, **less, threat=replace(recipe.threat, steps=1)),
            model,
            data.subset(torch.arange(60)),
            **keys,
        )

    def few(source, split="train", **options):
        return real(source, split=split, **options).subset(torch.arange(60))

    monkeypatch.setattr(clat, "train", shortly, raising=False)
    monkeypatch.setattr(
        clat, "evaluate", lambda model, data, threat: evaluate(model, data.first(20), replace(threat, steps=1)),
        raising=False,
    )  # fmt: skip
    monkeypatch.setattr(clat, "load_data", few, raising=False)
    monkeypatch.setattr(shared, "load_data", few)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield asked
    sys.modules.pop("yours", None)


def run_all(page: str, sources: list[str], names: dict[str, object]) -> None:
    for source in sources:
        exec(compile(source, page, "exec"), names)


def test_the_guide_runs(short, capsys):
    yours, guide = blocks("guide.md", "python")
    assert yours.startswith("# yours.py\n")
    assert len(guide.splitlines()) <= 30
    Path("yours.py").write_text(yours)
    run_all("guide.md", [guide], {})
    printed = capsys.readouterr().out
    assert re.search(r"robust .* before, .* after\nclean .*; trained: body\.\d\.0, body\.\d\.0\n", printed)
    assert "Best epoch 1, the last" in printed
    assert [recipe.objective.name for recipe in short] == ["clean", "clat"]


@pytest.mark.usefixtures("short")
def test_the_commands_of_the_guide_are_its_python(capsys):
    """The recipe that the commands train by is that of the Python above them, and each command runs."""
    Path("yours.py").write_text(blocks("guide.md", "python")[0])
    (commands,) = blocks("guide.md", "bash")
    lines = [shlex.split(line)[1:] for line in commands.splitlines()]
    assert [command for command, *_ in lines] == ["train", "layers", "finetune", "status", "evaluate", "trust"]
    for command, *rest in lines:
        code = main([command, *rest, *SMALL.get(command, "").split()])
        assert code == 0 or (command == "trust" and code == 1), capsys.readouterr().err
    trained = Run(Path("runs/robust")).recipe
    names: dict[str, object] = {}
    recipe = re.search(r"^recipe = Recipe\(.*\)$", blocks("guide.md", "python")[1], re.MULTILINE)[0]
    exec("from clat import Recipe, Threat\nfrom clat.objectives import Clat\nfrom clat.tuners import Critical\n"
         f'threat = Threat(eps="8/255", step="2/255", steps=10)\n{recipe}', names)  # fmt: skip
    wanted = names["recipe"].keys()
    shortened = {"epochs", "holdout", "batch_size", "validation_steps", "precision", "layout", "threat"}
    assert {key: trained[key] for key in wanted if key not in shortened} == {
        key: wanted[key] for key in wanted if key not in shortened
    }
    assert {**trained["threat"], "steps": 10} == wanted["threat"]


class InputNormalize(torch.nn.Module):
    """Normalisation under the names of robustness."""

    def __init__(self):
        super().__init__()
        self.register_buffer("new_mean", torch.tensor([0.5, 0.4, 0.3])[:, None, None])
        self.register_buffer("new_std", torch.tensor([0.2, 0.25, 0.3])[:, None, None])


def test_moving_runs_and_takes_weights_over(short, capsys):
    """The checkpoint has the names of robustness: the network, the attacker that holds it too, two normalisations."""
    network = build_model("rn18", 10, width=8, mean=[0.5, 0.4, 0.3], std=[0.2, 0.25, 0.3]).eval()
    attacker = torch.nn.ModuleDict({"normalize": InputNormalize(), "model": network.network})
    wrapped = torch.nn.ModuleDict({"normalizer": InputNormalize(), "model": network.network, "attacker": attacker})
    stored = {f"module.{name}": tensor for name, tensor in wrapped.state_dict().items()}
    torch.save({"model": stored, "epoch": 3, "optimizer": {}, "amp": "N/A"}, "checkpoint.pt.best", pickle_module=dill)
    run_all("moving.md", blocks("moving.md", "python"), {})
    robustness, mair, art = short
    assert (robustness.objective.name, mair.objective.name, art.objective.name) == ("pgd-at", "trades", "pgd-at")
    assert mair.awp.gamma == 0.005
    (line,) = blocks("moving.md", "bash")
    command = ["rn18,width=8" if word == "rn18" else word for word in shlex.split(line)[1:]]
    assert main(command) == 0, capsys.readouterr().err
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(load_checkpoint("runs/from-robustness.safetensors")[0](x), network(x))
