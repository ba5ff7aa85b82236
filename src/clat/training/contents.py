"""What the files of a run folder must hold. Each function reads the text of one; what is wrong is a ValueError."""

import math
import re
from dataclasses import fields
from typing import Any

from clat.criticality import LayerScore
from clat.files import parse_json, parse_yaml
from clat.text import plain
from clat.training.recipe_files import renewed
from clat.tuners.selection import Selection

ADDED = {  # keys of a recipe that the runs of earlier versions lack
    "accumulate",
    "class_weights",
    "label_smoothing",
    "mixup",
    "patience",
    "recompute",
    "train_sample",
    "validation_eps",
    "validation_step",
    "warm_start",
    "warmup",
}
FITTED = {"train_clean", "train_robust", "train_images"}  # all or none of them is in a line


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and least <= value <= most


def _count(value: Any, least: int = 0) -> bool:
    return type(value) is int and value >= least


def _mapping(content: Any) -> dict[str, Any]:
    _require(isinstance(content, dict) and all(isinstance(key, str) for key in content), "it holds no keys and values")
    return content


def _sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _lines(text: str) -> list[dict[str, Any]]:
    _require(not text or text.endswith("\n"), "its last line is cut")
    return [_mapping(parse_json(line, f"line {i}", "entry")) for i, line in enumerate(text.split("\n")[:-1], 1)]


def epoch_of(facts: dict[str, Any]) -> int:
    _require(_count(facts["epoch"], 1), "its epoch is no number from 1 on")
    return int(facts["epoch"])


def read_metrics(text: str) -> list[dict[str, Any]]:
    entries = _lines(text)
    for epoch, entry in enumerate(entries, 1):
        _require(entry["epoch"] == epoch and _count(entry["epoch"]), f"line {epoch} is not that of epoch {epoch}")
        _accuracies(entry, f"line {epoch}: ")
        fitted = FITTED & entry.keys()
        _require(len(fitted) in (0, len(FITTED)), f"line {epoch} lacks some of {', '.join(sorted(FITTED))}")
        for key in ("validation_images", "trainable", *(fitted & {"train_images"})):
            _require(_count(entry[key]), f"line {epoch}: {key} is no count")
        for key, value in entry.items():
            _require(_number(value), f"line {epoch}: {plain(key)} is no finite number")
        _require(entry["seconds"] >= 0 and "loss" in entry, f"line {epoch}: no loss, or seconds below 0")
    return entries


def _accuracies(entry: dict[str, Any], where: str = "") -> None:
    for key in ("clean", "robust", *({"probe", "train_clean", "train_robust"} & entry.keys())):
        _require(_number(entry[key], 0, 1), f"{where}{key} is not between 0 and 1")


def read_selections(text: str) -> list[Selection]:
    names = tuple(field.name for field in fields(LayerScore))
    entries = _lines(text)
    for line, entry in enumerate(entries, 1):
        _require(_count(entry["epoch"], 1), f"line {line}: epoch is no number from 1 on")
        for key in ("layers", "trainable", "training"):
            listed = isinstance(entry[key], list) and all(isinstance(name, str) for name in entry[key])
            _require(listed, f"line {line}: {key} is no list of names")
        _require(isinstance(entry["scores"], list), f"line {line}: scores is no list")
        for score in entry["scores"]:
            _require(isinstance(score, dict) and set(score) == set(names), f"line {line}: a score is no layer's")
            _require(isinstance(score["name"], str), f"line {line}: a score has no layer's name")
            _require(score["index"] is None or _count(score["index"]), f"line {line}: a layer's index is no number")
            values = (score["weakness"], score["criticality"], score["parameters"])
            _require(all(type(value) in (int, float) for value in values), f"line {line}: a score is no number")
    epochs = [entry["epoch"] for entry in entries]
    _require(epochs == sorted(set(epochs)), "its epochs do not ascend")
    return [Selection.from_json(entry) for entry in entries]


def read_start(text: str) -> dict[str, str]:
    content = _mapping(parse_json(text, "it"))
    _require(bool(content) and all(map(_sha256, content.values())), "it holds no fingerprints")
    return content


def read_environment(text: str) -> dict[str, Any]:
    content = _mapping(parse_json(text, "it"))
    _require(_sha256(_mapping(content["data"])["sha256"]), "the digest of the data is no digest")
    if content.get("extra") is not None:
        _require(_sha256(_mapping(content["extra"])["sha256"]), "the digest of the extra data is no digest")
    return content


def read_recipe(text: str) -> dict[str, Any]:
    content = _mapping(parse_yaml(text, "it", "recipe"))
    _require(content["precision"] in ("fp32", "bf16"), "precision is neither fp32 nor bf16")
    content = {"layout": "contiguous", **renewed(content)}  # of a run before there was a choice
    _require(content["layout"] in ("contiguous", "channels-last"), "layout is neither contiguous nor channels-last")
    return content


def read_result(text: str) -> dict[str, Any]:
    content = _mapping(parse_json(text, "it"))
    for key in ("best", "last"):
        _accuracies(_mapping(content[key]))
        _require(_count(content[key]["epoch"], 1), f"the epoch of {key} is no number from 1 on")
    for key in ("epochs", "trainable", "parameters"):
        _require(_count(content[key]), f"{key} is no count")
    _require(_number(content["seconds"], 0), "seconds is no number")
    return content
