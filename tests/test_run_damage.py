"""Run folders of which something is missing or damaged."""

import json
import shutil
from pathlib import Path

import pytest

from clat import checkpoint
from clat.cli.main import main
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.training import saving
from clat.training.runs import Run
from clat.training.train import train
from conftest import same_tensors
from small_runs import CRITICAL, contents, known, noise, refused, small


@pytest.fixture(scope="module")
def data() -> Dataset:
    return noise()


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
        ("metrics.jsonl", "train_robust", -0.1, "train_robust is not between 0 and 1"),
        ("metrics.jsonl", "train_images", 0.5, "train_images is no count"),
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


def test_a_line_with_some_of_the_training_accuracies_is_refused(copy, data):
    path = copy.folder / "metrics.jsonl"
    *lines, last = path.read_text().splitlines()
    kept = {key: value for key, value in json.loads(last).items() if key != "train_images"}
    path.write_text("\n".join([*lines, json.dumps(kept)]) + "\n")
    refused(
        "lacks some of train_clean, train_images, train_robust", CRITICAL, known(), data, out=copy.folder, resume=True
    )


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


@pytest.mark.parametrize("line", ["overwrite: true", "resume: true", "out: elsewhere", "model: rn18", "device: cpu"])
def test_a_recipe_file_gives_no_orders(line, copy, tmp_path, capsys):
    before = contents(copy.folder)
    (tmp_path / "recipe.yaml").write_text(f"epochs: 1\n{line}\n")
    rest = ["--model", "rn18,width=2", "--data", "fashion-mnist-mini", "--out", str(copy.folder)]
    assert main(["train", str(tmp_path / "recipe.yaml"), *rest]) == 2
    assert line.partition(":")[0] in capsys.readouterr().err
    assert contents(copy.folder) == before
