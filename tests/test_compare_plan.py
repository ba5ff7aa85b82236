"""Comparison files: what they say, what a scale lays over it, and what is refused in one sentence."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from clat.cli import compare as command
from clat.cli.arguments import read
from clat.cli.main import main
from clat.compare.file import comparison, comparison_path, load_comparison
from clat.compare.plan import Comparison
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.training.recipe import Recipe

FOLDER = Path(__file__).parents[1] / "comparisons"
WHOLE = {
    "question": "Which?",
    "keys": {"epochs": 2, "threat": {"eps": "8/255", "steps": 3}},
    "base": {"model": "rn18,width=2", "recipe": "pgd-at"},
    "arms": {
        "second": {"recipe": "pgd-at", "from": "first/last"},
        "first": {"recipe": "clat", "from": "base/best", "keys": {"threat": {"steps": 5}, "critical": {"k": 2}}},
        "scratch": {"recipe": "trades"},
    },
    "evaluation": {"tier": "quick", "eps": "4/255", "images": 100, "of": "test"},
    "contrasts": [["first", "second"], ["first", "base"]],
    "seeds": [3, 4],
}


def changed(*where, to):
    """WHOLE with the entry at this place changed, or removed if ``to`` is None."""
    content = yaml.safe_load(yaml.safe_dump(WHOLE, sort_keys=False))
    inner = content
    for key in where[:-1]:
        inner = inner[key]
    if to is None:
        del inner[where[-1]]
    else:
        inner[where[-1]] = to
    return content


def test_a_file_says_what_runs_and_from_where():
    found = comparison(WHOLE)
    assert (found.question, found.arms[0].model, found.seeds) == ("Which?", "rn18,width=2", (3, 4))
    assert [(arm.name, arm.start, arm.checkpoint) for arm in found.arms] == [
        ("base", None, "best"),
        ("second", "first", "last"),
        ("first", "base", "best"),
        ("scratch", None, "best"),
    ]
    assert found.arm("first").keys["threat"] == {"eps": "8/255", "steps": 5}
    assert found.arm("first").keys["critical"] == {"k": 2, "every": 10}  # every is in recipes/clat.yaml
    assert (found.evaluations[0].eps, found.evaluations[0].of) == (pytest.approx(4 / 255), "test")
    assert [tuple(map(str, pair)) for pair in found.contrasts] == [
        ("first/best", "second/best"),
        ("first/best", "base/best"),
    ]
    with pytest.raises(InputError, match="no arm 'third'"):
        found.arm("third")


def test_a_run_comes_after_the_one_it_goes_on_from():
    assert [(arm.name, seed) for arm, seed in comparison(WHOLE).runs()] == [
        (name, seed) for seed in (3, 4) for name in ("base", "first", "second", "scratch")
    ]


def test_settings_are_the_recipe_with_the_keys_and_the_seed_over_it():
    settings = comparison(WHOLE).arm("first").settings(4)
    assert settings["seed"] == 4
    assert settings["critical"] == {"k": 2, "every": 10}  # every is in recipes/clat.yaml
    assert settings["threat"] == {"eps": "8/255", "steps": 5}
    assert settings["lr"] == 0.01


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_comparison_loads_at_every_scale_plans_and_dry_runs(path, tmp_path, monkeypatch, capsys):
    name = str(path.relative_to(FOLDER).with_suffix(""))
    assert comparison_path(name) == path
    labels = torch.arange(50_000) % 10
    images = {"train": 50_000, "test": 10_000}
    pixels = torch.zeros(50_000, 3, 4, 4, dtype=torch.uint8)
    monkeypatch.setattr(
        command,
        "data_named",
        lambda _, part: Dataset(
            pixels[: images[part]], labels[: images[part]], tuple("abcdefghij"), "as large as CIFAR-10", part
        ),
    )
    monkeypatch.setattr(command, "pass_times", lambda plan, *_, **__: {arm.model: 1e-4 for arm in plan.arms})
    scales = ["full", *yaml.safe_load(path.read_text()).get("scales", {})]
    assert "small" in scales
    units = {}
    for scale in scales:
        found = load_comparison(name, scale)
        units[scale] = len(list(found.runs()))
        assert units[scale] == len(found.arms) * len(found.seeds)
        for arm in found.arms:
            assert Recipe.from_keys(arm.settings(7)).seed == 7
        line = ["compare", name, "--data", "none", "--out", str(tmp_path / "out"), "--scale", scale, "--dry-run"]
        assert main(line) == 0, scale
        left = "1 unit left" if units[scale] == 1 else f"{units[scale]} units left"
        assert f"{left}: about" in capsys.readouterr().out
    assert units["small"] <= units["full"]


PAPER = sorted((FOLDER / "paper").glob("*.yaml"))


def test_the_paper_is_all_there():
    tables = {path.stem.removeprefix("table-").split("-")[0] for path in PAPER if path.stem.startswith("table")}
    assert tables == {str(number) for number in range(1, 11)}
    assert [path.stem for path in PAPER if path.stem.startswith("figure")] == ["figure-2", "figure-3", "figure-4"]


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_a_file_of_the_paper_has_its_figures_and_says_where_it_departs(path):
    found = load_comparison(f"paper/{path.stem}")
    assert found.notes
    assert (found.printed is None) == path.stem.startswith("figure")
    assert all(evaluation.of == "test" for evaluation in found.evaluations)  # as in the paper
    small = load_comparison(f"paper/{path.stem}", "small")
    assert all(evaluation.of == "unused" for evaluation in small.evaluations)
    for line in found.then:
        read(shlex.split(line)[1:])  # a command with flags that there are


def test_the_example_takes_under_twenty_lines():
    assert len((FOLDER / "random-or-critical.yaml").read_text().splitlines()) < 20


def test_a_scale_is_laid_over_the_file():
    full, small = load_comparison("random-or-critical"), load_comparison("random-or-critical", "small")
    assert full.arm("base").keys["epochs"] > small.arm("base").keys["epochs"]
    assert full.arm("base").keys["threat"] == small.arm("base").keys["threat"]
    assert full.arm("critical").keys["images"] > small.arm("critical").keys["images"]
    assert full.contrasts == small.contrasts
    with pytest.raises(InputError, match="no scale 'huge'; it has small"):
        load_comparison("random-or-critical", "huge")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must hold keys and values"),
        (changed("question", to=None), "question is missing"),
        (changed("base", "model", to=None), "base: model is missing"),
        (changed("base", "from", to="first/best"), "base: 'from' is unknown"),
        (changed("answer", to=42), "'answer' is unknown"),
        (changed("arms", to=[1]), "arms must be keys and values"),
        (changed("arms", "first", to="clat"), "arm first must hold keys and values"),
        (changed("arms", "first", "recipe", to="clot"), "no recipe 'clot'"),
        (changed("arms", "first", "epochs", to=3), "arm first: 'epochs' is unknown"),
        (changed("arms", "first", "from", to="base"), "from is 'base'; write"),
        (changed("arms", "first", "from", to="base/worst"), "from is 'base/worst'; write"),
        (changed("arms", "first", "from", to="third/best"), "goes on from 'third', which is no arm"),
        (changed("arms", "first", "from", to="second/best"), "goes on from itself"),
        (changed("arms", "first", "from", to="first/best"), "goes on from itself"),
        (changed("arms", "first", "keys", to={"seed": 1}), "hold a seed"),
        (changed("arms", "base", to={"recipe": "clat"}), "called base"),
        (changed("arms", "../up", to={"recipe": "clat"}), "use letters, digits and dashes"),
        (changed("evaluation", "tier", to="fast"), "tier is 'fast'; choose one of quick"),
        (changed("evaluation", "of", to="train"), "of is 'train'; choose one of held-out"),
        (changed("evaluation", "images", to=0), "images is 0"),
        (changed("evaluation", "images", to=True), "images must be a whole number"),
        (changed("evaluation", "eps", to="8/0"), "is not a number"),
        (changed("evaluation", "eps", to=8), "eps is 8.0"),
        (changed("contrasts", to=[["first", "third"]]), "name two of base, second, first, scratch"),
        (changed("contrasts", to=[["first", "first"]]), "name two of"),
        (changed("contrasts", to=["first"]), "name two of"),
        (changed("contrasts", to=[["first", "second/averaged"]]), "but arm second is measured at best, last"),
        (changed("arms", "first", "at", to=["best", "first"]), "at is .*list some of best, last, averaged"),
        (changed("arms", "first", "keys", to={"lr": -1}), "arm first: lr is -1"),
        (changed("arms", "first", "keys", to={"trades": {"beta": 1}}), "arm first: trades keys are given"),
        (changed("evaluation", to=[]), "evaluation lists none"),
        (changed("evaluation", "steps", to=0), "steps is 0"),
        (changed("evaluation", "images", to="many"), "images is 'many'"),
        (changed("base", "model", to="mynet.py:make"), "which a file may not call; leave it out and give --model"),
        (changed("base", "model", to="timm/resnet18,pretrained=true"), "may not have weights fetched"),
        (changed("base", "model", to="rn18,normalise=0.5;0.5"), "may set normalise to none, data, imagenet"),
        (changed("base", "model", to="rn18,width=[1"), "width=16"),
        (changed("base", "model", to="runs/base"), "names a network 'runs/base' that clat does not know"),
        (changed("base", "model", to="rn18,width=100000"), "width as 100000"),
        (changed("networks", to={}), "networks names none"),
        (changed("networks", to={"small": {"keys": {}}}), "network 'small': model is missing"),
        (changed("seeds", to=[]), "seeds are"),
        (changed("seeds", to=[1, 1]), "each once"),
        (changed("seeds", to=[-1]), "from 0 up"),
    ],
)
def test_what_is_no_comparison_is_refused_in_one_sentence(content, message):
    with pytest.raises(InputError, match=message) as raised:
        comparison(content)
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no comparison 'random'.*random-or-critical"):
        load_comparison("random")
    (tmp_path / "a.yaml").write_text("question: [")
    with pytest.raises(InputError, match="no valid YAML"):
        load_comparison(str(tmp_path / "a.yaml"))


def test_a_network_of_code_comes_from_the_call_alone():
    content = changed("base", "model", to=None)
    with pytest.raises(InputError, match="base: model is missing; name a network there, or give --model"):
        comparison(content)
    assert {arm.model for arm in comparison(content, model="mynet.py:make").arms} == {"mynet.py:make"}
    assert comparison(WHOLE, model="mynet.py:make").arms[1].model == "mynet.py:make"


def test_several_networks_repeat_the_arms_for_each():
    networks = {
        "a": {"model": "rn18,width=2"},
        "b": {"model": "rn18,width=4", "arms": {"first": {"keys": {"lr": 0.5}}}},
    }
    found = comparison({**WHOLE, "networks": networks})
    assert [arm.name for arm in found.arms] == [
        f"{n}-{a}" for n in "ab" for a in ("base", "second", "first", "scratch")
    ]
    assert {arm.model for arm in found.arms if arm.name.startswith("b-")} == {"rn18,width=4"}
    assert found.arm("b-first").keys["lr"] == 0.5 != found.arm("a-first").keys["lr"]
    assert found.arm("b-second").start == "b-first"
    assert [str(pair[0]) for pair in found.contrasts] == ["a-first/best"] * 2 + ["b-first/best"] * 2
    with pytest.raises(InputError, match="--model goes with a file that has one"):
        comparison({**WHOLE, "networks": networks}, model="rn18")


def test_a_plan_comes_back_from_json():
    found = comparison({**WHOLE, "evaluation": [WHOLE["evaluation"], {"images": "all"}], "notes": ["a"], "then": ["b"]})
    assert Comparison.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_recipe_of_your_own_is_found_beside_the_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("objective: trades\nepochs: 7\n")
    content = changed("arms", "scratch", to={"recipe": "mine.yaml", "keys": {"lr": 0.5}})
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content))
    keys = load_comparison(str(tmp_path / "plan.yaml")).arm("scratch").keys
    assert (keys["objective"], keys["epochs"], keys["lr"]) == ("trades", 2, 0.5)  # 2 is of the whole file


def test_seeds_and_scale_of_the_call():
    assert load_comparison("random-or-critical", "full", seeds=[7]).seeds == (7,)
    with pytest.raises(InputError, match="each once"):
        load_comparison("random-or-critical", seeds=[7, 7])
