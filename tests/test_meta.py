"""Every objective with every tuner on torch's meta device, where a tensor of another device in the step is an error.

It stands in for the test on a GPU that most machines cannot run. Meta tensors have shapes, types and a device but no
values, so ``_OneDevice`` answers for them where the host asks: a number is ``NUMBER``, a condition holds.

| part of a step                                | on meta | what it cannot show                                    |
|-----------------------------------------------|---------|--------------------------------------------------------|
| augmentation, bytes to pixels                 | whole   |                                                        |
| selection: attack, trace, passes, ascent      | whole   | which layer wins: every weakness and risk is NUMBER    |
| ``begin`` and ``apply`` of a selection        | whole   |                                                        |
| attack and projection                         | whole   |                                                        |
| loss, backward, weight perturbation, clipping | whole   | GradAlign's images of zero gradient: none are          |
| update                                        | unfused | the fused kernels, which torch has for CPU and CUDA    |
| averaging, ``end`` of RiFT                    | whole   | which blend wins                                       |
| autocast                                      | no      | torch has none for meta; every step is in fp32         |
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clat.data.dataset import augment, to_unit
from clat.models import Normalized
from clat.objectives import OBJECTIVES, Clat, Score, Trades
from clat.threat import Threat
from clat.training.averaging import Average, Averaged
from clat.training.awp import Awp
from clat.training.optimizer import make_optimizer
from clat.training.recipe import Recipe
from clat.tuners import TUNERS, ConvLora, Critical, Rift
from clat.tuners.convlora import merge
from conftest import Plain

aten = torch.ops.aten
NUMBER = 0.25
# Copies between devices, and places in memory that the host gives, are what torch allows with tensors of two devices.
BETWEEN = {aten._to_copy, aten.copy_, aten.index, aten.index_put_, aten._index_put_impl_}


class _OneDevice(TorchDispatchMode):
    """Raises where an operation mixes devices, and answers for meta tensors where the host asks for values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        mixed = {t.device.type for t in tensors if t.dim() or t.device.type != "cpu"}  # a CPU scalar may join in
        if len(mixed) > 1 and func.overloadpacket not in BETWEEN:
            raise RuntimeError(f"{func} on tensors of {' and '.join(sorted(mixed))}")
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return NUMBER if args[0].is_floating_point() else 1
        if func is aten.index.Tensor and args[0].is_meta:
            args = (args[0], [_all(place) for place in args[1]])
        return func(*args, **kwargs)


def _all(place: Tensor | None) -> Tensor | None:
    """All places, for a condition."""
    if place is None or place.dtype != torch.bool:
        return place
    return torch.arange(len(place), device=place.device)


@contextmanager
def on_meta() -> Iterator[None]:
    listed = Tensor.tolist

    def answer(tensor: Tensor) -> Any:
        return torch.full(tensor.shape, NUMBER).tolist() if tensor.is_meta else listed(tensor)

    with pytest.MonkeyPatch.context() as patch, _OneDevice():
        patch.setattr(Tensor, "tolist", answer)
        yield


def network() -> nn.Module:
    """Two convolutions with BatchNorm and a linear layer, on meta."""
    return Normalized(Plain(), [0.3], [0.2]).to("meta")


def batch() -> tuple[Tensor, Tensor]:
    pixels = torch.empty(4, 1, 8, 8, dtype=torch.uint8, device="meta")
    return pixels, torch.empty(4, dtype=torch.long, device="meta")


def threat(objective: str) -> Threat:
    if objective in ("fast-at", "free-at"):
        return Threat(steps=1, step=0.03)
    return Threat(steps=1, step=0.03, start="zero") if objective == "grad-align" else Threat(steps=2)


def one_step(recipe: Recipe, model: nn.Module, pixels: Tensor, y: Tensor) -> Tensor:
    """Selection, then twice attack, loss, backward and update, as the training loop has them; returns the loss."""
    objective, tuner = recipe.objective.begin(), recipe.tuner
    x = to_unit(augment(pixels))
    selection = tuner.select(model, x, y, recipe.threat)
    tuner.begin(model, selection)
    trained = selection.apply(model)
    optimizer, averaged = make_optimizer(recipe, model), Averaged(model, recipe.average)
    for _ in range(2):  # the second with what the first left: momentum, Free-AT's delta, Clat's count of calls
        x_adv = recipe.threat.project(objective.perturb(model, x, y, recipe.threat), x)

        def backward(x_adv: Tensor = x_adv) -> Tensor:
            with selection.mode(model):
                loss = torch.stack(list(objective.loss(model, x, x_adv, y).values())).sum()
            loss.backward()
            return loss

        with (recipe.awp or Awp()).weights(model, backward):
            loss = backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averaged.take(1, last=True)
    if (right := objective.probe(model, x, y, recipe.threat)) is not None:
        right.sum().item()
    if tuner.ends:
        tuner.end(model, model.state_dict(), lambda: (0.5, 0.5))
    merge(model)
    return loss


def check(recipe: Recipe) -> None:
    model = network()
    with on_meta():
        loss = one_step(recipe, model, *batch())
    assert loss.is_meta
    assert all(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize(("objective", "tuner"), list(product(OBJECTIVES, TUNERS)))
def test_no_step_mixes_devices(objective, tuner):
    trains = Rift(passes=1) if tuner == "rift" else TUNERS[tuner]()
    check(Recipe(objective=OBJECTIVES[objective](), tuner=trains, threat=threat(objective), average=Average()))


L2 = Threat(steps=2, norm="l2", mode="batch")


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(objective=Clat(attack="feature", cross_entropy="both"), tuner=Critical(), threat=L2),
        Recipe(objective=Clat(attack="feature", distance="relative", at="activation"), tuner=Critical()),
        Recipe(tuner=Critical(ranking="random", norm_affine=True, norm_statistics="selected")),
        Recipe(tuner=Rift(passes=1, norm_statistics="selected"), optimizer="adamw", decay="kernels"),
        Recipe(tuner=ConvLora(head=True), average=Average(kind="swa")),
        Recipe(objective=Score(form="pgd-at"), threat=Threat(steps=2, start="gaussian", mode="train")),
    ],
    ids=lambda recipe: f"{recipe.objective.name}-{recipe.tuner.name}",
)
def test_no_variant_mixes_devices(recipe):
    check(recipe)


def stray_in_loss(monkeypatch):
    monkeypatch.setattr("clat.objectives.trades.divergence", lambda target, scores: scores[:, 0] * torch.ones(4))


def stray_in_attack(monkeypatch):
    move = Threat.move
    monkeypatch.setattr(Threat, "move", lambda *args: move(*args) + torch.zeros(4, 1, 8, 8))


def stray_in_selection(monkeypatch):
    module = sys.modules["clat.criticality"]  # ``clat.criticality`` is the function
    monkeypatch.setattr(module, "lengths", lambda feature: feature.flatten(1).sum(1) + torch.zeros(len(feature)))


def stray_in_update(monkeypatch):
    step = torch.optim.SGD.step

    def mixed(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = parameter.grad + torch.zeros(parameter.shape)
        return step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", mixed)


def stray_among_indices(monkeypatch):
    def first(scores, *_, **__):
        return scores.gather(1, torch.zeros(4, 1).long()).sum()

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", first)


@pytest.mark.parametrize(
    "plant", [stray_in_loss, stray_in_attack, stray_in_selection, stray_in_update, stray_among_indices]
)
def test_a_stray_tensor_of_the_host_is_noticed(monkeypatch, plant):
    recipe = Recipe(objective=Trades(), tuner=Critical(), threat=threat("trades"))
    check(recipe)
    plant(monkeypatch)
    with pytest.raises(RuntimeError, match="tensors of cpu and meta"):
        check(recipe)
