"""One validation at every door: the same value gets the same sentence in Python, in a recipe file and as a flag."""

import math
from dataclasses import fields, replace
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch
import yaml

from clat import (
    CLAT,
    InputError,
    Recipe,
    Threat,
    attack_output,
    evaluate,
    find_layers,
    layer_criticality,
    sweep,
    top,
    train,
    transfer,
    trust,
)
from clat.cli.arguments import _entries, parse
from clat.cli.commands import COMMANDS
from clat.inputs import annotations, block_of, fraction, named
from clat.objectives import OBJECTIVES, Clat, Score
from clat.training.averaging import Average
from clat.training.awp import Awp
from clat.training.extra import Extra
from clat.training.recipe import recipe_keys
from clat.tuners import TUNERS, ConvLora, Critical, Rift

REST = ["--model", "rn18", "--data", "x", "--out", "y"]
BLOCKS = {name: block for name, kind in recipe_keys().items() if (block := block_of(kind))}
FILLED = {"extra": {"source": "x"}}  # what a block cannot do without
USES = {name.replace("-", "_"): {"objective": name} for name in OBJECTIVES} | {name: {"tuner": name} for name in TUNERS}


def settings():
    """Every setting of a recipe as (block or None, key, annotation)."""
    for name, kind in recipe_keys().items():
        if name in BLOCKS:
            yield from ((name, key, inner) for key, inner in annotations(BLOCKS[name]).items())
        else:
            yield None, name, kind


def said(action):
    try:
        action()
    except InputError as error:
        return str(error)
    return None


def in_python(block, key, value, inner):
    """What takes the value in Python: the class of the block, or the recipe; methods are named in keys only."""
    if block is not None:
        return BLOCKS[block](**inner)
    return Recipe.from_keys({key: value}) if key in ("objective", "tuner") else Recipe(**{key: value})


def at_every_door(tmp_path, block, key, value):
    """What Python, a recipe file and a flag say to a value."""
    inner = {**FILLED.get(block, {}), key: value}
    keys = {key: value} if block is None else {**USES.get(block, {}), block: inner}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump({**USES.get(block, {}), **({block: FILLED[block]} if block in FILLED else {})})
    )
    flag = f"--{key}" if block is None else f"--{block}.{key}"
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).splitlines()[0]
    yield said(lambda: in_python(block, key, value, inner))
    yield said(lambda: parse(["train", str(tmp_path / "recipe.yaml"), *REST], COMMANDS))
    yield said(lambda: parse(["train", str(tmp_path / "base.yaml"), *REST, f"{flag}={text}"], COMMANDS))


MISSPELT = [
    (block, key, word)
    for block, key, kind in settings()
    if get_origin(kind) is Literal
    for word in (get_args(kind)[0].title() + "x", "nothing like it")
] + [(None, "objective", "pgdat"), (None, "tuner", "Critical")]


@pytest.mark.parametrize(("block", "key", "word"), MISSPELT)
def test_a_misspelt_word_gets_the_same_sentence_at_every_door(tmp_path, block, key, word):
    python, file, flag = at_every_door(tmp_path, block, key, word)
    assert python == file == flag
    assert python.startswith(f"{block}.{key}" if block else key)
    assert "choose one of" in python
    assert ("Did you mean" in python) == (word != "nothing like it")


def test_the_words_of_the_issue_are_among_them():
    keys = {key for _, key, _ in MISSPELT}
    assert {"optimizer", "schedule", "ranking", "norm", "at", "distance", "norm_statistics", "kind", "form"} <= keys
    assert len({(block, key) for block, key, _ in MISSPELT}) >= 25


OUT_OF_RANGE = [
    (None, "momentum", -0.1), (None, "momentum", 1.0), (None, "weight_decay", -1e-4), (None, "clip", -1.0),
    (None, "clip", 0.0), (None, "lr", 0.0), (None, "lr", -1.0), (None, "lr", math.nan), (None, "lr", math.inf),
    (None, "patience", 0), (None, "warmup", -1), (None, "label_smoothing", 1.0), (None, "label_smoothing", -0.1),
    (None, "peak", 0.0), (None, "peak", 1.0), (None, "holdout", 0), (None, "holdout", -5), (None, "epochs", 0),
    (None, "epochs", 1.5), (None, "epochs", True), (None, "epochs", 2**70), (None, "epochs", [1]),
    (None, "batch_size", 0), (None, "images", 0), (None, "validation_steps", -1), (None, "seed", 2**40),
    (None, "validation_eps", 0), (None, "validation_eps", 2), (None, "validation_eps", "wide"),
    (None, "validation_step", -1), (None, "validation_step", "1/0"),
    (None, "milestones", [0, 3]), (None, "milestones", [3, 3]), (None, "milestones", [5, 2]),
    (None, "milestones", [1.5]), (None, "milestones", 3), (None, "augment", "maybe"), (None, "augment", 1),
    (None, "accumulate", 0), (None, "recompute", 1),
    ("threat", "steps", -1), ("threat", "steps", 1.5), ("threat", "steps", True), ("threat", "eps", 0),
    ("threat", "eps", -1), ("threat", "eps", 2), ("threat", "eps", "1e999999999"), ("threat", "eps", "1/0"),
    ("threat", "step", "nan"), ("awp", "gamma", 8), ("awp", "gamma", -0.01), ("awp", "warmup", -1),
    ("average", "decay", 1.5), ("average", "decay", -0.1), ("average", "start", 0), ("extra", "share", 1),
    ("critical", "k", 0), ("critical", "k", 2.0), ("critical", "k", -1), ("critical", "k", True),
    ("critical", "k", "three"), ("critical", "k", math.nan), ("critical", "every", -1), ("critical", "batch", 0),
    ("clat", "weight", -1), ("clat", "weight", math.nan), ("mart", "beta", -1), ("trades", "beta", -1),
    ("score", "beta", -1), ("score", "clip", 1), ("free_at", "replays", 1), ("grad_align", "weight", -1),
    ("fast_at", "largest_drop", 0), ("rift", "radius", 0), ("rift", "passes", 0), ("rift", "largest_drop", 2),
    ("convlora", "rank", 0), ("convlora", "rank", 2**62), ("convlora", "alpha", 0), ("convlora", "alpha", "two"),
]  # fmt: skip


@pytest.mark.parametrize(("block", "key", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_gets_the_same_sentence_at_every_door(tmp_path, block, key, value):
    python, file, flag = at_every_door(tmp_path, block, key, value)
    assert python is not None
    assert python == file == flag
    assert "\n" not in python


HOSTILE = [math.nan, math.inf, -math.inf, -1, 0, 1.5, 2**70, 10**400, "", "[/x]", "a\nb\x1b", "x" * 10_000, {}, [],
           [[]], {"a": {}}, {1: 2}, None, True, b"\xff", "1e400", "8/255", object()]  # fmt: skip


def test_every_setting_takes_every_hostile_value_or_refuses_it_in_one_sentence():
    """In Python and as what a file gives; whatever is taken is finite, and can be written down and read again."""
    for block, key, _ in settings():
        for value in HOSTILE:
            inner = {**FILLED.get(block, {}), key: value}
            keys = {key: value} if block is None else {**USES.get(block, {}), block: inner}
            refused = said(lambda: in_python(block, key, value, inner))  # noqa: B023
            assert refused is None or "\n" not in refused
            refused = said(lambda: Recipe.from_keys(keys))  # noqa: B023
            assert refused is None or ("\n" not in refused and len(refused) < 1000)
            if refused is None:
                recipe = Recipe.from_keys(keys)
                assert Recipe.from_keys(yaml.safe_load(yaml.safe_dump(recipe.keys()))) == recipe


TEXTS = ["nan", "inf", "-inf", "-1", "0", "1.5", "1e400", str(2**70), "", "[/x]", "{}", "[]", "null", "true",
         "text", "[[", "{a: &b [*b]}", "!!timestamp x", "!!int ''", "!!python/object:os.system {}", "1e-3",
         "8/255"]  # fmt: skip


@pytest.mark.parametrize("entry", _entries("train"), ids=lambda entry: entry["name"])
def test_every_flag_takes_every_hostile_text_or_refuses_it_in_one_sentence(entry):
    if entry.get("switch") or entry["name"] in ("config", "protocol", "scale"):  # recipes: tests/test_cli_doors.py
        return
    for text in TEXTS:
        refused = said(lambda: parse(["train", "recipes/clean.yaml", *REST, f"--{entry['name']}={text}"], COMMANDS))  # noqa: B023
        assert refused is None or "\n" not in refused


def test_flags_of_optional_blocks():
    def recipe(*flags):
        return parse(["train", "awp", *REST, *flags], COMMANDS)[1]["recipe"]

    assert recipe("--awp.warmup", "3").awp == Awp(gamma=0.01, warmup=3)
    assert recipe("--awp", "null").awp is None
    assert recipe("--awp", "{gamma: 0.02}", "--awp.warmup=1").awp == Awp(gamma=0.02, warmup=1)
    assert recipe("--average.kind", "swa").average == Average(kind="swa")
    assert recipe("--extra.source", "more").extra == Extra(source="more")
    assert recipe("--lr", "1e-3", "--milestones", "[3, 5]", "--clip", "1").milestones == (3, 5)
    with pytest.raises(InputError, match=r"awp has no key 'gama'. Did you mean gamma"):
        recipe("--awp", "{gama: 1}")
    with pytest.raises(InputError, match=r"extra.source is missing"):
        recipe("--extra", "{share: 0.5}")


def test_numbers_come_out_as_python_numbers():
    recipe = Recipe(epochs=np.int64(3), lr=np.float32(0.5), weight_decay=0)
    assert (type(recipe.epochs), type(recipe.lr), type(recipe.weight_decay)) == (int, float, float)
    assert Critical(k=np.float64(0.5)).k == 0.5
    assert isinstance(Critical(k=3).k, int)
    assert Recipe(milestones=[2, 4], schedule="step").milestones == (2, 4)


def test_the_attack_on_held_out_images_is_that_of_training_unless_the_recipe_says_otherwise():
    training = Threat(eps="10/255", step="5/255", steps=7)
    assert Recipe(threat=training).validation_threat == replace(training, steps=10)
    # A step of a one-step attack is about as long as the radius, so several of them are shorter.
    one_step = Threat(eps="8/255", step="10/255", steps=1)
    assert Recipe(threat=one_step, validation_steps=3).validation_threat == Threat(eps="8/255", step="2/255", steps=3)
    own = {"validation_eps": "8/255", "validation_step": "4/255", "validation_steps": 3}
    for threat in (training, one_step):
        assert Recipe(threat=threat, **own).validation_threat == Threat(eps="8/255", step="4/255", steps=3)
        assert Recipe(threat=threat, **own).threat == threat
    assert Recipe(threat=one_step, validation_eps="4/255").validation_threat.step == 1 / 255
    wide = Recipe(threat=Threat(eps=3, step=1, norm="l2"), validation_eps=2).validation_threat
    assert (wide.norm, wide.radius) == ("l2", 2)


def test_a_block_is_a_block():
    with pytest.raises(InputError, match=r"threat is \{'eps': 0.1\}; it must be a block of keys \(eps, .*Threat\("):
        Recipe(threat={"eps": 0.1})
    with pytest.raises(InputError, match="awp is"):
        Recipe(awp=Threat())


def test_every_setting_is_checked():
    """No dataclass of a recipe takes an object where its annotation has none."""
    for block in {*BLOCKS.values(), Clat, Score, Rift, ConvLora}:
        for field in fields(block):
            with pytest.raises(InputError, match=field.name if block is not Threat else "number|threat"):
                block(**{**({"source": "x"} if block is Extra else {}), field.name: object()})


@pytest.mark.parametrize("value", [True, None, "", "x", [], math.nan, math.inf, "1e999999999", "1/0", "9" * 5000])
def test_what_is_no_number_is_refused_at_once(value):
    with pytest.raises(InputError, match="not a number"):
        fraction(value)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x, y: layer_criticality(m, x, x, norm="RMS"),
        lambda m, x, y: layer_criticality(m, x, x, at="outputs"),
        lambda m, x, y: layer_criticality(m, x, x + 1),
        lambda m, x, y: layer_criticality(m, x, x * math.nan),
        lambda m, x, y: layer_criticality(m, x, x.numpy()),
        lambda m, x, y: find_layers(m, x.numpy()),
        lambda m, x, y: find_layers(m, (x * 255).byte()),
        lambda m, x, y: attack_output(m, x * 255, y, Threat()),
        lambda m, x, y: attack_output(m, x * math.nan, y, Threat()),
        lambda m, x, y: attack_output(m, x, y.float(), Threat()),
        lambda m, x, y: attack_output(m, x, None, Threat()),
        lambda m, x, y: attack_output(m, x, y[:2], Threat()),
        lambda m, x, y: top(layer_criticality(m, x, x), "1"),
        lambda m, x, y: top(layer_criticality(m, x, x), 2.0),
        lambda m, x, y: top(layer_criticality(m, x, x), True),
        lambda m, x, y: top([], 1),
        lambda m, x, y: CLAT(m, ranking="Random"),
        lambda m, x, y: CLAT(m, norm="RMS"),
        lambda m, x, y: CLAT(m, k="3"),
        lambda m, x, y: CLAT(m, k=True),
        lambda m, x, y: CLAT(m, k=2.0),
        lambda m, x, y: CLAT(m, steps=1.5),
        lambda m, x, y: CLAT(m, seed="0"),
        lambda m, x, y: CLAT(m, threat={"eps": 0.1}),
        lambda m, x, y: CLAT(m, every=3),
        lambda m, x, y: CLAT("rn18"),
    ],
)
def test_the_free_functions_and_the_loop_check_alike(plain, images, call):
    with pytest.raises(InputError):
        call(plain, *images)


ONE_STEP = Threat(steps=1)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, x, y: attack_output(m, x, y + 100, ONE_STEP), "labels run from 100 to"),
        (lambda m, x, y: attack_output(m, x, y, 0.03), "threat is 0.03; give a clat.Threat"),
        (lambda m, x, y: evaluate("rn18", (x, y), ONE_STEP), "A str is no network"),
        (lambda m, x, y: evaluate(m, (x, y), "pgd"), "'pgd' is no attack"),
        (
            lambda m, x, y: evaluate(m, (x, y), ONE_STEP, precision="fp16"),
            "precision is 'fp16'; choose one of auto",
        ),
        (lambda m, x, y: evaluate(m, (x, y), ONE_STEP, seed="0"), "seed is '0'; give a whole number"),
        (lambda m, x, y: evaluate(m, (x, y), ONE_STEP, batch_size="8"), "batch_size is '8'; it must be a whole number"),
        (lambda m, x, y: sweep(m, (x, y), "epsilon", [1]), "over is 'epsilon'; choose one of eps, steps"),
        (lambda m, x, y: trust(m, (x, y), budget="10"), "budget is '10'; it must be"),
        (lambda m, x, y: transfer([m, m], (x, y)), "at least two networks by name"),
        (lambda m, x, y: train("clat", m, (x, y), out="never"), "'clat' is no recipe"),
        (lambda m, x, y: train(Recipe(), "rn18", (x, y), out="never"), "A str is no network"),
    ],
)
def test_what_python_could_take_for_something_else_is_refused(plain, images, call, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, _ = images
    classes = plain(x).shape[1]
    with pytest.raises(InputError, match=says):
        call(plain, x, torch.arange(len(x)) % classes)
    assert not list(tmp_path.iterdir())


def test_k_as_a_share_reaches_all_layers(tiny):
    scores = layer_criticality(tiny, torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16))
    assert len(top(scores, 1.0)) == len(top(scores, 0.999)) == 17
    assert len(top(scores, 1)) == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("rn18", ("rn18", {})),
        ("timm/x,depths=[1, 1,2],img_size=64", ("timm/x", {"depths": [1, 1, 2], "img_size": 64})),
        ("photos[a,b],size=3", ("photos[a,b]", {"size": 3})),
    ],
)
def test_options_after_commas(text, found):
    assert named(text) == found
