"""The rules of the house hold, and the tool that checks them finds what breaks them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from house import LONGEST_FUNCTION, LONGEST_MODULE, LONGEST_PATH, findings


def test_the_rules_hold():
    assert findings() == []


def found(root: Path, name: str, text: str) -> str:
    """The findings in a tree that has this one file."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
    return "\n".join(findings(root))


@pytest.mark.parametrize(
    ("name", "line", "part"),
    [
        ("evaluation/evaluate.py", "from clat.training.loop import train", "training"),
        ("evaluation/evaluate.py", "import clat.training.loop", "training"),
        ("evaluation/evaluate.py", "from clat import training", "training"),
        ("evaluation/trust/checks.py", "def check():\n    from clat.training.health import CHANCE", "training"),
        ("training/loop.py", "from clat import evaluate", "clat"),
        ("objectives/clat.py", "from clat.tuners import Critical", "tuners"),
        ("layers.py", "from clat.features import observe", "features"),
        ("errors.py", "from clat.text import plain", "text"),
        ("training/loop.py", "from clat.cli.main import main", "cli"),
    ],
)
def test_an_import_from_the_same_row_or_below_is_found(tmp_path, name, line, part):
    said = found(tmp_path, f"src/clat/{name}", line)
    assert said.startswith(f"src/clat/{name} imports clat.{part}, which is not in a row above")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("training/loop.py", "from clat.evaluation.accuracy import Accuracy\nfrom clat.training.runs import Run"),
        ("objectives/clat.py", "from clat.objectives.base import Objective\nfrom clat.errors import InputError"),
        ("__init__.py", "from clat.training.loop import train\nfrom clat import objectives"),
        ("cli/main.py", "from clat import evaluate\nimport clat.training.loop\nimport torch"),
    ],
)
def test_an_import_from_above_is_not(tmp_path, name, line):
    assert found(tmp_path, f"src/clat/{name}", line) == ""


def test_a_new_part_needs_a_place(tmp_path):
    assert "clat.helpers has no place in ROWS" in found(tmp_path, "src/clat/helpers.py", "")


@pytest.mark.parametrize("folder", ["src/clat", "tools", "bench"])
def test_long_modules_and_functions_are_found(tmp_path, folder):
    name = f"{folder}/layers.py"
    function = 'def run():\n    """A docstring\n\n    does not count."""\n' + "    pass\n" * (LONGEST_FUNCTION - 1)
    assert found(tmp_path, name, function) == ""
    assert f"{name}:run has {LONGEST_FUNCTION + 1} lines" in found(tmp_path, name, function + "    pass\n")
    assert found(tmp_path, name, "x = 1\n" * LONGEST_MODULE) == ""
    assert f"{name} has {LONGEST_MODULE + 1} lines" in found(tmp_path, name, "x = 1\n" * (LONGEST_MODULE + 1))


def test_of_a_command_only_the_body_counts(tmp_path):
    signature = "def evaluate(\n" + "    *,\n    " + ",\n    ".join(f"flag{i}" for i in range(90)) + "\n):\n"
    body = '    """Help."""\n' + "    pass\n" * LONGEST_FUNCTION
    assert found(tmp_path, "src/clat/cli/evaluation.py", signature + body) == ""
    assert "evaluate has 61 lines" in found(tmp_path, "src/clat/cli/evaluation.py", signature + body + "    pass\n")
    assert "evaluate has" in found(tmp_path, "src/clat/evaluation/evaluate.py", signature + body)


def test_a_reading_path_that_grew_is_found(tmp_path):
    said = found(tmp_path, "src/clat/threat.py", "\n" * LONGEST_PATH)
    assert "The reading path" not in said
    assert "The reading path" in found(tmp_path, "src/clat/layers.py", "\n")
