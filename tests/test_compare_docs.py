"""docs/compare.md: its file is short, and its commands run. docs/results.md: its comparisons go on from there."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from clat.cli.main import main
from clat.compare.file import load_comparison
from clat.compare.run import Progress
from clat.files import read_sealed
from test_compare_run import in_this_process

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/compare.md").read_text()
RESULTS = (ROOT / "docs/results.md").read_text()


def test_the_commands_of_the_page_run_and_its_file_is_short(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    began = in_this_process(monkeypatch)
    file = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1]
    assert len(file.splitlines()) < 20
    content = yaml.safe_load(file)
    less = {
        "images": 100,
        "holdout": 50,
        "epochs": 1,
        "health": False,
        "threat": {**content["keys"]["threat"], "steps": 1},
    }
    content["keys"] |= less  # the page's file is for minutes, this test for seconds
    for arm in (content["base"], *content["arms"].values()):
        arm["keys"]["epochs"] = 1
    content["evaluation"] |= {"images": 100, "steps": 1}
    Path("mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    commands = re.findall(r"^clat compare mine.yaml .*", PAGE, re.MULTILINE)
    assert len(commands) == 3
    for line in commands:
        assert main(shlex.split(line)[1:]) == 0
    assert sorted(began) == [f"{arm}-{seed}" for arm in ("base", "clat", "pgd-at") for seed in (0, 1, 2)]
    assert read_sealed(Path("runs/mine/result.json"))["contrasts"][0]["of_seeds"] == [0, 1, 2]
    assert "Written: runs/mine/result.json, table.md and curves.png" in capsys.readouterr().out
    for name in ("result.json", "table.md", "curves.png"):
        assert name in PAGE
        assert (Path("runs/mine") / name).is_file()


def test_the_page_names_every_entry_of_a_file():
    entries = "recipe from at evaluation of contrasts networks scales notes printed then"
    for entry in entries.split():
        assert f"`{entry}`" in PAGE


@pytest.mark.parametrize("block", re.findall(r"```\n(mkdir.*?)```", RESULTS, re.DOTALL))
def test_a_comparison_goes_on_from_its_committed_result_and_starts(block, tmp_path):
    *copies, command = block.replace("OUT", str(tmp_path / "out")).strip().splitlines()
    for line in copies:
        subprocess.run(line, shell=True, cwd=ROOT, check=True)
    comparison = load_comparison(shlex.split(command)[2])
    progress = Progress(comparison, tmp_path / "out", "", [], [])
    progress.read()
    progress.check_starts()
    assert {entry["seed"] for name, entry in progress.entries.items() if name.startswith("base-")} == {0, 1}
    assert sorted(path.stem for path in (tmp_path / "out/starts").glob("base-*")) == ["base-0-best", "base-1-best"]
