"""Comparison files: what they say, what a scale lays over it, and what is refused in one sentence."""

from pathlib import Path

import pytest
import yaml

from clat.cli.arguments import parse
from clat.cli.commands import COMMANDS
from clat.compare.plan import comparison, comparison_path, load_comparison
from clat.errors import InputError

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
    assert (found.question, found.model, found.seeds) == ("Which?", "rn18,width=2", (3, 4))
    assert [(arm.name, arm.start, arm.checkpoint) for arm in found.arms] == [
        ("base", None, "best"),
        ("second", "first", "last"),
        ("first", "base", "best"),
        ("scratch", None, "best"),
    ]
    assert found.arm("first").keys == {"epochs": 2, "threat": {"eps": "8/255", "steps": 5}, "critical": {"k": 2}}
    assert (found.evaluation.eps, found.evaluation.of) == (pytest.approx(4 / 255), "test")
    assert found.contrasts == (("first", "second"), ("first", "base"))
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
def test_every_comparison_loads_at_every_scale_and_its_recipes_are_recipes(path, tmp_path):
    name = str(path.relative_to(FOLDER).with_suffix(""))
    assert comparison_path(name) == path
    for scale in (None, *yaml.safe_load(path.read_text()).get("scales", {})):
        found = load_comparison(name, scale)
        assert len(list(found.runs())) == len(found.arms) * len(found.seeds)
        for arm in found.arms:
            (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(arm.settings(7)))
            command = [
                "train",
                str(tmp_path / "recipe.yaml"),
                "--model",
                found.model,
                "--data",
                "none",
                "--out",
                "none",
            ]
            recipe = parse(command, {"train": COMMANDS["train"]})[1]["recipe"]
            assert recipe.seed == 7


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
        (changed("evaluation", "of", to="train"), "of is 'train'; choose one of holdout"),
        (changed("evaluation", "images", to=0), "images is 0"),
        (changed("evaluation", "images", to=True), "images must be a whole number"),
        (changed("evaluation", "eps", to="8/0"), "is not a number"),
        (changed("evaluation", "eps", to=8), "eps is 8.0"),
        (changed("contrasts", to=[["first", "third"]]), "name two of base, second, first, scratch"),
        (changed("contrasts", to=[["first", "first"]]), "name two of"),
        (changed("contrasts", to=["first"]), "name two of"),
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
