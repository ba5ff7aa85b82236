"""The command line's own doors: names, files of recipes, typos before torch, interruption and --debug."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import clat
from clat.cli.arguments import RECIPE_COMMANDS, USAGE, table
from clat.cli.main import main

ROOT = Path(__file__).parents[1]
REST = ["--model", "rn18", "--data", "x", "--out", "y"]


def refused(capsys, *arguments):
    """The one sentence that the arguments are refused with."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("clat: ")
    assert printed.err.count("\n") == 1
    assert printed.err[:-1].isprintable()
    assert not printed.out
    return printed.err


def test_the_table_is_that_of_the_commands_and_recipes():
    sys.path.insert(0, str(ROOT / "tools"))
    made = importlib.import_module("make_flags").written()
    assert made == (ROOT / "src/clat/cli/flags.json").read_text(), "run tools/make_flags.py"
    assert list(USAGE) == list(table()["commands"])


@pytest.mark.parametrize(("command", "name"), [("evaluate", "tier"), ("transfer", "attack")])
def test_the_usage_lists_every_choice(command, name):
    (entry,) = (entry for entry in table()["commands"][command]["arguments"] if entry["name"] == name)
    assert f"[--{name} {'|'.join(entry['choices'])}]" in USAGE[command]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "Did you mean train?"),
        (["Evaluate"], "Did you mean evaluate?"),
        (["frobnicate"], "There is no command 'frobnicate'"),
        (["train", "pgdat", *REST], "Did you mean pgd-at?"),
        (["train", "pgd-at", *REST, "--epoch", "3"], "Did you mean --epochs?"),
        (["train", "pgd-at", *REST, "--treat.eps=0.1"], "Did you mean --threat.eps?"),
        (["train", "pgd-at", *REST, "--threat.epsilon=0.1"], "no flag '--threat.epsilon'"),
        (["train", "pgd-at", *REST, "--frobnicate", "3"], "no flag '--frobnicate'."),
        (["train", "pgd-at", *REST, "3"], "takes no argument '3'"),
        (["train", "pgd-at", *REST, "--schedule", "cosin"], "Did you mean cosine?"),
        (["train", "pgd-at", *REST, "--objective", "pgdat"], "Did you mean pgd-at?"),
        (["train", "pgd-at", *REST, "--scale", "tiny"], "There is no recipe 'scale/tiny'"),
        (["train", "pgd-at", *REST, "--scale"], "Name a scale"),
        (["train", "pgd-at", *REST, "--config"], "Name a config"),
        (["train", "pgd-at", "--model", "rn18"], "it needs --data, --out"),
        (["train", "pgd-at", *REST, "--lr"], "expected one argument"),
        (["train", "pgd-at", *REST, "--resume=yes"], "resume"),
        (["finetune", "clat", "--fom", "x"], "Did you mean --from?"),
        (["evaluate", "--data", "x"], "it needs network"),
        (["evaluate", "x", "--data", "x", "--teir", "full"], "Did you mean --tier?"),
        (["evaluate", "x", "--data", "x", "--tier", "ful"], "Did you mean full?"),
        (["evaluate", "x", "--data", "x", "--repeats", "1.5"], "repeats is 1.5; it must be a whole number"),
        (["evaluate", "x", "--data", "x", "--limit", str(2**70)], "must fit in 64 bits"),
        (["evaluate", "x", "--data", "x", "--seed", "[/x]"], "seed is ['/x']; it must be a whole number"),
        (["trust", "x", "--data", "x", "--budget", "nan"], "budget is 'nan'; it must be a finite number"),
        (["transfer", "--data", "x"], "it needs networks"),
        (["status", "x", "y"], "takes no argument 'y'"),
        (["status", "[/x]\x1b[31m"], "[/x]\\x1b[31m"),
        ([""], "Name a command"),
        (["--debg"], "There is no command '--debg'"),
    ],
)
def test_what_is_misspelt_or_missing_is_named(capsys, arguments, says):
    assert says in refused(capsys, *arguments)


@pytest.mark.parametrize("key", ["model", "data", "out", "overwrite", "resume", "config", "from", "lamda", 1])
@pytest.mark.parametrize("command", RECIPE_COMMANDS)
def test_a_recipe_file_never_chooses_code_data_or_a_folder(tmp_path, capsys, command, key):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"epochs: 1\n{key}: true\n")
    named = ["--model", "rn18"] if command == "train" else ["--from", "x"]
    assert f"has no key {key!r}" in refused(capsys, command, recipe, *named, "--data", "x", "--out", tmp_path / "out")
    assert "has no key" in refused(capsys, command, "clat", "--config", recipe, *named, "--data", "x", "--out", "y")
    assert not (tmp_path / "out").exists()


BOMB = "a: &a [x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "must hold keys and values"),
        (b"- 1\n", "must hold keys and values"),
        (b"epochs", "must hold keys and values"),
        (b"\xff\xfe\x00", "not a readable recipe"),
        (b"epochs: \x00", "no valid YAML"),
        (b"epochs: [1", "no valid YAML"),
        (b"epochs: " + b"[" * 5000 + b"]" * 5000, "nested too deep"),
        (BOMB.encode(), "aliases"),
        (b"epochs: !!python/object/apply:os.system ['true']\n", "no valid YAML"),
        (b"epochs: !!timestamp x\n", "no valid YAML"),
        (b"threat: 3\n", "threat is 3; it must be a block of keys"),
        (b"threat: {epsilon: 1}\n", "threat has no key 'epsilon'"),
        (b"critical: {k: '3'}\n", "critical.k is '3'"),
        (b"? [a]\n: 1\n", "no valid YAML"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path, capsys, content, says):
    (tmp_path / "recipe.yaml").write_bytes(content)
    assert says in refused(capsys, "train", tmp_path / "recipe.yaml", *REST)


@pytest.mark.parametrize(
    "name", ["FOLDER", "x" * 5000, "a\0b", "LOOP", "[/x]", "/dev/null", "~", "recipes/clat.yaml/x"]
)
def test_what_is_no_file_is_refused(tmp_path, capsys, name):
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    path = {"FOLDER": tmp_path, "LOOP": tmp_path / "loop.yaml"}.get(name, name)
    assert "There is no recipe" in refused(capsys, "train", path, *REST)
    assert "There is no recipe" in refused(capsys, "train", "clat", "--config", path, *REST)


def test_the_last_word_has_the_flag_then_the_scale_then_the_file(tmp_path):
    from clat.cli.arguments import parse
    from clat.cli.commands import COMMANDS

    (tmp_path / "mine.yaml").write_text("epochs: 7\nlr: 1e-3\nthreat: {steps: 3}\n")
    over = ["train", "pgd-at", "--config", str(tmp_path / "mine.yaml"), *REST]
    recipe = parse(over, COMMANDS)[1]["recipe"]
    assert (recipe.epochs, recipe.lr, recipe.threat.steps, recipe.threat.eps) == (7, 1e-3, 3, 0.03)
    assert parse([*over, "--scale", "small"], COMMANDS)[1]["recipe"].epochs == 3
    assert parse([*over, "--scale", "small", "--epochs", "5", "--epochs=6"], COMMANDS)[1]["recipe"].epochs == 6
    assert parse([*over, "--batch-size", "5"], COMMANDS)[1]["recipe"].batch_size == 5


def run(*arguments, python="", path=()):
    """A command in a process of its own; returns its exit code, standard output and error output."""
    start = ["-c", python] if python else ["-m", "clat", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT / "src")])}
    done = subprocess.run([sys.executable, *start], env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_typos_help_and_version_need_no_torch():
    """So they take a fraction of a second."""
    code, printed, errors = run(
        python="""
import sys
from clat.cli.main import main
for arguments in (["trian"], ["train", "pgdat"], ["train", "pgd-at", "--epoch", "3"], ["evaluate"],
                  ["evaluate", "x", "--data", "x", "--tier", "ful"], ["train", "pgd-at", "--model", "rn18"]):
    assert main(arguments) == 2
for arguments in (["--help"], ["--version"], ["train", "--help"], ["evaluate", "-h"],
                  ["--completion", "bash"], ["--complete", "train", "pgd-at", "--sched"]):
    try:
        main(arguments)
    except SystemExit as end:
        assert not end.code
heavy = {"torch", "numpy", "datasets", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    )
    assert code == 0, errors
    assert errors.count("\n") == errors.count("clat: ") == 6
    versions = [line for line in printed.splitlines() if line.startswith("clat ")]
    assert len(versions) == 1
    assert versions[0].count("clat") == 1


def test_an_interruption_while_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    code, printed, errors = run("layers", "rn18", path=[tmp_path])
    assert code == 130
    assert not printed
    assert errors.startswith("clat: Interrupted")
    assert errors.count("\n") == 1


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("CLAT_DEBUG", "")
    assert "Traceback" not in refused(capsys, "status", "nowhere")
    for arguments in (["--debug", "status", "nowhere"], ["status", "nowhere", "--debug"]):
        monkeypatch.setenv("CLAT_DEBUG", "")
        assert main(arguments) == 2
        shown = capsys.readouterr().err
        assert "Traceback (most recent call last)" in shown
        assert shown.splitlines()[-1].startswith("clat: ")
        assert os.environ["CLAT_DEBUG"] == "1"


def test_a_bug_stays_a_traceback(monkeypatch):
    from clat.cli import commands

    def broken(**_):
        raise RuntimeError("a bug")

    monkeypatch.setitem(commands.COMMANDS, "status", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["status", "x"])


def test_public_names_are_the_same_whatever_was_imported_before():
    code, printed, errors = run(
        python="""
import clat
assert set(clat.__all__) <= set(dir(clat))
import clat.evaluation.evaluate, clat.training.train, clat.layers, clat.criticality, clat.evaluation.trust
from clat import find_layers, train
from clat.objectives import Trades
assert clat.train is train is clat.training.train.train and clat.find_layers is find_layers
assert clat.objectives.Trades is Trades
assert clat.layers.__name__ == "clat.layers" and clat.criticality.__name__ == "clat.criticality"
print(*(name for name in clat.__all__ if getattr(clat, name) is None))
try:
    clat.nothing
except AttributeError as error:
    print(error)
"""
    )
    assert code == 0, errors
    assert "no attribute 'nothing'" in printed


def test_type_checkers_see_the_public_names_where_they_are_defined():
    assert clat.__all__ == sorted(set(clat.__all__))
    assert set(clat.__all__) == {*clat.MODULES, "objectives", "tuners"}
    tree = ast.parse((ROOT / "src/clat/__init__.py").read_text())
    typed = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in typed.body for alias in node.names}
    expected = {name: f"clat.{module}" for name, module in clat.MODULES.items()}
    assert seen == {**expected, "objectives": "clat", "tuners": "clat"}
    assert (ROOT / "src/clat/py.typed").is_file()


def test_the_table_is_json_that_a_wheel_can_carry():
    assert json.loads((ROOT / "src/clat/cli/flags.json").read_text()) == table()
