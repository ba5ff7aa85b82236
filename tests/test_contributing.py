"""The diffs of CONTRIBUTING.md apply to the package, and what they add trains and is checked."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SMALL = {
    "train": "--epochs 1 --holdout 20 --batch-size 20 --validation-steps 1 --health false",
    "finetune": "--epochs 1 --holdout 20 --batch-size 20 --threat.steps 1 --validation-steps 1 --health false",
    "trust": "--limit 20 --budget 0.1 --json verdict.json",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the package with every diff of the page, and a file of 60 images beside it."""
    folder = tmp_path_factory.mktemp("changed")
    for part in ("src", "recipes", "tools"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for diff in blocks("diff"):
        for change in re.split(r"^(?=--- )", diff, flags=re.MULTILINE)[1:]:  # a file each
            command = ["git", "apply", "--recount", "-"]
            done = subprocess.run(command, cwd=folder, input=change, capture_output=True, text=True)
            assert done.returncode == 0, f"{change}\n{done.stderr}"
            name = re.search(r"^\+\+\+ b/(.+)$", change, re.MULTILINE)[1]
            assert all(
                line[1:] in (folder / name).read_text() for line in change.splitlines() if line[:1] == "+" != line[1:2]
            )
    labels = np.arange(60) % 3
    np.savez(
        folder / "digits.npz", images=(labels[:, None, None] * np.full((60, 12, 12), 80)).astype("uint8"), labels=labels
    )
    return folder


SCRIPT = """
import json, runpy, sys, torch
torch.set_num_threads(1)
runpy.run_path("tools/make_flags.py", run_name="__main__")
from clat.cli.main import main
print([main(arguments) for arguments in json.loads(sys.argv[1])])
"""


def test_what_the_diffs_add_trains_and_is_checked(changed):
    """Slow (30 s): a second process imports torch, as the changed package cannot stand beside this one."""
    commands = []
    for line in blocks("bash")[-1].splitlines():
        _, command, *rest = shlex.split(line)
        commands.append([command, *rest, *SMALL[command].split()])
    assert [command for command, *_ in commands] == list(SMALL)
    environment = {**os.environ, "PYTHONPATH": str(changed / "src"), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(script, cwd=changed, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[0, 0, 1]", done.stderr  # too little time for a verdict
    assert "objective: noise" in (changed / "runs/noise/recipe.yaml").read_text()
    selection = json.loads((changed / "runs/last/selections.jsonl").read_text().splitlines()[0])
    assert selection["trainable"] == ["network.5.weight", "network.5.bias"]
    found = json.loads((changed / "verdict.json").read_text())
    assert "classes" in [finding["check"] for finding in found["findings"]]


def test_each_make_target_of_the_page_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", TEXT, re.MULTILINE)
    assert len(targets) > 3
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_the_one_test_that_the_page_runs_exists():
    path, word = re.findall(r"pytest (tests/\w+\.py) -k (\w+)", TEXT)[0]
    assert re.search(rf"def test_\w*{word}", (ROOT / path).read_text())
