"""Everything in the README runs: its commands, shortened by flags only, and its Python."""

import re
import shlex
from pathlib import Path

import datasets
import pytest
import torch

from clat.cli.main import main
from clat.models import build_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SMALL = {
    "train": "--epochs 1 --holdout 20 --batch_size 20 --threat.steps 1 --validation_steps 1 --health false",
    "finetune": "--epochs 1 --holdout 20 --batch_size 20 --threat.steps 1 --validation_steps 1",
    "evaluate": "--limit 20 --steps 1",
    "trust": "--limit 20 --budget 0.5",
    "transfer": "--limit 20 --steps 1",
    "sweep": "--limit 20 --over_eps 0,8/255 --over_steps 1,2",
    "layers": "--batch 5 --steps 1",
    "report": "--limit 20",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Sixty images in a local folder answer to the names of data sets that a hub would serve."""
    from clat.cli import shared

    real = shared.load_data
    table = datasets.load_dataset(str(ROOT / "src/clat/embedded"), split="train").select(range(60))
    for split in ("train", "test"):
        table.to_parquet(tmp_path / "hub" / f"{split}.parquet")
    monkeypatch.setattr(shared, "load_data", lambda source, split, **keys: real(str(tmp_path / "hub"), split, **keys))
    monkeypatch.chdir(tmp_path)
    torch.save(build_model("rn18", 10, width=8).network.state_dict(), "downloaded.pt")


@pytest.mark.usefixtures("hub")
def test_the_commands_run_in_order(capsys):
    """Slow (20 s alone): every command of the page runs, the trust battery among them."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("clat ")]
    assert len(lines) == 10
    for line in lines:
        _, command, *rest = shlex.split(line, comments=True)
        rest = ["rn18,width=8" if word == "rn18" else word for word in rest]
        code = main([command, *rest, *SMALL.get(command, "").split()])
        at_chance = command == "trust" and code == 1  # as a network of one epoch on 40 images may well be
        assert code == 0 or at_chance, capsys.readouterr().err
    assert Path("sweep.png").stat().st_size > 10_000


def test_the_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("('network.layer")
    assert printed[-1].count("network.layer") == 3


def test_the_make_targets_exist():
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
