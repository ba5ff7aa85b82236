"""The demo, shortened: its table shows what its result file holds."""

import io
import json
from dataclasses import replace

import torch
from rich.console import Console

from clat.cli import demo


def test_the_demo_prints_what_came_out(tmp_path, monkeypatch):
    real = demo.load_data
    few = {"train": 600, "test": 50}
    monkeypatch.setattr(demo, "load_data", lambda split: real(split=split).subset(torch.arange(few[split])))
    short = {"epochs": 1, "holdout": 100, "validation_steps": 1, "health": False}
    for name in ("PRETRAIN", "FURTHER", "CLAT"):
        monkeypatch.setattr(demo, name, replace(getattr(demo, name), **short))
    text = io.StringIO()
    out = tmp_path / "[/x]\x1b[2J"  # neither rich's markup nor a terminal's
    demo.run(out, console=Console(file=text, width=120))
    rows = json.loads((out / "demo.json").read_text())
    assert [row["clean"]["n"] for row in rows] == [50, 50, 50]
    assert rows[0]["trainable"] == rows[0]["parameters"] == rows[2]["trainable"]
    assert 0 < rows[1]["trainable"] < 0.2 * rows[1]["parameters"]
    for row in rows:
        assert f"{100 * row['robust']['accuracy']:.1f} [" in text.getvalue()
        assert f"{row['trainable']:,}" in text.getvalue()
        assert row["run"].replace("\x1b", "\\x1b") in text.getvalue()
    assert "selected network." in text.getvalue()
