"""Strength sweeps: closed forms, where a curve rises, and the picture."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from clat.checkpoint import save_checkpoint
from clat.cli import main as cli
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.evaluation.accuracy import Accuracy
from clat.evaluation.measured import Identity, Measured
from clat.evaluation.sweep import Curve, Point, sweep
from clat.models import build_model
from clat.report.pictures import draw_curves


class Brightness(nn.Module):
    """Class 1 if the mean pixel is above a half."""

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], 1)


@pytest.fixture
def levels() -> Dataset:
    """Even grey, 1.5, 3.5, 6.5, 9.5 and 30.5 levels below the threshold of 127.5, and one that is misclassified."""
    grey = torch.tensor([126, 124, 121, 118, 97, 140], dtype=torch.uint8)
    labels = torch.zeros(6, dtype=torch.long)
    return Dataset(grey.view(-1, 1, 1, 1).repeat(1, 1, 32, 32), labels, ("dark", "bright"), "levels", "test")


def counts(curve: Curve) -> list[int]:
    return [point.accuracy.correct for point in curve.points]


def test_over_eps_in_closed_form(levels):
    curve = sweep(Brightness(), levels, "eps", [8 / 255, 0, 2 / 255, 5 / 255, 32 / 255, 5 / 255])
    assert [round(point.eps * 255) for point in curve.points] == [0, 2, 5, 8, 32]
    assert counts(curve) == [5, 4, 3, 2, 0]
    assert {point.accuracy.n for point in curve.points} == {6}
    assert curve.rises == []


def test_over_steps_in_closed_form(levels):
    """From a uniform start, k steps of 2 grey levels, clipped at 8, move the mean by 2k - k^2/8: 1.9, 4.9, 8."""
    found = sweep(Brightness(), levels, "steps", [20, 1, 3], eps="8/255")
    assert [point.steps for point in found.points] == [1, 3, 20]
    assert counts(found) == [4, 3, 2]


def curve(over, correct, **keys) -> Curve:
    strengths = [(2**place * (place > 0) / 255, 10) if over == "eps" else (8 / 255, 2**place) for place in range(9)]
    points = [Point(*strength, Accuracy(count, 50)) for strength, count in zip(strengths, correct, strict=False)]
    measured = Measured(
        images=50,
        data="d",
        split="test",
        networks=(Identity(model="m", structure="s", weights="w", layout="contiguous"),),
        seed=0,
        precision="fp32",
        batch_size=50,
        device="cpu",
        versions={},
    )
    return Curve(over=over, points=tuple(points), **{"norm": "linf", "measured": measured, **keys})


def test_where_a_curve_rises():
    rising = curve("steps", [40, 30, 31, 31, 20, 25])
    assert [(weak.steps, strong.steps) for weak, strong in rising.rises] == [(2, 4), (16, 32)]
    assert rising.to_json()["rises"] == [[2, 4], [16, 32]]


@pytest.mark.parametrize(
    ("over", "strengths", "says"),
    [
        ("eps", [], "nothing to sweep over"),
        ("eps", [0.0], "nothing to sweep over"),
        ("eps", [-0.1, 0.1], "must be a positive number"),
        ("eps", [8.0], "8/255"),
        ("steps", [1, 2.5], "whole"),
        ("steps", [-1, 2], "0 or more"),
    ],
)
def test_bad_strengths_are_refused(over, strengths, says, levels):
    with pytest.raises(InputError, match=says):
        sweep(Brightness(), levels, over, strengths)


def test_a_sweep_goes_on_from_its_record(levels, tmp_path):
    seen = []

    def interrupt(now):
        seen.append(now)
        if len(seen) == 3:
            raise KeyboardInterrupt

    arguments = (Brightness(), levels, "eps", [0, 2 / 255, 8 / 255])
    whole = sweep(*arguments, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        sweep(*arguments, batch_size=2, record=tmp_path, progress=interrupt)
    seen.clear()
    resumed = sweep(*arguments, batch_size=2, record=tmp_path, progress=seen.append)
    assert resumed == whole
    assert len(seen) == 3  # of six batches; there are three an attack


def test_the_picture_shows_every_network_and_strength(tmp_path):
    eps = {"CLAT": curve("eps", [45, 44, 40, 30, 10]), "PGD-AT": curve("eps", [46, 43, 38, 25, 5])}
    steps = {"CLAT": curve("steps", [44, 42, 41, 40]), "PGD-AT": curve("steps", [43, 40, 38, 38])}
    draw_curves([eps, steps], tmp_path / "both.svg")
    drawn = set(re.findall("<!-- (.*?) -->", (tmp_path / "both.svg").read_text()))
    assert {"CLAT", "PGD-AT", "eps (grey levels of 255)", "steps, each eps / 4 long", "PGD-10, linf"} < drawn
    assert {"accuracy (%) on 50 images", "PGD, linf eps 8/255", "0", "1", "2", "4", "8", "16", "100"} < drawn
    draw_curves([{"CLAT": curve("eps", [45, 44], norm="l2")}], tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match=r"end it with one of \.png"):
        draw_curves([eps], tmp_path / "both.jpeg")
    with pytest.raises(InputError, match="could not be written"):
        draw_curves([eps], tmp_path / "one.png" / "both.png")


def test_matplotlib_is_not_imported_before_a_picture_is_asked_for(tmp_path):
    """In a process of its own: all of clat is imported, and a sweep without a picture prints its table."""
    code = """
import importlib, pkgutil, sys
import clat
from clat.cli.main import main
for module in pkgutil.walk_packages(clat.__path__, "clat."):
    if module.name != "clat.__main__":
        importlib.import_module(module.name)
common = ["sweep", "rn18,width=2", "--data", "fashion-mnist-mini", "--limit", "2", "--over-eps", "8/255"]
common += ["--over-steps", "none", "--steps", "1"]
assert main(common) == 0
assert "matplotlib" not in sys.modules
assert main([*common, "--picture", "one.png"]) == 0
assert "matplotlib" in sys.modules
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command(tmp_path, capsys):
    names = [str(tmp_path / name / "best.safetensors") for name in ("a", "b")]
    for name in names:
        save_checkpoint(name, build_model("rn18", 10, channels=1, width=8))
    data = ["--data", "fashion-mnist-mini", "--limit", "10"]
    out, picture = tmp_path / "sweep.json", tmp_path / "sweep.png"
    arguments = ["sweep", *names, *data, "--over-eps", "0,8/255", "--over-steps", "1,3", "--steps", "2"]
    assert cli.main([*arguments, "--json", str(out), "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert list(found) == ["eps", "steps"]
    assert list(found["eps"]) == names
    for each in found.values():
        for line in each.values():
            assert all(f"({point['correct']})" in printed for point in line["points"])
    assert [point["steps"] for point in found["steps"][names[0]]["points"]] == [1, 3]
    assert picture.is_file()
    assert len(list((tmp_path / "a" / "evaluations").iterdir())) == 3

    assert cli.main([*arguments[:-2], "--over-steps", "none", "--json", "-"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["eps"]

    for more, says in (
        (["--picture", "sweep.bmp"], ".png"),
        (["--over-eps", "none", "--over-steps", "none"], "Both curves"),
        (["--over-eps", "8"], "8/255"),
        (["--over-steps", "1.5"], "whole"),
        (["--over-eps", "much"], "not a number"),
    ):
        assert cli.main([*arguments, *more]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
