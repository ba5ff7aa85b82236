"""A run folder: everything a run was told and everything it found, written so that a kill at any moment is harmless.

recipe.yaml            the resolved recipe
environment.json       data, model, versions, hardware, command
start.json             fingerprint of each tensor before the first step
metrics.jsonl          one line an epoch
selections.jsonl       one line a selection, with the criticality of every layer
last.safetensors       the network after the last finished epoch: writing it commits the epoch
best.safetensors       the network after the epoch with the best validation accuracy
optimizer-N.safetensors  the optimizer after epoch N, for --resume, with the network if ``last`` has it merged
result.json            the summary, once the run is finished
evaluations/           what clat evaluate found, a file an evaluation
"""

import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from clat.checkpoint import load_tensors
from clat.errors import InputError
from clat.files import write_text
from clat.tuners.selection import Selection

FILES = (
    *("recipe.yaml", "environment.json", "start.json", "metrics.jsonl", "selections.jsonl", "result.json"),
    *("last.safetensors", "best.safetensors"),
)


@dataclass(frozen=True)
class Run:
    """A run folder and what it holds."""

    folder: Path

    @property
    def last(self) -> Path:
        return self.folder / "last.safetensors"

    @property
    def best(self) -> Path:
        return self.folder / "best.safetensors"

    def optimizer(self, epoch: int) -> Path:
        return self.folder / f"optimizer-{epoch}.safetensors"

    @property
    def exists(self) -> bool:
        return (self.folder / "recipe.yaml").is_file()

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").is_file()

    @property
    def epoch(self) -> int:
        """The last finished epoch, 0 before the first."""
        return int(load_tensors(self.last)[1]["epoch"]) if self.last.is_file() else 0

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return self._lines("metrics.jsonl")

    @property
    def selections(self) -> list[Selection]:
        return [Selection.from_json(entry) for entry in self._lines("selections.jsonl")]

    @property
    def selected(self) -> list[str]:
        """The layers that were selected so far, each once."""
        return list(dict.fromkeys(name for selection in self.selections for name in selection.layers))

    @property
    def start(self) -> dict[str, str]:
        return json.loads(self._text("start.json"))

    @property
    def environment(self) -> dict[str, Any]:
        return json.loads(self._text("environment.json"))

    @property
    def recipe(self) -> dict[str, Any]:
        return yaml.safe_load(self._text("recipe.yaml"))

    @property
    def result(self) -> dict[str, Any]:
        return json.loads(self._text("result.json"))

    def write(self, name: str, content: Any) -> None:
        """Writes a JSON, JSONL or YAML file of the folder atomically."""
        if name.endswith(".yaml"):
            text = yaml.safe_dump(content, sort_keys=False)
        elif name.endswith(".jsonl"):
            text = "".join(json.dumps(entry) + "\n" for entry in content)
        else:
            text = json.dumps(content, indent=2) + "\n"
        write_text(self.folder / name, text)

    def claim(self, *, resume: bool, overwrite: bool) -> bool:
        """Makes sure that a run may write here; returns whether there is one to resume.

        A folder that a run was killed in before its recipe was written holds nothing to resume, and is free.

        Raises:
            InputError: there is a run already and neither flag is given, or a folder with other files
        """
        if self.exists and not (resume or overwrite):
            raise InputError(
                f"{self.folder} already holds a run; continue it with --resume, replace it with --overwrite, or choose "
                "another --out."
            )
        if self.folder.exists() and not (self.folder.is_dir() and all(map(self._is_own, self.folder.iterdir()))):
            raise InputError(f"{self.folder} holds other files than a run's; choose another --out.")
        return self.exists and resume

    def clear(self) -> None:
        """Removes the files of an earlier run, recipe first, and no others."""
        for path in [self.folder / FILES[0], *(self.folder.iterdir() if self.folder.is_dir() else ())]:
            if path.name == "evaluations":
                shutil.rmtree(path)
            elif self._is_own(path):
                path.unlink(missing_ok=True)

    @staticmethod
    def _is_own(path: Path) -> bool:
        name = path.name.removesuffix(".partial").removeprefix(".") if path.name.endswith(".partial") else path.name
        return name in (*FILES, "evaluations") or (name.startswith("optimizer-") and name.endswith(".safetensors"))

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def _text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text()
        except OSError as error:
            raise InputError(f"{self.folder} is not a complete run folder: it has no readable {name}.") from error


def environment(device: torch.device, processes: int = 1, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Versions, hardware and command of this process."""
    packages = ("torch-clat", "torch", "torchvision", "timm", "accelerate", "datasets", "safetensors")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(argv if argv is not None else sys.argv),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
