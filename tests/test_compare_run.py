"""A tiny comparison whole: what it writes, what it does not do again, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from clat.checkpoint import load_tensors
from clat.cli import compare as command
from clat.cli import training
from clat.cli import unit as unit_process
from clat.cli.main import main
from clat.cli.shared import data_named
from clat.compare import estimate
from clat.compare.file import comparison, load_comparison
from clat.compare.run import locked
from clat.compare.statistics import pack, power, simulated, unpack
from clat.compare.table import rows, verdicts
from clat.data.dataset import Dataset
from clat.files import read_sealed
from clat.training.batches import split
from clat.training.runs import Run
from conftest import same_tensors

DATA = "fashion-mnist-mini"
KEYS = {
    "batch_size": 32,
    "images": 96,
    "holdout": 64,
    "epochs": 1,
    "threat": {"eps": "8/255", "step": "8/255", "steps": 1},
    "validation_steps": 1,
    "health": False,
    "precision": "fp32",
}
TINY = {
    "question": "Does it run?",
    "keys": KEYS,
    "base": {"model": "rn18,width=2", "recipe": "pgd-at", "at": ["last"]},
    "arms": {
        "one": {"recipe": "pgd-at", "from": "base/last", "keys": {"lr": 0.05}},
        "two": {"recipe": "pgd-at", "from": "base/last", "keys": {"lr": 0.05}},
        "clat": {"recipe": "clat", "from": "one/best", "at": ["last"]},
    },
    "evaluation": {"tier": "quick", "steps": 1, "images": 200, "of": "unused"},
    "contrasts": [["one", "two"], ["clat", "one/last"]],
    "seeds": [0],
}


class Done:
    """A unit that ran in this process."""

    def __init__(self, code: int):
        self.code = code

    def poll(self) -> int:
        return self.code

    wait = poll

    def terminate(self) -> None: ...


@pytest.fixture
def begun(monkeypatch) -> list[str]:
    """The units that were started, in this process in place of one of their own."""
    return in_this_process(monkeypatch)


def in_this_process(patch: pytest.MonkeyPatch) -> list[str]:
    started: list[str] = []

    def start(unit, **_):
        started.append(unit.name)
        return Done(unit_process.run(unit.out, unit.arm.name, unit.seed))

    patch.setattr(command, "_start", start)
    for module in (command, unit_process, training):
        patch.setattr(module, "data_named", _data)
    patch.setattr(command, "pass_times", lambda plan, *_, **__: {arm.model: 1e-4 for arm in plan.arms})
    return started


@cache
def _data(name: str, part: str) -> Dataset:
    return data_named(name, part).subset(torch.arange(600))


def written(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def compare(tmp_path: Path, content: dict = TINY, *more: str) -> int:
    file = written(tmp_path / "tiny.yaml", content)
    return main(["compare", str(file), "--data", DATA, "--out", str(tmp_path / "out"), *more])


def changed(**entries) -> dict:
    return {**yaml.safe_load(yaml.safe_dump(TINY, sort_keys=False)), **entries}


@pytest.fixture(scope="module")
def _whole(tmp_path_factory):
    """The tiny comparison, run once."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        in_this_process(patch)
        assert compare(folder) == 0
    return folder


@pytest.fixture
def whole(_whole, tmp_path, begun) -> Path:  # noqa: ARG001 (begun has to come first)
    """A folder in which the tiny comparison has run."""
    shutil.copytree(_whole, tmp_path, dirs_exist_ok=True)
    return tmp_path


def result(folder: Path) -> dict:
    return read_sealed(folder / "out/result.json")


def test_the_result_holds_what_the_run_folders_and_evaluations_say(whole):
    found = result(whole)
    assert [(entry["arm"], entry["seed"]) for entry in found["units"]] == [
        (name, 0) for name in ("base", "one", "two", "clat")
    ]
    for entry in found["units"]:
        run = Run(whole / f"out/runs/{entry['arm']}-0")
        assert entry["trainable"] == run.result["trainable"]
        assert entry["curves"]["robust"] == [round(line["robust"], 5) for line in run.metrics]
        assert entry["best"]["epoch"] == run.result["best"]["epoch"]
        assert entry["environment"]["packages"]["torch"] == run.environment["packages"]["torch"]
        records = [json.loads(path.read_text()) for path in (run.folder / "evaluations").glob("*.json")]
        outcomes = [record["state"]["outcomes"] for record in records]
        for measured in entry["evaluations"]:
            robust = unpack(measured["robust_images"])
            assert any(np.array_equal(robust, np.array(each) == 0) for each in outcomes)
            assert measured["robust"] == robust.sum() <= measured["clean"]
    clat = found["units"][-1]
    assert 0 < clat["trainable"] < 0.5 * clat["parameters"]
    assert clat["selected"][0]["layers"]
    _, one, two, _ = found["units"]
    assert one["flops"] == two["flops"] > 0
    assert clat["start"] == found["units"][1]["weights"]["best"]
    page = (whole / "out/table.md").read_text()
    arms, _, tested = page.partition("Contrasts")
    assert arms.count("\n| ") == 5
    assert tested.count("\n| ") == 1 + len(found["contrasts"])
    nothing = "+0.0 [+0.0, +0.0] | 1 | inside noise, 1 seed | seed 0: 0 to 0 (p 1)"
    assert f"| robust | one/best | two/best | {nothing} |" in page
    assert "Does it run?" in page
    assert f" | {one['flops'] / 1e12:.3g} | " in page
    assert (whole / "out/curves.png").stat().st_size > 5000


def test_the_share_that_trains_is_told_from_the_lowest_seed_to_the_highest(whole):
    plan, entries = comparison(TINY), result(whole)["units"]
    clat = entries[-1]
    more = {**clat, "seed": 1, "trainable": clat["parameters"]}
    share = f"{100 * clat['trainable'] / clat['parameters']:.1f}"
    assert [row[-1] for row in rows(plan, [*entries, more], plan.evaluations[0])] == [
        "100.0 %", "100.0 %", "100.0 %", f"{share} to 100.0 %",
    ]  # fmt: skip


def test_arms_that_differ_in_nothing_come_out_as_no_difference(whole):
    words = [each["words"] for each in result(whole)["contrasts"] if each["first"] == "one/best"]
    assert len(words) == 2
    assert all(text.startswith("no difference found between one/best and two/best") for text in words)


def test_what_is_done_is_not_done_again(whole, begun):
    before = result(whole)
    assert compare(whole) == 0
    assert begun == []
    assert result(whole) == before


def test_a_result_alone_goes_on_on_another_machine(whole, begun):
    before = result(whole)
    for folder in ("runs", "units", "recipes", "logs"):
        shutil.rmtree(whole / "out" / folder, ignore_errors=True)
    assert compare(whole) == 0
    assert begun == []
    more = changed(arms={**TINY["arms"], "three": {"recipe": "pgd-at", "from": "one/last", "keys": {"lr": 0.02}}})
    assert compare(whole, more) == 0
    assert begun == ["base-0", "one-0", "three-0"]  # whose checkpoints are needed, and no others
    after = {entry["arm"]: entry for entry in result(whole)["units"]}
    assert list(after) == ["base", "one", "two", "clat", "three"]
    assert after["two"] == before["units"][2]
    assert after["one"]["weights"] == before["units"][1]["weights"]  # on one machine, the same bits


def test_a_copy_of_a_checkpoint_is_started_from_where_its_run_is_gone(whole, begun, capsys):
    before = result(whole)["units"][1]
    starts = whole / "out/starts"
    starts.mkdir()
    shutil.copy(whole / "out/runs/one-0/best.safetensors", starts / "one-0-best.safetensors")
    for folder in ("runs", "units"):
        shutil.rmtree(whole / "out" / folder)
    more = changed(arms={**TINY["arms"], "three": {"recipe": "pgd-at", "from": "one/best", "keys": {"lr": 0.02}}})
    assert compare(whole, more) == 0
    assert begun == ["three-0"]  # and neither the base nor one again
    assert result(whole)["units"][-1]["start"] == before["weights"]["best"]
    assert Run(whole / "out/runs/three-0").environment["from"] == str(starts / "one-0-best.safetensors")
    shutil.move(starts / "one-0-best.safetensors", starts / "base-0-best.safetensors")
    capsys.readouterr()
    assert compare(whole, more) == 2
    assert "base-0-best.safetensors is no checkpoint that result.json names" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_changed_evaluation_trains_nothing_again(whole, begun, monkeypatch):
    monkeypatch.setattr(unit_process, "main", lambda *_: pytest.fail("trained again"))
    assert compare(whole, changed(evaluation={**TINY["evaluation"], "of": "test"})) == 0
    assert begun == ["base-0", "one-0", "two-0", "clat-0"]
    assert {each["evaluation"]["of"] for entry in result(whole)["units"] for each in entry["evaluations"]} == {"test"}


def test_the_estimate_leaves_out_epochs_that_are_trained(whole, capsys, monkeypatch):
    other = changed(evaluation={**TINY["evaluation"], "of": "test"})
    plan = load_comparison(str(written(whole / "other.yaml", other)))
    every, evaluated = (
        estimate.unit_seconds(plan, plan.arms[0], {"rn18,width=2": 1.0}, 600, 10, trained=trained) for trained in (0, 1)
    )
    assert (
        every - evaluated == 96 * 2 + 128 * 2
    )  # one step of the attack and the update; held-out and as many trained on
    monkeypatch.setattr(command, "unit_seconds", lambda *_, trained=0: 600.0 - 540 * trained)
    assert compare(whole, other, "--dry-run") == 0
    assert "4 units left: about 4 min" in capsys.readouterr().out


def test_a_result_that_is_asked_for_no_more_is_kept(whole, begun, capsys):
    before = (whole / "out/result.json").read_text()
    for folder in ("runs", "units"):
        shutil.rmtree(whole / "out" / folder)
    assert compare(whole, changed(base={**TINY["base"], "keys": {"lr": 0.2}}), "--only", "base") == 0
    assert begun == ["base-0"]
    assert before in [path.read_text() for path in (whole / "out").glob("result-*.json")]
    said = " ".join(capsys.readouterr().out.split())
    # Those that go on from the base began with other weights than it has now.
    assert "base-0, clat-0, one-0, two-0: of another recipe, start or evaluation; the result is kept as result-" in said


def test_only_some_arms_and_other_seeds(tmp_path, begun, capsys):
    assert compare(tmp_path, TINY, "--only", "one", "--seeds", "3", "4") == 0
    assert begun == ["base-3", "one-3", "base-4", "one-4"]
    plan, _, _ = " ".join(capsys.readouterr().out.split()).partition("one-3: training")
    assert "Contrasts: none 4 units left" in plan  # what one is compared with has not run
    assert compare(tmp_path, TINY, "--only", "two", "--seeds", "4", "--jobs", "2") == 0
    plan, _, _ = " ".join(capsys.readouterr().out.split()).partition("two-4: training")
    assert "base pgd-at" in plan
    assert "clat" not in plan
    assert "Contrasts: one/best against two/best 1 unit left" in plan
    assert begun[4:] == ["two-4"]
    found = result(tmp_path)
    assert found["seeds"] == {"base": [3, 4], "one": [3, 4], "two": [4], "clat": []}
    assert [each["of_seeds"] for each in found["contrasts"]] == [[4], [4]]


def test_a_run_made_by_hand_is_taken_over(whole, begun):
    tmp_path = whole
    out = tmp_path / "out/runs"
    plain = tmp_path / "plain"
    recipe = str(tmp_path / "out/recipes/one-0.yaml")
    flags = ["--data", DATA, "--out", str(plain / "one-0"), "--from", str(out / "base-0/last.safetensors")]
    assert main(["finetune", recipe, *flags]) == 0
    made = (plain / "one-0/environment.json").read_text()
    for path in ("runs/one-0", "units/one-0.json", "result.json"):
        path = tmp_path / "out" / path
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(plain / "one-0", out / "one-0")
    assert compare(tmp_path) == 0
    assert begun == ["one-0"]
    assert (out / "one-0/environment.json").read_text() == made  # not trained again
    assert [entry["arm"] for entry in result(tmp_path)["units"]] == ["base", "one", "two", "clat"]


def test_foreign_runs_are_refused(whole, begun, capsys):
    assert compare(whole, changed(keys={**KEYS, "lr": 0.3, "threat": {**KEYS["threat"], "steps": 2}})) == 2
    said = capsys.readouterr().err
    assert "runs/base-0 holds a run with another threat.steps, lr than arm base; move it away" in said
    shutil.rmtree(whole / "out/runs/two-0")
    shutil.copytree(whole / "out/runs/one-0", whole / "out/runs/base-1")
    assert compare(whole, changed(base={**TINY["base"], "keys": {"lr": 0.05}}), "--seeds", "1") == 2
    assert "another seed than arm base;" in capsys.readouterr().err
    shutil.rmtree(whole / "out/runs/base-1")
    shutil.copytree(whole / "out/runs/one-0", whole / "out/runs/two-0")
    other = {**TINY["arms"], "two": {"recipe": "pgd-at", "from": "one/last", "keys": {"lr": 0.05}}}
    assert compare(whole, changed(arms=other)) == 2
    assert "two-0 holds a run that began with other weights than those of" in capsys.readouterr().err
    assert begun == []


def test_a_damaged_result_is_refused(whole, capsys):
    path = whole / "out/result.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1', 1))
    assert compare(whole) == 2
    said = capsys.readouterr().err
    assert "result.json is damaged or was changed by hand" in said
    assert said.count("\n") == 1
    path.write_text("{")
    assert compare(whole) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "is not a readable result" in said
    assert said.endswith("; put it back from a copy, or move it away.")


def test_two_engines_on_one_folder(whole, capsys):
    with locked(whole / "out"):
        assert compare(whole) == 2
    assert "Another clat compare is at work in" in capsys.readouterr().err
    assert compare(whole) == 0


def test_a_unit_that_fails_is_named_and_the_others_go_on(tmp_path, begun, capsys, monkeypatch):
    real = unit_process.run

    def failing(out, arm, seed):
        if arm != "one":
            return real(out, arm, seed)
        (out / "logs").mkdir(exist_ok=True)
        (out / "logs/one-0.log").write_text("epoch 1\nclat: The disk is full.\n")
        return 2

    monkeypatch.setattr(unit_process, "run", failing)
    assert compare(tmp_path) == 2
    said = capsys.readouterr().err
    assert "one-0 failed: The disk is full (log: " in said
    assert "logs/one-0.log)" in said
    assert "and 1 more failed" in said
    assert begun == ["base-0", "one-0", "two-0"]  # clat goes on from one
    assert [entry["arm"] for entry in result(tmp_path)["units"]] == ["base", "two"]


def test_unused_images_are_those_that_no_arm_saw(whole):
    train = _data(DATA, "train")
    training, held = split(len(train), 64, 0, 96)
    assert len(training) == 96
    own, validation = train.hold_out(64, 0)  # as the training loop draws them
    assert torch.equal(train.subset(held).labels, validation.labels)
    assert torch.equal(train.subset(split(len(train), 64, 0, None)[0]).labels, own.labels)
    entry = result(whole)["units"][0]
    rest = torch.ones(len(train), dtype=torch.bool)
    rest[training] = rest[held] = False
    assert len(rest.nonzero()) == 600 - 96 - 64
    chosen = train.subset(rest.nonzero().squeeze(1))
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:200].sort().values
    assert entry["evaluations"][0]["images_sha256"] == chosen.subset(order).digest()


@pytest.mark.usefixtures("begun")
def test_a_dry_run_leaves_nothing(tmp_path, capsys):
    assert compare(tmp_path, TINY, "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    assert "4 units left: about" in said
    assert "one/best against two/best, clat/last against one/last" in said


@pytest.mark.usefixtures("begun")
@pytest.mark.parametrize(("jobs", "threads"), [(1, 3), (2, 1)])
def test_a_pass_is_timed_with_the_threads_that_a_unit_gets(jobs, threads, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "pass_times", estimate.pass_times)
    monkeypatch.setattr(estimate, "_pass_seconds", lambda *_: seen.append(torch.get_num_threads()) or 1e-4)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert compare(tmp_path, TINY, "--dry-run", "--jobs", str(jobs)) == 0
        assert (seen, torch.get_num_threads()) == ([threads], 3)
    finally:
        torch.set_num_threads(before)


def synthetic(difference: float, generator: np.random.Generator) -> tuple:
    """A comparison of two arms with three seeds and 4,000 images, and entries of that true difference."""
    content = changed(evaluation={"images": 4000}, contrasts=[["one", "two"]])
    plan = comparison({**content, "arms": {name: TINY["arms"][name] for name in ("one", "two")}})
    arms = simulated(difference, 4000, 3, 0.1, generator)
    how = {**plan.evaluations[0].__dict__}
    entries = [
        {
            "arm": name,
            "seed": seed,
            "evaluations": [
                {"checkpoint": "best", "evaluation": how, **{f"{key}_images": pack(right[seed]) for key in KINDS}}
            ],
        }
        for name, right in zip(("one", "two"), arms, strict=True)
        for seed in range(3)
    ]
    return plan, entries


KINDS = ("clean", "robust")


def test_planted_points_are_found_as_often_as_the_power_says_and_none_where_none_are():
    generator = np.random.default_rng(0)
    found = {}
    for difference in (0.0, 0.02):
        results = [verdicts(*synthetic(difference, generator))[0].contrast for _ in range(25)]
        found[difference] = np.mean([result.found for result in results])
    assert found[0.02] == pytest.approx(power(0.02, 4000, 3, 0.1, repeats=50), abs=0.15)
    assert found[0.02] >= 0.8
    assert found[0.0] <= 0.15


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_at_work_it_goes_on_where_it_was(tmp_path):
    """Two units at a time, each in a process of its own; all of them end when the comparison is killed."""
    out = tmp_path / "out"
    arms = {name: {**TINY["arms"][name], "keys": {"lr": 0.05, "epochs": 3}} for name in ("one", "two")}
    file = written(tmp_path / "killed.yaml", changed(arms=arms, contrasts=[["one", "two"]]))
    line = [sys.executable, "-m", "clat", "compare", str(file), "--data", DATA, "--out", str(out), "--jobs", "2"]
    engine = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    runs = [out / f"runs/{name}-0" for name in ("one", "two")]
    deadline = time.monotonic() + 300
    while not all((run / "last.safetensors").exists() for run in runs) and time.monotonic() < deadline:
        assert engine.poll() is None
        time.sleep(0.02)
    os.kill(engine.pid, signal.SIGKILL)
    engine.wait()
    while any((run / ".lock").exists() and not _free(run) for run in runs) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert subprocess.run(line, check=False).returncode == 0
    found = {entry["arm"]: entry for entry in read_sealed(out / "result.json")["units"]}
    assert found["one"]["epochs"] == found["two"]["epochs"] == 3
    assert same_tensors(runs[0] / "last.safetensors", runs[1] / "last.safetensors")
    assert load_tensors(runs[0] / "last.safetensors")[1]["epoch"] == 3


def _free(run: Path) -> bool:
    """Whether no process trains there."""
    import fcntl

    with open(run / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.usefixtures("begun")
def test_layers_trained_alone_are_set_beside_the_rankings(tmp_path):
    alone = {
        name: {"recipe": "pgd-at", "from": "base/last", "at": ["last"],
               "keys": {"tuner": "critical", "lr": 0.3, "critical": {"layers": [layer]}}}
        for name, layer in (("a", "conv1"), ("b", "layer2.0.conv1"), ("c", "layer4.1.conv2"), ("d", "linear"))
    }  # fmt: skip
    by = {"recipe": "clat", "from": "base/last", "at": ["last"], "keys": {"critical": {"ranking": "relative"}}}
    assert compare(tmp_path, changed(arms={**alone, "by-relative": by}, contrasts=[])) == 0
    page = (tmp_path / "out/table.md").read_text()
    units = {entry["arm"]: entry for entry in result(tmp_path)["units"]}
    measured = units["by-relative"]["selected"][0]["measured"]
    (selection,) = Run(tmp_path / "out/runs/by-relative-0").selections
    assert measured == pytest.approx({score.name: score.criticality for score in selection.scores}, rel=1e-4)
    robust = {name: entry["evaluations"][0]["robust"] for name, entry in units.items()}
    images = units["a"]["evaluations"][0]["evaluation"]["images"]
    for name in "abcd":
        (layer,) = units[name]["selected"][0]["layers"]
        assert f"| `{layer}` | {100 * (robust[name] - robust['base']) / images:+.1f} |" in page
    assert "| by-relative | " in page
