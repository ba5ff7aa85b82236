"""One unit of a comparison in a process of its own: python -m clat.cli.unit OUT ARM SEED, as clat compare starts it.

It trains by the very command that a user would give, with --resume, then evaluates. It ends when its parent does.
"""

import json
import os
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from clat.cli.main import main
from clat.cli.shared import checkpoint_named, data_named, device_named, network_named
from clat.compare.plan import Comparison
from clat.compare.run import start_of
from clat.compare.unit import Unit, check_folder, finish
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.files import parse_json, read_text
from clat.text import plain

PLAN = "plan.json"  # what clat compare tells its units: the comparison, and from its call data, model and device


def run(out: Path, arm: str, seed: int) -> int:
    """Trains what is not trained and evaluates; returns the exit code."""
    plan = parse_json(read_text(out / PLAN), out / PLAN)
    comparison = Comparison.from_json(plan["comparison"])
    unit = Unit(out, comparison.arm(arm), seed)

    @cache
    def load(split: str) -> Dataset:
        return data_named(plan["data"], split)

    def build(model: str) -> nn.Module:
        return network_named(model, load("train"))

    def opened(path: Path) -> nn.Module:
        return checkpoint_named(str(path), plan["model"])[0]

    try:
        if not unit.trained:
            more = ["--device", plan["device"]] if plan["device"] else []
            if code := main(unit.command(plan["data"], plan["model"], more)):
                return code
        check_folder(unit, load("train").digest(), start_of(unit, build))
        entry = finish(unit, comparison, load, opened, device=device_named(plan["device"]))
    except InputError as error:
        print(f"clat: {plain(' '.join(str(error).split()))}", file=sys.stderr, flush=True)
        return 2
    for found in entry["evaluations"]:
        counts = {key: found[key] for key in ("checkpoint", "attack", "clean", "robust")}
        print(json.dumps({**counts, "images": found["evaluation"]["images"]}), flush=True)
    return 0


def _end_with_parent() -> None:
    """The parent holds the other end of standard input, which closes when it ends, however it does."""

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock a thread may not hold when Python ends
            pass
        os._exit(130)

    threading.Thread(target=watch, daemon=True).start()


def _arguments() -> Any:
    out, arm, seed = sys.argv[1:]
    return Path(out), arm, int(seed)


if __name__ == "__main__":
    _end_with_parent()
    sys.exit(run(*_arguments()))
