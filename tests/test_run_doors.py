"""Run folders: what is in the way, who else trains there, devices and processes."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from clat.checkpoint import load_tensors, load_weights
from clat.cli.shared import write_json
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.network import snapshot
from clat.threat import Threat
from clat.training import loop
from clat.training.claims import claim
from clat.training.integrity import IntegrityError, verify
from clat.training.processes import started
from clat.training.runs import Run
from clat.training.train import train
from clat.tuners import Whole
from conftest import same_tensors
from small_runs import CRITICAL, RECIPE, contents, noise, refused, small


@pytest.fixture(scope="module")
def data() -> Dataset:
    return noise()


# What is in the way


PRECIOUS = ["best.safetensors", "last.safetensors", "metrics.jsonl", "result.json", "evaluations/notes.txt"]


@pytest.mark.parametrize("name", [*PRECIOUS, "recipe.yaml", "optimizer-2.safetensors", "thesis.tex", "evaluations/"])
@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_a_folder_with_files_and_no_run_is_never_touched(name, flags, data, tmp_path):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.mkdir() if name.endswith("/") else path.write_text("precious")
    refused("another --out", RECIPE, small(), data, out=tmp_path / "out", **flags)
    assert path.exists()


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(data, tmp_path):
    once = replace(RECIPE, epochs=1)
    run = train(once, small(), data, out=tmp_path / "run")
    evaluations = run.folder / "evaluations"
    evaluations.mkdir()
    records = ["pgd-20-0123456789ab.json", ".pgd-20-0123456789ab.json.partial"]
    for name in records:
        (evaluations / name).write_text(json.dumps({"state": {}, "result": {}}))
    foreign = {
        "notes.txt": "mine", "table.json": '{"state": {}}', "mine-0123456789ab.json": "[1]", "0123456789ab/x": "mine",
    }  # fmt: skip
    for name, text in foreign.items():
        (evaluations / name).parent.mkdir(exist_ok=True)
        (evaluations / name).write_text(text)
    (evaluations / "linked-0123456789ab.json").symlink_to(evaluations / "notes.txt")
    train(replace(once, lr=0.01), small(), data, out=run.folder, overwrite=True)
    assert run.recipe["lr"] == 0.01
    assert {name: (evaluations / name).read_text() for name in foreign} == foreign
    assert (evaluations / "linked-0123456789ab.json").is_symlink()
    assert not any((evaluations / name).exists() for name in records)

    for name in (*foreign, "linked-0123456789ab.json"):
        (evaluations / name).unlink()
    (evaluations / "0123456789ab").rmdir()
    (evaluations / records[0]).write_text(json.dumps({"state": {}, "result": {}}))
    train(once, small(), data, out=run.folder, overwrite=True)
    assert not evaluations.exists()


def test_a_linked_folder_of_evaluations_stays(data, tmp_path):
    run = train(replace(RECIPE, epochs=1), small(), data, out=tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (run.folder / "evaluations").symlink_to(tmp_path / "elsewhere")
    refused("other files", RECIPE, small(), data, out=run.folder, overwrite=True)


def test_other_files_do_not_keep_a_run_from_going_on(data, tmp_path):
    run = train(replace(RECIPE, epochs=1), small(), data, out=tmp_path / "run")
    (run.folder / "notes.txt").write_text("mine")
    train(replace(RECIPE, epochs=1), small(), data, out=run.folder, resume=True)
    assert (run.folder / "notes.txt").read_text() == "mine"


def test_resume_and_overwrite_exclude_each_other(data, tmp_path):
    refused("not both", RECIPE, small(), data, out=tmp_path, resume=True, overwrite=True)


def test_a_kill_while_a_run_is_replaced_never_leaves_half_a_run_to_resume(data, tmp_path, monkeypatch):
    """Dies before each removal in turn; then --resume is refused or starts over, and --overwrite works."""
    once = replace(RECIPE, epochs=1)
    run = train(once, small(), data, out=tmp_path / "run")
    whole = train(replace(once, seed=1), small(), data, out=tmp_path / "whole")
    real = Path.unlink
    for removals in range(8):
        left = [removals]

        def dying(path, missing_ok=False, left=left):
            if path.name != ".lock":
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
            real(path, missing_ok=missing_ok)

        copy = Run(tmp_path / f"copy-{removals}")
        shutil.copytree(run.folder, copy.folder)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", dying)
            with pytest.raises(KeyboardInterrupt):
                train(replace(once, seed=1), small(), data, out=copy.folder, overwrite=True)
        if removals and copy.exists:
            refused("start.json is missing", once, small(), data, out=copy.folder, resume=True)
        train(replace(once, seed=1), small(), data, out=copy.folder, overwrite=True)
        assert same_tensors(copy.last, whole.last)


def _too_long(base: Path) -> Path:
    return base / ("x" * 300)


def _below_a_file(base: Path) -> Path:
    (base / "file").write_text("mine")
    return base / "file/run"


def _a_file(base: Path) -> Path:
    (base / "file").write_text("mine")
    return base / "file"


def _a_loop(base: Path) -> Path:
    (base / "loop").symlink_to(base / "loop")
    return base / "loop/run"


def _a_loop_itself(base: Path) -> Path:
    (base / "loop").symlink_to(base / "loop")
    return base / "loop"


def _dangling(base: Path) -> Path:
    (base / "link").symlink_to(base / "nowhere/run")
    return base / "link"


def _nul(base: Path) -> Path:
    return base / "a\0b"


def _surrogate(base: Path) -> Path:
    return base / "a\udfffb"


def _in_proc(_: Path) -> Path:
    return Path("/proc/clat/run")


PATHS = [_too_long, _below_a_file, _a_file, _a_loop, _a_loop_itself, _dangling, _nul, _surrogate, _in_proc]


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}], ids=str)
@pytest.mark.parametrize("place", PATHS, ids=lambda place: place.__name__)
def test_a_place_that_can_be_no_folder_gets_one_sentence(place, flags, data, tmp_path):
    out = place(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="cannot be a run folder") as caught:
        train(RECIPE, small(), data, out=out, **flags)
    assert "\0" not in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_a_read_only_place_gets_one_sentence(call, data, tmp_path, monkeypatch):
    """Root may write anywhere, so the system's answer is put in its mouth."""

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(*((Path, "mkdir") if call == "mkdir" else (os, "open")), read_only)
    with pytest.raises(InputError, match=r"cannot be a run folder .*Read-only"):
        train(RECIPE, small(), data, out=tmp_path / "new/run")
    monkeypatch.undo()
    assert not (tmp_path / "new").exists()


def test_nothing_stays_where_the_input_is_bad(data, tmp_path):
    with pytest.raises(InputError, match="held out"):
        train(replace(RECIPE, holdout=999), small(), data, out=tmp_path / "deep/run")
    assert list(tmp_path.iterdir()) == []


# Who else trains there


def test_two_at_one_folder_are_refused(data, tmp_path, monkeypatch):
    """The second comes while the first is in its first epoch, and after it."""
    seen = []
    real = loop.commit

    def commit(*arguments):
        for when in ("before", "after"):
            flags = [{}, {"resume": True}, {"overwrite": True}]
            for keys in flags:
                with monkeypatch.context() as patch:
                    patch.setattr(loop, "commit", real)
                    with pytest.raises(InputError) as caught:
                        train(RECIPE, small(), data, out=tmp_path / "run", **keys)
                seen.append((when, bool(keys), str(caught.value)))
            if when == "before":
                real(*arguments)

    monkeypatch.setattr(loop, "commit", commit)
    run = train(replace(RECIPE, epochs=1), small(), data, out=tmp_path / "run")
    assert all(("Another process is training" in said) == flag for _, flag, said in seen)
    assert all("already holds a run" in said for _, flag, said in seen if not flag)
    assert run.result["epochs"] == 1
    assert not (run.folder / ".lock").exists()


def test_a_killed_process_leaves_no_lock_behind(data, tmp_path):
    """Killed while it holds the lock; a process that it had forked off, as loaders of data are, lives on."""
    out = tmp_path / "run"
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with claim(Run(out), resume=True, overwrite=False):
            loader = os.fork()
            if loader:
                os.write(writing, str(loader).encode())
            time.sleep(60)
        os._exit(0)
    loader = int(os.read(reading, 20))
    try:
        with pytest.raises(InputError, match="Another process is training"):
            train(RECIPE, small(), data, out=out, resume=True)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert (out / ".lock").exists()
        assert train(replace(RECIPE, epochs=1), small(), data, out=out, resume=True).result["epochs"] == 1
        assert not (out / ".lock").exists()
    finally:
        os.kill(loader, signal.SIGKILL)
        os.close(reading)
        os.close(writing)


# What --json names


def test_json_is_written_to_a_device_a_pipe_or_through_a_link(tmp_path):
    write_json("/dev/null", {"a": 1})
    with pytest.raises(InputError, match="No space left on device"):
        write_json("/dev/full", {"a": 1})
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)

    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(str(tmp_path / "pipe"), {"a": 1})
    assert json.loads(os.read(reading, 100)) == {"a": 1}
    os.close(reading)
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)

    (tmp_path / "link").symlink_to(tmp_path / "new.json")
    for value in (1, 2):
        write_json(str(tmp_path / "link"), {"a": value})
        assert json.loads((tmp_path / "new.json").read_text()) == {"a": value}
        assert (tmp_path / "link").is_symlink()


def test_a_folder_is_synced_after_a_rename(tmp_path, monkeypatch):
    real, synced = os.fsync, []

    def sync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    write_json(str(tmp_path / "a.json"), {})
    assert synced == [str(tmp_path / ".a.json.partial"), str(tmp_path)]


@pytest.mark.parametrize(
    "place", [*(place for place in PATHS if place is not _dangling and place is not _a_file), Path]
)
def test_json_at_a_place_that_can_be_no_file_gets_one_sentence(place, tmp_path):
    with pytest.raises(InputError, match="could not be written") as caught:
        write_json(str(place(tmp_path)), {})
    assert "\n" not in str(caught.value)
    assert "\0" not in str(caught.value)


# The user's own modules, devices and processes


def test_a_module_of_the_users_is_given_again_to_resume(data, tmp_path):
    recipe = replace(CRITICAL, epochs=3)
    whole = train(recipe, small(), data, out=tmp_path / "whole")
    real = loop.commit

    def dies(job, optimizer, metrics, selections):
        real(job, optimizer, metrics, selections)
        if len(metrics) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "commit", dies)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, small(), data, out=tmp_path / "run")
    run = train(recipe, small(), data, out=tmp_path / "run", resume=True)
    assert load_tensors(run.last)[1]["model"] is None
    assert same_tensors(run.last, whole.last)
    model = small()
    load_weights(run.last, model)
    assert torch.equal(model[0].weight, load_tensors(whole.last)[0]["0.weight"])


def test_the_network_goes_back_to_its_device(data, tmp_path, monkeypatch):
    """With no second device here, where it is moved is watched."""
    model, moved = small(), []
    real = nn.Module.to
    monkeypatch.setattr(nn.Module, "to", lambda self, *a, **k: (moved.append((a, k)), real(self, *a, **k))[1])
    train(replace(RECIPE, epochs=1), model, data, out=tmp_path / "run", device="cpu")
    assert moved[-1] == ((torch.device("cpu"),), {})
    assert moved[-2] == ((), {"memory_format": torch.contiguous_format})


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"device": "gpu"}, "no device 'gpu'"),
        ({"device": "meta"}, "The device meta does not compute"),
        ({"device": "cuda:99"}, "The device cuda:99 is not here"),
        ({"device": "cpu\n"}, "no device"),
        ({"workers": -1}, "workers is -1"),
        ({"workers": True}, "workers is True"),
    ],
    ids=str,
)
def test_a_device_that_is_not_here_gets_one_sentence(keys, says, data, tmp_path):
    with pytest.raises(InputError, match=says) as caught:
        train(RECIPE, small(), data, out=tmp_path / "run", **keys)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "environment",
    [
        {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},  # accelerate launch --cpu
        {"ACCELERATE_USE_CPU": "False", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},  # ... without a GPU
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "0"},  # and the process group, of one, is there already
    ],
    ids=str,
)
def test_a_launcher_that_started_too_few_processes_is_told(environment, monkeypatch):
    started(None)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match=r"The launcher was asked for .* processes"):
        started(None)


TWO = """
import os, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from dataclasses import replace
from small_runs import CRITICAL, small
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.training import saving
from clat.training.train import train
def full(job, *rest):
    raise InputError(f"The disk of {{job.processes.rank}} is full.")
data = Dataset(*torch.load({data!r}, weights_only=True), ("a", "b", "c"), "noise", "train")
codes = []
for rank in range(2):
    if os.fork() == 0:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT={port!r})
        lines = []
        for out in ({first!r}, {locked!r}, {full!r}):
            if out == {full!r}:
                saving.write_epoch = full
            try:
                run = train(CRITICAL, small(), data, out=out, resume=True)
                lines.append("trained " + str(run.environment["processes"]))
            except InputError as error:
                lines.append(str(error))
        with open({said!r} + str(rank), "w") as file:  # not standard output, which gloo writes to as well
            file.write("\\n".join(lines))
        os._exit(0)
print([os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)])
"""


def test_two_processes_lock_as_one_and_fail_as_one(data, tmp_path):
    """One folder is free, one is locked by this process, and in one the first process finds no space."""
    import socket

    torch.save((data.pixels, data.labels), tmp_path / "data.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = {key: str(tmp_path / key) for key in ("first", "locked", "full")}
    said_by = str(tmp_path / "said-")
    script = TWO.format(
        tests=os.path.dirname(__file__), data=str(tmp_path / "data.pt"), port=port, said=said_by, **places
    )
    with claim(Run(tmp_path / "locked"), resume=False, overwrite=False):
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            timeout=1200,  # a starved machine takes minutes to import torch
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.splitlines()
    assert said[-1] == "[0, 0]", done.stdout + done.stderr[-2000:]
    for rank in "01":
        own = Path(said_by + rank).read_text().splitlines()
        assert own[0] == "trained 2"
        assert own[1].startswith("Another process is training")
        assert own[2] == "The disk of 0 is full."


# Parameters that come and go


def test_a_parameter_that_appears_or_vanishes_is_named(plain):
    selection = Whole().select(plain, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), Threat())
    before = snapshot(plain)
    plain.late = nn.Parameter(torch.zeros(2))
    with pytest.raises(IntegrityError, match=r"late has appeared since the last check"):
        verify(plain, selection, before)
    del plain.late, plain.first_norm
    with pytest.raises(IntegrityError, match=r"first_norm\.\w+ is gone since the last check"):
        verify(plain, selection, before)
