"""The demo, shortened: its table shows what its result file holds, and its sentence what the images say."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from clat.cli import demo
from clat.compare.statistics import unpack


def test_the_demo_prints_what_came_out(tmp_path, monkeypatch):
    real = demo.load_data
    few = {"train": 600, "test": 50}
    monkeypatch.setattr(demo, "load_data", lambda split: real(split=split).subset(torch.arange(few[split])))
    short = {"epochs": 2, "images": 100, "holdout": 100, "validation_steps": 1, "health": False}
    for name in ("PRETRAIN", "FURTHER", "CLAT"):
        monkeypatch.setattr(demo, name, replace(getattr(demo, name), **short))
    text = io.StringIO()
    out = tmp_path / "[/x]\x1b[2J"  # neither rich's markup nor a terminal's
    demo.run(out, console=Console(file=text, width=120))
    rows = json.loads((out / "demo.json").read_text())
    assert [row["clean"]["n"] for row in rows] == [50] * 6
    assert [row["checkpoint"] for row in rows] == ["best", "last"] * 3
    assert rows[0]["trainable"] == rows[0]["parameters"] == rows[2]["trainable"]
    assert 0 < rows[4]["trainable"] < 0.2 * rows[4]["parameters"]
    printed = " ".join(text.getvalue().split())
    for row in rows:
        assert f"{100 * row['robust']['accuracy']:.1f} [" in printed
        assert unpack(row["right"]).sum() == row["robust"]["correct"]
        assert f"{row['trainable']:,}" in printed
        assert row["run"].replace("\x1b", "\\x1b") in printed
    assert demo.meaning(*[unpack(row["right"]) for row in rows[2:]]) in printed
    assert printed.count("Best epoch ") == 3
    assert "selected network." in printed


def right(count: int) -> np.ndarray:
    return np.arange(200) < count


@pytest.mark.parametrize(
    ("pgd_best", "pgd_last", "clat_best", "clat_last", "says"),
    [
        (120, 100, 121, 119, "PGD-AT overfitted: from its best epoch to its last it lost 10.0 points (p < 0.001) of "
         "robust accuracy, and CLAT lost 1.0 points (p 0.500, may be chance); at the last epoch CLAT is ahead by 9.5 "
         "points (p < 0.001), and at the best ahead by 0.5 points (p 1.000, may be chance)."),
        (100, 97, 90, 110, "PGD-AT did not overfit by more than chance: from its best epoch to its last it lost 1.5 "
         "points (p 0.250, may be chance) of robust accuracy, and CLAT gained 10.0 points (p < 0.001); at the last "
         "epoch CLAT is ahead by 6.5 points (p < 0.001), and at the best behind by 5.0 points (p 0.002)."),
        (100, 120, 100, 100, "PGD-AT did not overfit by more than chance: from its best epoch to its last it gained "
         "10.0 points (p < 0.001) of robust accuracy, and CLAT gained 0.0 points (p 1.000, may be chance); at the last "
         "epoch CLAT is behind by 10.0 points (p < 0.001), and at the best ahead by 0.0 points (p 1.000, may be "
         "chance)."),
    ],
)  # fmt: skip
def test_the_sentence_is_what_the_images_say(pgd_best, pgd_last, clat_best, clat_last, says):
    assert demo.meaning(*map(right, (pgd_best, pgd_last, clat_best, clat_last))) == says
