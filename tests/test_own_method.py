"""An objective and a tuner from outside the package: ten lines each, given to a recipe, trained with and resumed."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clat import InputError, Recipe, Threat, attack_output, train
from clat.checkpoint import load_tensors
from clat.cli.arguments import parse
from clat.cli.commands import COMMANDS
from clat.network import logits
from clat.objectives import OBJECTIVES, Clat, Objective, Trades
from clat.training.runs import Run
from clat.tuners import TUNERS, Selection, Tuner, Whole
from clat.tuners.selection import parameters_of
from conftest import Plain, dies_before, same_tensors


@dataclass(frozen=True, kw_only=True)
class Smoothed(Objective):
    name = "smoothed-at"
    smoothing: float = 0.1

    def perturb(self, model, x, y, threat):
        return attack_output(model, x, y, threat)

    def loss(self, model, x, x_adv, y):
        return {"smoothed": F.cross_entropy(logits(model(x_adv)), y, label_smoothing=self.smoothing)}


@dataclass(frozen=True, kw_only=True)
class Named(Tuner):
    name = "named"
    layers: tuple[str, ...] = ("first",)
    every: int = 2

    def select(self, model, x, y, threat, *, epoch=1, seed=0):
        layers = tuple(self.layers)
        return Selection(epoch=epoch, layers=layers, trainable=parameters_of(model, layers))


RECIPE = Recipe(
    objective=Smoothed(smoothing=0.2), tuner=Named(layers=("second", "last")), epochs=3, batch_size=60, lr=0.05,
    holdout=60, validation_steps=1, health=False, precision="fp32", layout="contiguous",
    threat=Threat(eps=0.1, step=0.05, steps=2),
)  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    return Plain()


def test_they_train_what_they_say_and_a_killed_run_ends_bit_identical(blobs, tmp_path):
    whole = train(RECIPE, network(), blobs, out=tmp_path / "whole")
    start, end = network().state_dict(), load_tensors(whole.last)[0]
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == {f"{layer}.{kind}" for layer in ("second", "last") for kind in ("weight", "bias")}
    assert [selection.epoch for selection in whole.selections] == [1, 3]
    assert whole.metrics[0]["loss/smoothed"] == whole.metrics[0]["loss"]
    with dies_before("last", time=2):
        train(RECIPE, network(), blobs, out=tmp_path / "killed")
    assert Run(tmp_path / "killed").epoch == 1
    killed = train(RECIPE, network(), blobs, out=tmp_path / "killed", resume=True)
    assert same_tensors(killed.last, whole.last)


def test_their_keys_are_recorded_and_a_run_goes_on_only_with_the_same(blobs, tmp_path):
    run = train(replace(RECIPE, epochs=1), network(), blobs, out=tmp_path / "run")
    stored = run.recipe
    assert (stored["objective"], stored["smoothed_at"]) == ("smoothed-at", {"smoothing": 0.2})
    assert (stored["tuner"], stored["named"]) == ("named", {"layers": ["second", "last"], "every": 2})
    for other, named in (
        ({"objective": Smoothed()}, "another smoothed_at"),
        ({"tuner": Named()}, "another named"),
        ({"tuner": Whole()}, "another tuner"),
        ({"objective": Trades(), "tuner": Whole()}, "another objective, tuner"),
    ):
        with pytest.raises(InputError, match=f"was started with {named};"):
            train(replace(RECIPE, epochs=1, **other), network(), blobs, out=run.folder, resume=True)


def test_a_recipe_file_cannot_name_them(tmp_path):
    keys = RECIPE.keys()
    with pytest.raises(InputError, match=r"no key 'smoothed_at'"):
        Recipe.from_keys(keys)
    assert Recipe.from_keys(keys, like=RECIPE).keys() == keys
    (tmp_path / "recipe.yaml").write_text("objective: smoothed-at\n")
    with pytest.raises(InputError, match=r"objective is 'smoothed-at'; choose one of clean, "):
        parse(["train", str(tmp_path / "recipe.yaml"), "--model=rn18", "--data=x", "--out=y"], COMMANDS)


@dataclass(frozen=True, kw_only=True)
class Nameless(Smoothed):
    name = ""


@dataclass(frozen=True, kw_only=True)
class Taken(Smoothed):
    name = "trades"


@dataclass(frozen=True, kw_only=True)
class LikeATuner(Smoothed):
    name = "critical"


@dataclass(frozen=True, kw_only=True)
class LikeAKey(Smoothed):
    name = "lr"


@dataclass(frozen=True, kw_only=True)
class Unwritable(Smoothed):
    name = "unwritable"
    weight: object = object()


class Changing(Tuner):
    name = "changing"

    def select(self, model, x, y, threat, *, epoch=1, seed=0):
        return Whole().select(model, x, y, threat, epoch=epoch, seed=seed)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"objective": Nameless()}, "give the class one"),
        ({"objective": Taken()}, "has the name trades, which clat has for something else"),
        ({"objective": LikeATuner()}, "has the name critical"),
        ({"objective": LikeAKey()}, "has the name lr"),
        ({"objective": Unwritable()}, r"unwritable.weight is <object.* cannot hold"),
        ({"objective": Clat}, r"give one such as Trades\(beta=6\)"),
        ({"objective": "trades"}, r"objective is 'trades'; give one such as Trades\(beta=6\)"),
        ({"tuner": Changing()}, "Changing is no frozen dataclass"),
        ({"tuner": Smoothed()}, r"give one such as Critical\(k=2\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_could_not_be_recorded_gets_one_sentence(keys, says):
    with pytest.raises(InputError, match=says) as caught:
        Recipe(**keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "owner"), [*OBJECTIVES.items(), *TUNERS.items()])
def test_every_class_is_listed_by_its_own_name(name, owner):
    assert owner.name == name


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("tuner", TUNERS)
def test_a_recipe_is_read_as_it_was_written(objective, tuner):
    recipe = Recipe(objective=OBJECTIVES[objective](), tuner=TUNERS[tuner]())
    assert Recipe.from_keys(recipe.keys()) == recipe
    assert len({key for key, value in recipe.keys().items() if isinstance(value, dict)}) <= 3  # threat and two methods
