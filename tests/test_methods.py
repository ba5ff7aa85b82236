"""What the training loop does for single methods: schedules, decay groups, replays, the guard, adversarial weights."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from clat.checkpoint import load_tensors
from clat.errors import InputError
from clat.network import same_bits
from clat.objectives import Clat, FastAt, FreeAt, GradAlign, Mart, Score, Trades
from clat.threat import Threat
from clat.training.awp import Awp
from clat.training.optimizer import learning_rate, load_optimizer_state, make_optimizer, optimizer_state
from clat.training.recipe import Recipe
from clat.training.train import train
from clat.tuners import Critical
from conftest import Plain, dies_before, network, same_tensors

ONE_STEP = Threat(eps=0.1, step=0.1, steps=1)
BASE = Recipe(epochs=3, batch_size=60, lr=0.05, holdout=60, threat=ONE_STEP, validation_steps=2, health=False)
FREE = replace(BASE, objective=FreeAt(replays=3), threat=replace(ONE_STEP, start="zero"))
FAST = replace(BASE, objective=FastAt(), schedule="cyclic", cycle_momentum=True, lr=0.1)
AWP = replace(BASE, objective=Trades(), awp=Awp(gamma=0.02, warmup=1), decay="kernels")
EVERY = {
    "trades": replace(BASE, objective=Trades()),
    "mart": replace(BASE, objective=Mart()),
    "score": replace(BASE, objective=Score()),
    "fast-at": FAST,
    "free-at": FREE,
    "grad-align": replace(BASE, objective=GradAlign(), threat=replace(ONE_STEP, start="zero", mode="batch")),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_objective_trains(name, blobs, tmp_path):
    recipe = replace(EVERY[name], epochs=5, batch_size=20, augment=False, health=True)
    run = train(recipe, network(), blobs, out=tmp_path / "run")
    assert run.result["best"]["clean"] > 0.6
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"]


@pytest.mark.parametrize("recipe", [FREE, FAST, AWP], ids=["free-at", "fast-at", "awp"])
def test_a_killed_run_ends_bit_identical(recipe, blobs, tmp_path):
    whole = train(recipe, network(), blobs, out=tmp_path / "whole")
    with dies_before("optimizer-2"):
        train(recipe, network(), blobs, out=tmp_path / "killed")
    killed = train(recipe, network(), blobs, out=tmp_path / "killed", resume=True)
    assert same_tensors(whole.last, killed.last)


def test_the_optimizer_has_the_settings_of_the_recipe():
    recipe = replace(BASE, nesterov=True, momentum=0.8, weight_decay=3e-4, lr=0.02)
    (group,) = make_optimizer(recipe, Plain()).param_groups
    assert {key: group[key] for key in ("nesterov", "momentum", "weight_decay", "lr")} == {
        "nesterov": True, "momentum": 0.8, "weight_decay": 3e-4, "lr": 0.02,
    }  # fmt: skip
    (group,) = make_optimizer(replace(recipe, optimizer="adamw", nesterov=False), Plain()).param_groups
    assert (group["weight_decay"], group["lr"]) == (3e-4, 0.02)


def test_free_at_steps_once_a_replay(blobs, tmp_path, monkeypatch):
    steps, real = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *a: steps.append(1) or real(self, *a))
    train(replace(FREE, epochs=2), network(), blobs, out=tmp_path / "run")
    assert len(steps) == 2 * (180 // 60) * 3


@pytest.mark.parametrize(("fall", "epochs", "overfitted"), [(0.5, 2, 3), (0.15, 4, None)])
def test_a_planted_fall_of_the_probe_ends_the_run_with_the_epoch_before(
    fall, epochs, overfitted, blobs, tmp_path, monkeypatch
):
    calls = []

    def planted(_self, _model, _x, y, _threat):
        calls.append(len(y))
        return torch.arange(len(y)) < len(y) * (0.9 - (fall if len(calls) == 3 else 0))

    monkeypatch.setattr(FastAt, "probe", planted)
    model = network()
    run = train(replace(FAST, epochs=4), model, blobs, out=tmp_path / "run")
    assert set(calls) == {60}
    assert run.result["epochs"] == epochs
    assert run.result["overfitted"] == overfitted
    assert [entry["epoch"] for entry in run.metrics] == list(range(1, epochs + 1))
    assert run.metrics[0]["probe"] == pytest.approx(0.9)
    kept = load_tensors(run.last)[0]
    assert load_tensors(run.last)[1]["epoch"] == epochs
    assert all(same_bits(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_the_probe_leaves_the_run_as_it_was(blobs, tmp_path, monkeypatch):
    with_probe = train(FAST, network(), blobs, out=tmp_path / "a")
    monkeypatch.delattr(FastAt, "probe")
    without = train(FAST, network(), blobs, out=tmp_path / "b")
    assert same_tensors(with_probe.last, without.last)
    assert 0 <= with_probe.metrics[0]["probe"] <= 1


def test_awp_sets_in_after_its_warmup_and_changes_the_run(blobs, tmp_path, monkeypatch):
    used, real = [], Awp.weights
    monkeypatch.setattr(Awp, "weights", lambda self, *a: used.append(1) or real(self, *a))
    perturbed = train(AWP, network(), blobs, out=tmp_path / "a")
    plain = train(replace(AWP, awp=None), network(), blobs, out=tmp_path / "b")
    assert len(used) == 2 * 3  # epochs 2 and 3
    assert not same_tensors(perturbed.last, plain.last)


def test_awp_under_a_selection_moves_only_what_trains(blobs, tmp_path):
    recipe = replace(BASE, objective=Clat(), tuner=Critical(), awp=Awp(gamma=0.05))
    run = train(recipe, network(), blobs, out=tmp_path / "run")  # the loop checks the frozen tensors bit by bit
    assert run.result["epochs"] == 3


def test_layers_selected_again_keep_their_momentum_and_new_ones_start_without(plain):
    def step(names, stored):
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(name in names)
            parameter.grad = torch.ones_like(parameter) if name in names else None
        optimizer = make_optimizer(replace(BASE, weight_decay=0.0), plain)
        load_optimizer_state(optimizer, plain, stored)
        optimizer.step()
        return optimizer_state(optimizer, plain)

    first = step({"first.weight"}, {})
    both = step({"first.weight", "last.weight"}, first)
    assert (both["first.weight|momentum_buffer"] == 1 + 0.9).all()
    assert (both["last.weight|momentum_buffer"] == 1).all()


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_methods import AWP, network, replace, train
from clat.training.averaging import Average
from clat.data.dataset import Dataset
from clat.training import loop
pixels, labels = torch.load({data!r}, weights_only=True)
data = Dataset(pixels, labels, ("top", "middle", "bottom"), "blobs", "train")
model, finish = network(), loop.write_result
def keep(job, *arguments):
    state = {{"model": dict(model.state_dict()), "average": job.averaged.tensors}}
    torch.save(state, {out!r} + str(job.processes.rank))
    finish(job, *arguments)
loop.write_result = keep
train(replace(AWP, average=Average(decay=0.9)), model, data, out={out!r})
"""


def test_two_processes_end_with_equal_weights_under_awp_and_averaging(blobs, tmp_path):
    """Slow (20 s alone): starts two processes of its own, in which AWP and averaging could drift apart."""
    torch.save((blobs.pixels, blobs.labels), tmp_path / "data.pt")
    script, out = tmp_path / "run.py", str(tmp_path / "run")
    script.write_text(SCRIPT.format(tests=os.path.dirname(__file__), data=str(tmp_path / "data.pt"), out=out))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:3000]
    first, second = (torch.load(out + rank, weights_only=True) for rank in "01")
    for kind, tensors in first.items():
        assert all(same_bits(tensor, second[kind][name]) for name, tensor in tensors.items()), kind


def rates(recipe):
    return [learning_rate(recipe, e, s, steps=3, selected=1) for e in range(1, recipe.epochs + 1) for s in range(3)]


def test_a_step_schedule_takes_a_tenth_from_each_milestone_on():
    recipe = replace(BASE, epochs=5, lr=1.0, schedule="step", milestones=(3, 5))
    assert rates(recipe)[::3] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_a_cyclic_schedule_is_a_triangle_that_never_trains_at_zero():
    found = rates(replace(BASE, epochs=5, lr=1.0, schedule="cyclic", peak=0.4))
    assert found == pytest.approx([min((i + 0.5) / 6, (14.5 - i) / 9) for i in range(15)])
    assert min(found) > 0


def test_the_momentum_cycles_against_the_learning_rate(blobs, tmp_path, monkeypatch):
    seen, real = [], torch.optim.SGD.step

    def spy(self, *arguments):
        seen.append([(group["lr"], group["momentum"]) for group in self.param_groups])
        return real(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    train(replace(FAST, decay="kernels"), network(), blobs, out=tmp_path / "run")
    assert all(len(groups) == 2 and groups[0] == groups[1] for groups in seen)
    momenta = [groups[0][1] for groups in seen]
    assert momenta == pytest.approx([0.9 - groups[0][0] for groups in seen])  # lr is 0.1 at the peak
    assert min(momenta) == pytest.approx(0.8, abs=0.02)
    assert momenta[0] == momenta[-1] == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize(
    ("decay", "spared"),
    [
        ("all", set()),
        ("no_norm", {"first_norm.weight", "first_norm.bias", "second_norm.weight", "second_norm.bias"}),
        ("kernels", {f"{n}.bias" for n in ("first", "second", "last", "first_norm", "second_norm")}
                    | {"first_norm.weight", "second_norm.weight"}),
    ],
)  # fmt: skip
def test_weight_decay_shrinks_exactly_what_it_says(decay, spared):
    model = Plain()
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    for kind in ("sgd", "adamw"):
        recipe = replace(BASE, optimizer=kind, decay=decay, lr=0.1, weight_decay=0.5)
        make_optimizer(recipe, model).step()
    assert {name for name, parameter in model.named_parameters() if (parameter == 1).all()} == spared


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"trades": {"beta": 1}}, "trades keys are given"),
        ({"objective": "trades", "mart": {"beta": 1}}, "mart keys are given"),
        ({"free_at": {"replays": 4}}, "free_at keys are given.*use free-at"),
        ({"tuner": "rift", "critical": {"k": 2}}, "critical keys are given"),
        ({"schedule": "step"}, "milestones"),
        ({"milestones": [3]}, "milestones"),
        ({"schedule": "cyclic", "peak": 1.0}, "peak"),
        ({"cycle_momentum": True}, "cycle_momentum"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys, named):
    with pytest.raises(InputError, match=named):
        Recipe.from_keys(keys)
