"""Run folders: what is in the way, missing or damaged, full disks, who else trains there, devices and processes."""

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

from clat import checkpoint
from clat.checkpoint import load_tensors, load_weights
from clat.cli.main import main
from clat.cli.shared import write_json
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.models import build_model
from clat.network import snapshot
from clat.objectives import Clean
from clat.threat import Threat
from clat.training import loop, saving
from clat.training.claims import claim
from clat.training.integrity import IntegrityError, verify
from clat.training.processes import started
from clat.training.recipe import Recipe
from clat.training.runs import Run
from clat.training.train import train
from clat.tuners import Critical, Whole
from conftest import same_tensors

RECIPE = Recipe(
    objective=Clean(), epochs=3, batch_size=32, lr=0.02, holdout=20, validation_steps=1, health=False, precision="fp32",
    threat=Threat(eps=0.1, step=0.05, steps=1), layout="contiguous",
)  # fmt: skip
CRITICAL = replace(RECIPE, tuner=Critical(every=2))


@pytest.fixture(scope="module")
def data() -> Dataset:
    torch.manual_seed(0)
    pixels = torch.randint(0, 255, (84, 1, 8, 8), dtype=torch.uint8)
    return Dataset(pixels, torch.arange(84) % 3, ("a", "b", "c"), "noise", "train")


def small() -> nn.Module:
    """A network that build_model did not make."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


def known() -> nn.Module:
    torch.manual_seed(0)
    return build_model("rn18", 3, channels=1, width=2, mean=[0.3], std=[0.2])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(message: str, *arguments, **keys) -> str:
    """Trains, which must end in one sentence that holds the message and change nothing in the folder."""
    before = contents(keys["out"])
    with pytest.raises(InputError, match=message) as caught:
        train(*arguments, **keys)
    assert contents(keys["out"]) == before
    said = str(caught.value)
    assert "\n" not in said
    assert said.endswith(".")
    return said


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


# What is missing or damaged


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Run:
    return train(CRITICAL, known(), data, out=tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def copy(finished, tmp_path) -> Run:
    shutil.copytree(finished.folder, tmp_path / "copy")
    return Run(tmp_path / "copy")


def _missing(path: Path) -> None:
    path.unlink()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _cut_by_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _a_list(path: Path) -> None:
    path.write_text("[1, 2]\n")


def _a_word(path: Path) -> None:
    path.write_text('"metrics"\n')


def _other_keys(path: Path) -> None:
    path.write_text('{"epoch": 1, "best": 1, "data": 1, "precision": "fp32"}\n')


def _not_utf8(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00\x81")


def _nested(path: Path) -> None:
    path.write_text("[" * 100_000 + "\n")


def _a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _a_loop_of_links(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


TEXTS = ["recipe.yaml", "start.json", "environment.json", "metrics.jsonl", "selections.jsonl", "result.json"]
TENSORS = ["optimizer-3.safetensors", "last.safetensors", "best.safetensors"]
DAMAGES = [
    _missing, _empty, _cut, _a_list, _a_word, _other_keys, _not_utf8, _nested, _a_folder, _a_loop_of_links,
]  # fmt: skip
JSONL = [("metrics.jsonl", _cut_by_a_byte), ("selections.jsonl", _cut_by_a_byte)]
has_digest = pytest.mark.skipif(not hasattr(checkpoint, "DamagedError"), reason="checkpoints without a digest")
TABLE = [
    *((name, damage) for name in (*TEXTS, *TENSORS) for damage in DAMAGES),
    *JSONL,
    *(pytest.param(name, _flipped, marks=has_digest) for name in TENSORS),
]


def _named(value: object) -> str:
    return value if isinstance(value, str) else value.__name__.strip("_")


@pytest.mark.parametrize(("name", "damage"), TABLE, ids=_named)
def test_a_damaged_run_is_refused_by_name_or_mended(name, damage, finished, copy, data):
    damage(copy.folder / name)
    best_is_last = finished.result["best"]["epoch"] == 3
    if name == "result.json" or (name == "best.safetensors" and best_is_last):
        if damage in (_a_folder, _a_loop_of_links):
            with pytest.raises(InputError, match=f"{name} could not be written"):
                train(CRITICAL, known(), data, out=copy.folder, resume=True)
            return
        train(CRITICAL, known(), data, out=copy.folder, resume=True)
        assert copy.result == finished.result
        assert same_tensors(copy.best, finished.best)
        return
    with pytest.raises(InputError) as caught:
        train(CRITICAL, known(), data, out=copy.folder, resume=True)
    said = str(caught.value)
    assert name in said
    assert "\n" not in said
    assert "complete run folder" in said or (name == "recipe.yaml" and damage is _a_folder)
    if name == "recipe.yaml" and damage in (_missing, _a_folder, _a_loop_of_links):
        assert "choose another --out" in said
    elif name == "last.safetensors":
        assert "best.safetensors holds epoch" in said
        assert "clat finetune RECIPE --from" in said
    elif name.startswith("optimizer"):
        assert "last.safetensors holds the weights of epoch 3" in said
    else:
        assert "put it back from a copy" in said


@pytest.mark.parametrize(
    ("name", "key", "value", "says"),
    [
        ("metrics.jsonl", "robust", 1.5, "robust is not between 0 and 1"),
        ("metrics.jsonl", "clean", "all", "clean is not between 0 and 1"),
        ("metrics.jsonl", "clean", 0.125, "another accuracy of epoch 3"),
        ("metrics.jsonl", "epoch", 2, "not that of epoch 3"),
        ("metrics.jsonl", "epoch", True, "not that of epoch 3"),
        ("metrics.jsonl", "loss", float("nan"), "loss is no finite number"),
        ("metrics.jsonl", "trainable", -1, "trainable is no count"),
        ("selections.jsonl", "epoch", 2, r"holds the selections of epochs \[1, 2\] and not those of \[1, 3\]"),
        ("selections.jsonl", "epoch", 1, "do not ascend"),
        ("selections.jsonl", "layers", "conv1", "layers is no list of names"),
        ("selections.jsonl", "trainable", ["no.such"], "has no parameter"),
        ("selections.jsonl", "training", ["no.such"], "does not fit the network"),
        ("selections.jsonl", "scores", [{"name": "x"}], "a score is no layer's"),
    ],
)
def test_an_edited_line_is_noticed(name, key, value, says, copy, data):
    *lines, last = (copy.folder / name).read_text().splitlines()
    (copy.folder / name).write_text("\n".join([*lines, json.dumps({**json.loads(last), key: value})]) + "\n")
    said = refused(says, CRITICAL, known(), data, out=copy.folder, resume=True)
    assert name in said


@pytest.mark.parametrize(
    ("name", "key", "value", "says"),
    [
        ("recipe.yaml", "precision", "int8", "precision is neither"),
        ("recipe.yaml", "layout", ["x"], "layout is neither"),
        ("environment.json", "data", {"sha256": 7}, "digest"),
        ("environment.json", "extra", 7, "keys and values"),
        ("start.json", "conv1.weight", "0", "no fingerprints"),
    ],
)
def test_an_edited_key_is_noticed(name, key, value, says, copy, data):
    content = copy.recipe if name == "recipe.yaml" else json.loads((copy.folder / name).read_text())
    copy.write(name, {**content, key: value})
    assert name in refused(says, CRITICAL, known(), data, out=copy.folder, resume=True)


def test_metrics_without_their_last_epoch_are_refused(copy, data):
    copy.write("metrics.jsonl", copy.metrics[:2])
    refused(
        "ends with epoch 2, but last.safetensors holds epoch 3", CRITICAL, known(), data, out=copy.folder, resume=True
    )


def test_a_best_that_cannot_be_had_again_is_missed(data, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "best_epoch", lambda metrics, recipe: min(2, len(metrics)))
    run = train(CRITICAL, known(), data, out=tmp_path / "run")
    held = run.best.read_bytes()
    run.best.unlink()
    refused(
        "best.safetensors is missing, and epoch 2 is the best", CRITICAL, known(), data, out=run.folder, resume=True
    )
    shutil.copy(run.last, run.best)
    refused("best.safetensors holds another epoch", CRITICAL, known(), data, out=run.folder, resume=True)
    run.best.write_bytes(held)
    train(CRITICAL, known(), data, out=run.folder, resume=True)


def test_what_is_mended_is_said(copy, data, capsys):
    from rich.console import Console

    (copy.folder / "result.json").unlink()
    train(CRITICAL, known(), data, out=copy.folder, resume=True, console=Console(width=120))
    assert "result.json is missing or damaged; written again from metrics.jsonl" in capsys.readouterr().out


def test_another_network_cannot_take_a_run_over(copy, data):
    refused("began with another network", CRITICAL, small(), data, out=copy.folder, resume=True)


@pytest.mark.parametrize("damage", DAMAGES, ids=_named)
@pytest.mark.parametrize("name", ["start.json", "selections.jsonl", "last.safetensors", "recipe.yaml"])
def test_status_of_a_damaged_run_ends_in_its_table_or_one_sentence(name, damage, copy, capsys):
    damage(copy.folder / name)
    code = main(["status", str(copy.folder)])
    printed = capsys.readouterr()
    if name == "recipe.yaml":  # which it does not need
        assert code == 0
        return
    assert code == 2 or (code == 1 and name == "selections.jsonl")  # without selections, what moved is irregular
    assert printed.err.startswith("clat: ")
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    assert code == 1 or name in printed.err


def test_status_names_a_layer_that_the_network_has_not(copy, capsys):
    *lines, last = (copy.folder / "selections.jsonl").read_text().splitlines()
    entry = {**json.loads(last), "layers": ["no.such"]}
    (copy.folder / "selections.jsonl").write_text("\n".join([*lines, json.dumps(entry)]) + "\n")
    assert main(["status", str(copy.folder)]) == 2
    assert "names no.such, which is no layer of the network" in capsys.readouterr().err


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


# Full disks and interruptions


FILES = ["start", "environment", "recipe", "optimizer-2", "selections", "metrics", "last", "best", "result"]


def _last_is_best(metrics, _):
    return metrics[-1]["epoch"]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "best_epoch", _last_is_best)
        return train(replace(RECIPE, epochs=2), small(), data, out=tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("name", FILES)
def test_a_disk_that_fills_up_anywhere_loses_nothing(name, call, whole, data, tmp_path, monkeypatch):
    """The disk is full while the file is written, synced or renamed, in the last epoch that writes it."""
    recipe = replace(RECIPE, epochs=2)
    monkeypatch.setattr(saving, "best_epoch", _last_is_best)
    run = Run(tmp_path / "run")
    real = {"write": Path.write_bytes, "text": Path.write_text, "fsync": os.fsync, "replace": os.replace}
    time = 2 if name in ("selections", "metrics", "last", "best") else 1
    seen = []

    def hit(path: object) -> bool:
        if f"/.{name}" in str(path) and str(path).endswith(".partial") and str(run.folder) in str(path):
            seen.append(path)
        return len(seen) == time

    def full() -> None:
        raise OSError(28, "No space left on device")

    def write(path, content):
        if hit(path):
            real["write"](path, content[: len(content) // 2])
            full()
        real["write"](path, content)

    def text(path, content, encoding=None):
        if hit(path):
            real["text"](path, content[: len(content) // 2], encoding=encoding)
            full()
        real["text"](path, content, encoding=encoding)

    def sync(descriptor):
        return full() if hit(os.readlink(f"/proc/self/fd/{descriptor}")) else real["fsync"](descriptor)

    def rename(source, target):
        return full() if hit(source) else real["replace"](source, target)

    with monkeypatch.context() as patch:
        if call == "write":
            patch.setattr(Path, "write_bytes", write)
            patch.setattr(Path, "write_text", text)
        else:
            patch.setattr(os, call, sync if call == "fsync" else rename)
        with pytest.raises(InputError, match="No space left on device"):
            train(recipe, small(), data, out=run.folder)
    assert seen
    assert not list(tmp_path.rglob(".*"))
    if name in FILES[3:]:
        assert run.epoch == (2 if name in ("best", "result") else 1)
    train(recipe, small(), data, out=run.folder, resume=True)
    assert same_tensors(run.last, whole.last)
    assert same_tensors(run.best, whole.best)
    assert {**run.result, "seconds": 0, "best": 0, "last": 0} == {**whole.result, "seconds": 0, "best": 0, "last": 0}


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk")
def test_a_disk_that_is_really_full_loses_nothing(data, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount here")
    try:
        (disk / "filler").write_bytes(bytes(44 * 1024))
        with pytest.raises(InputError, match="No space left on device"):
            train(RECIPE, small(), data, out=disk / "run")
        (disk / "filler").unlink()
        run = train(RECIPE, small(), data, out=disk / "run", resume=True)
        assert same_tensors(run.last, train(RECIPE, small(), data, out=tmp_path / "whole").last)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_ctrl_c_in_training_ends_with_130_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    from clat.cli import shared

    real = shared.load_data
    monkeypatch.setattr(
        shared, "load_data", lambda name, split, **options: real(name, split, **options).subset(torch.arange(80))
    )
    command = [
        "train", "pgd-at", "--model", "rn18,width=2", "--data", "fashion-mnist-mini", "--out",
        str(tmp_path / "[/x]run"), "--epochs", "2", "--holdout", "20",
        "--batch_size", "30", "--threat.steps", "1", "--validation_steps", "1",
        "--health", "false", "--precision", "fp32", "--layout", "contiguous",
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        once = loop.commit

        def commit(*arguments):
            once(*arguments)
            signal.raise_signal(signal.SIGINT)

        patch.setattr(loop, "commit", commit)
        assert main([*command, "--device", "cpu", "--workers", "0"]) == 130
    printed = capsys.readouterr()
    assert printed.err == "clat: Interrupted; a training run continues with --resume.\n"
    assert "(--precision fp32 --layout contiguous) on cpu, 1 process" in printed.out
    assert Run(tmp_path / "[/x]run").epoch == 1
    assert main([*command, "--resume"]) == 0
    assert Run(tmp_path / "[/x]run").epoch == 2
    assert "[/x]run" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["overwrite: true", "resume: true", "out: elsewhere", "model: rn18", "device: cpu"])
def test_a_recipe_file_gives_no_orders(line, copy, tmp_path, capsys):
    before = contents(copy.folder)
    (tmp_path / "recipe.yaml").write_text(f"epochs: 1\n{line}\n")
    rest = ["--model", "rn18,width=2", "--data", "fashion-mnist-mini", "--out", str(copy.folder)]
    assert main(["train", str(tmp_path / "recipe.yaml"), *rest]) == 2
    assert line.partition(":")[0] in capsys.readouterr().err
    assert contents(copy.folder) == before


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
from test_run_doors import CRITICAL, small
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
