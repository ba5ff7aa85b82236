"""The command line as a person meets it: what it prints, what it writes, and one sentence for every bad input."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from clat.checkpoint import load_tensors, save_checkpoint
from clat.cli.arguments import parse as parse_for
from clat.cli.commands import COMMANDS
from clat.cli.main import main
from clat.models import build_model
from clat.training.recipe import Recipe

TINY = ["--holdout", "200", "--batch-size", "64", "--threat.steps", "1", "--validation_steps", "1", "--health", "false"]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """The embedded data, but its first 600 training and 100 test images."""
    from clat.cli import shared

    real = shared.load_data

    def few(source, split="train", **options):
        data = real(source, split, **options)
        return data.subset(torch.arange(min(len(data), 600 if split == "train" else 100)))

    monkeypatch.setattr(shared, "load_data", few)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "net.safetensors"
    save_checkpoint(path, build_model("rn18", 10, channels=1, width=8))
    return str(path)


DATA = ["--data", "fashion-mnist-mini"]


def parse(arguments):
    return parse_for(arguments, COMMANDS)


def test_help_of_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    overview = capsys.readouterr().out
    assert all(name in overview for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        text = capsys.readouterr().out
        assert f"usage: clat {name}" in text
        assert "type: bool" not in text.split("Every setting")[0]  # switches need no value


def test_train_finetune_status_and_evaluate(tmp_path, capsys):
    base, tuned = str(tmp_path / "base"), str(tmp_path / "tuned")
    train = ["train", "pgd-at", "--model", "rn18,width=8", *DATA, "--out", base, "--epochs", "1", *TINY]
    assert main(train) == 0
    assert "Best epoch 1" in capsys.readouterr().out
    assert main(["finetune", "clat", "--from", base, *DATA, "--out", tuned, "--epochs=1", *TINY, "--critical.k=2"]) == 0
    assert "selected network." in capsys.readouterr().out
    written = yaml.safe_load((tmp_path / "tuned/recipe.yaml").read_text())
    assert written["critical"]["k"] == 2
    assert written["batch_size"] == 64

    assert main(["status", tuned, "--json", "-"]) == 0
    states = [layer["state"] for layer in json.loads(capsys.readouterr().out)]
    assert states.count("trained") == 2
    assert states.count("frozen") == 19
    assert main(["status", tuned]) == 0
    assert "trained" in capsys.readouterr().out

    out = tmp_path / "result.json"
    assert main(["evaluate", tuned, *DATA, "--limit", "50", "--steps", "2", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["clean"]["n"] == result["robust"]["n"] == 50
    assert result["eps"] == pytest.approx(8 / 255)
    assert len(result["attacks"]) == 5
    assert result["outcomes"].count(0) == result["robust"]["correct"]
    assert f"({result['robust']['correct']}/50)" in capsys.readouterr().out
    repeated = ["evaluate", tuned, *DATA, "--limit", "50", "--steps", "2", "--starts", "1", "--repeats", "3"]
    assert main([*repeated, "--json", "-"]) == 0
    runs = json.loads(capsys.readouterr().out)["repeats"]
    counts = [run["robust"]["correct"] for run in runs["runs"]]
    assert runs["lowest"]["correct"] == min(counts) >= runs["worst_case"]["correct"]
    assert [run["attacks"][0]["seed"] for run in runs["runs"]] == [0, 1000, 2000]

    assert main([*train, "--resume"]) == 0
    assert main(train) == 2
    assert main([*train, "--overwrite"]) == 0


@pytest.mark.parametrize("objective", ["pgd-at", "trades", "mart"])
def test_any_objective_tunes_the_critical_layers(objective, checkpoint, tmp_path, capsys):
    flags = ["--tuner", "critical", "--critical.k", "2", "--lr", "0.01", "--epochs", "1", *TINY, "--images", "128"]
    out = tmp_path / "run"
    assert main(["finetune", objective, "--from", checkpoint, *DATA, "--out", str(out), *flags]) == 0
    capsys.readouterr()
    assert main(["status", str(out), "--json", "-"]) == 0
    states = [layer["state"] for layer in json.loads(capsys.readouterr().out)]
    assert (states.count("trained"), states.count("frozen")) == (2, 19)
    terms = {"pgd-at": 1, "trades": 2, "mart": 2}[objective]
    entry = json.loads((out / "metrics.jsonl").read_text())
    assert sum(name.startswith("loss/") for name in entry) == terms


def test_layers_prints_a_ranking_and_writes_it(checkpoint, tmp_path, capsys):
    assert main(["layers", checkpoint, *DATA, "--batch", "10", "--json", str(tmp_path / "layers.json")]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "layers.json").read_text())["layers"]
    assert [row["rank"] for row in rows] == [*range(1, 18), None, None, None, None]
    ranked = [row["criticality"] for row in rows[:17]]
    assert ranked == sorted(ranked, reverse=True)
    assert all(row["name"].removeprefix("network.") in printed for row in rows)
    assert {row["note"] for row in rows[17:]} == {"shortcut", "head"}
    assert main(["layers", "rn18,width=8", *DATA, "--batch", "10", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 10


def test_layers_are_ranked_by_another_measure_under_its_name(checkpoint, tmp_path, capsys):
    flags = ["--batch", "10", "--ranking", "loss", "--json", str(tmp_path / "layers.json")]
    assert main(["layers", checkpoint, *DATA, *flags]) == 0
    found = json.loads((tmp_path / "layers.json").read_text())
    assert found["ranking"] == "loss"
    rises = [row["loss"] for row in found["layers"][:17]]
    assert rises == sorted(rises, reverse=True)
    assert "criticality" not in found["layers"][0]
    assert "highest loss first" in " ".join(capsys.readouterr().out.split())


def test_every_shipped_recipe_loads():
    from clat.training.recipe import recipe_path

    for path in recipe_path("clat").parent.glob("*.yaml"):
        _, values = parse(["train", path.stem, "--model", "rn18", *DATA, "--out", "x"])
        for key, value in yaml.safe_load(path.read_text()).items():
            stored = values["recipe"].keys()[key]
            assert isinstance(value, dict) or stored == value
        assert isinstance(values["recipe"], Recipe)


@pytest.mark.parametrize("scale", [["--scale", "small"], ["--scale=small"]])
def test_a_scale_lies_over_the_recipe_and_under_the_flags(scale):

    recipe = parse(["train", "trades", "--model", "rn18", *DATA, *scale, "--out", "x", "--images", "77"])[1]["recipe"]
    assert (recipe.objective.name, recipe.epochs, recipe.images, recipe.schedule) == ("trades", 3, 77, "cosine")


@pytest.mark.parametrize("method", ["pgd-at", "trades", "mart", "score", "awp"])
def test_a_protocol_lies_over_the_recipe_and_under_the_scale(method):
    def parsed(*flags):
        return parse(["train", method, "--model", "rn18", *DATA, "--out", "x", *flags])[1]["recipe"]

    clat, rift = parsed("--protocol", "clat"), parsed("--scale", "small", "--protocol=rift", "--seed", "5")
    assert (clat.threat.radius, clat.threat.step, clat.epochs, clat.schedule) == (0.03, 0.007, 50, "cosine")
    assert (rift.threat.radius, rift.threat.mode, rift.epochs, rift.schedule) == (8 / 255, "eval", 3, "cosine")
    assert (rift.weight_decay, rift.seed) == (5e-4, 5)
    assert clat.objective == rift.objective == parsed().objective
    assert parsed("--protocol", "rift").milestones == (101, 106)


def test_every_overlay_is_offered():
    from clat.cli.arguments import OVERLAYS
    from clat.training.recipe import recipe_path

    recipes = recipe_path("clat").parent
    assert {path.relative_to(recipes).with_suffix("").as_posix() for path in recipes.glob("*/*.yaml")} == {
        f"{kind}/{name}" for kind, names in OVERLAYS.items() for name in names
    }


def test_the_recipe_is_the_same_by_name_and_by_path():

    rest = ["--model", "rn18", *DATA, "--out", "x", "--threat.eps", "8/255"]
    by_path = parse(["train", "recipes/clat.yaml", *rest])[1]["recipe"]
    assert by_path == parse(["train", "clat", *rest])[1]["recipe"]
    assert by_path.threat.radius == 8 / 255


def foreign(path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, path)


def pickled(path):
    torch.save({"weight": torch.zeros(1)}, path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["trian"], "trian"),
        (["train"], "Name a recipe first"),
        (["train", "no-such"], "There is no recipe 'no-such'"),
        (["train", "pgd-at", *DATA, "--out", "OUT"], "model"),
        (["train", "pgd-at", "--model", "rn19", *DATA, "--out", "OUT"], "There is no model 'rn19'"),
        (["train", "pgd-at", "--model", "rn18,depth=3", *DATA, "--out", "OUT"], "depth"),
        (["train", "pgd-at", "--model", "rn18,width", *DATA, "--out", "OUT"], "key=value"),
        (["train", "pgd-at", "--model", "rn18", *DATA, "--out", "OUT", "--epocs", "3"], "epocs"),
        (["train", "pgd-at", "--model", "rn18", *DATA, "--out", "OUT", "--epochs", "many"], "many"),
        (["train", "pgd-at", "--model", "rn18", *DATA, "--out", "OUT", "--epochs", "0"], "1 or more"),
        (["train", "pgd-at", "--model", "rn18", *DATA, "--out", "OUT", "--threat.eps", "8"], "8/255"),
        (["train", "pgd-at", "--model", "rn18", *DATA, "--out", "OUT", "--clat.weight", "1"], "does not use clat"),
        (["train", "pgd-at", "--model", "rn18", *DATA, "--out", "OUT", "--holdout", "9999"], "held out"),
        (["train", "pgd-at", "--model", "rn18", "--data", "./nowhere", "--out", "OUT"], "no file or folder"),
        (["train", "pgd-at", "--model", "rn18", "--data", "fashion-mnist-mini,width=3", "--out", "OUT"], "size"),
        (["train", "BROKEN.yaml", "--model", "rn18", *DATA, "--out", "OUT"], "broken"),
        (["train", "UNKNOWN.yaml", "--model", "rn18", *DATA, "--out", "OUT"], "lamda"),
        (["train", "pgd-at", "--model", "rn18", *DATA, "--out", "OUT", "--scale", "tiny"], "no recipe 'scale/tiny'"),
        (["train", "pgd-at", "--model", "rn18", *DATA, "--out", "OUT", "--images", "0"], "1 or more"),
        (
            ["finetune", "clat", "--from", "nowhere", *DATA, "--out", "OUT"],
            "There is no model 'nowhere', and no checkpoint or run folder there",
        ),
        (
            ["finetune", "clat", "--from", "CHECKPOINT", *DATA, "--out", "OUT", "--critical.k", "99", *TINY],
            "from 1 to 17",
        ),
        (["evaluate", "PICKLE", *DATA], "not a readable safetensors file"),
        (["evaluate", "FOREIGN", *DATA], "was not written by clat"),
        (["evaluate", "CHECKPOINT"], "data"),
        (["evaluate", "CHECKPOINT", *DATA, "--split", "dev"], "no split 'dev'; it has train, test"),
        (["evaluate", "CHECKPOINT", *DATA, "--eps", "eight"], "not a number"),
        (["evaluate", "CHECKPOINT", *DATA, "--limit", "0"], "1 or more"),
        (["evaluate", "CHECKPOINT", *DATA, "--json", "/proc/x/y.json"], "could not be written"),
        (["layers", "CHECKPOINT", *DATA, "--batch", "0"], "at least one"),
        (["layers", "timm/nothing", *DATA], "nothing"),
        (["status", "nowhere"], "not a complete run folder"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(arguments, says, checkpoint, tmp_path, capsys):
    foreign(tmp_path / "foreign.safetensors")
    pickled(tmp_path / "model.pt")
    (tmp_path / "broken.yaml").write_text("epochs: [1")
    (tmp_path / "unknown.yaml").write_text("lamda: 1\n")
    paths = {
        "OUT": tmp_path / "out", "CHECKPOINT": checkpoint, "FOREIGN": tmp_path / "foreign.safetensors",
        "PICKLE": tmp_path / "model.pt", "BROKEN.yaml": tmp_path / "broken.yaml",
        "UNKNOWN.yaml": tmp_path / "unknown.yaml",
    }  # fmt: skip
    assert main([str(paths.get(argument, argument)) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("clat: ")
    assert printed.err.count("\n") == 1
    assert says in printed.err
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_was_cut_off_is_refused(checkpoint, tmp_path, capsys):
    whole = Path(checkpoint).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    assert main(["evaluate", str(tmp_path / "cut.safetensors"), *DATA]) == 2
    assert "not a readable safetensors file" in capsys.readouterr().err


def test_a_checkpoint_with_nan_weights_is_told(tmp_path, capsys):
    model = build_model("rn18", 10, channels=1, width=8)
    model.network.layer3[0].conv2.weight.data[0] = float("nan")
    save_checkpoint(tmp_path / "nan.safetensors", model)
    assert main(["layers", str(tmp_path / "nan.safetensors"), *DATA, "--batch", "5"]) == 2
    assert "not finite" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "nan.safetensors"), *DATA, "--limit", "5"]) == 2
    assert "not finite" in capsys.readouterr().err


def test_an_irregular_run_is_told(tmp_path, capsys):
    base = str(tmp_path / "base")
    assert main(["train", "pgd-at", "--model", "rn18,width=8", *DATA, "--out", base, "--epochs", "1", *TINY]) == 0
    entry = json.loads((tmp_path / "base/selections.jsonl").read_text())
    entry["layers"] = entry["layers"][1:]
    (tmp_path / "base/selections.jsonl").write_text(json.dumps(entry) + "\n")
    assert main(["status", base]) == 1
    printed = capsys.readouterr()
    assert "irregular" in printed.err
    assert "never selected, but network.conv1.weight moved" in " ".join(printed.out.split())


def test_the_holdout_warning(tmp_path, capsys):
    base = str(tmp_path / "base")
    assert main(["train", "pgd-at", "--model", "rn18,width=8", *DATA, "--out", base, "--epochs", "1", *TINY]) == 0
    other = [*TINY, "--holdout_seed", "5"]
    assert main(["finetune", "clat", "--from", base, *DATA, "--out", str(tmp_path / "t"), "--epochs", "1", *other]) == 0
    assert "has seen the validation images" in " ".join(capsys.readouterr().out.split())
    assert load_tensors(tmp_path / "t/last.safetensors")[1]["holdout"] == {"images": 200, "seed": 5}
