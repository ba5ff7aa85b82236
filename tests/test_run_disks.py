"""Full disks and interruptions while a run is written."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clat.cli.main import main
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.training import loop, saving
from clat.training.runs import Run
from clat.training.train import train
from conftest import same_tensors
from small_runs import RECIPE, noise, small


@pytest.fixture(scope="module")
def data() -> Dataset:
    return noise()


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
            raise KeyboardInterrupt  # not the signal: jobs in the background of a shell ignore it

        patch.setattr(loop, "commit", commit)
        assert main([*command, "--device", "cpu", "--workers", "0"]) == 130
    printed = capsys.readouterr()
    assert printed.err == "clat: Interrupted; a training run continues with --resume.\n"
    assert "(--precision fp32 --layout contiguous) on cpu, 1 process" in printed.out
    assert Run(tmp_path / "[/x]run").epoch == 1
    assert main([*command, "--resume"]) == 0
    assert Run(tmp_path / "[/x]run").epoch == 2
    assert "[/x]run" in capsys.readouterr().out
