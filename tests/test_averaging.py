"""Averaged weights against the sums written out, and a run that validates and keeps them."""

from dataclasses import replace

import pytest
import torch

from clat.checkpoint import load_checkpoint, load_tensors
from clat.cli.main import main
from clat.errors import InputError
from clat.evaluation.evaluate import evaluate
from clat.network import same_bits, snapshot
from clat.threat import Threat
from clat.training import saving
from clat.training.averaging import Average, Averaged
from clat.training.batches import split
from clat.training.recipe import Recipe
from clat.training.train import train
from conftest import Plain, dies_before, network, same_tensors

RECIPE = Recipe(
    epochs=3, batch_size=60, lr=0.05, holdout=60, validation_steps=2, health=False, augment=False, precision="fp32",
    threat=Threat(eps=0.1, step=0.05, steps=2), average=Average(decay=0.8),
)  # fmt: skip


def walk(model, steps):
    """Moves one weight and a running mean in each of so many steps; yields the step."""
    for step in range(steps):
        model.first.weight.data.fill_(float(step))
        model.first_norm.running_mean.fill_(10.0 * step)
        model.first_norm.num_batches_tracked.fill_(step)
        yield step


def test_ema_weighs_each_step(plain):
    averaged, expected = Averaged(plain, Average(decay=0.7)), None
    for step in walk(plain, 30):
        averaged.take(1, last=False)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = step if expected is None else decay * expected + (1 - decay) * step
    assert averaged.tensors["first.weight"].flatten()[0].item() == pytest.approx(expected, rel=1e-5)
    assert averaged.tensors["first_norm.running_mean"][0].item() == pytest.approx(10 * expected, rel=1e-5)
    assert averaged.tensors["first_norm.num_batches_tracked"] == 29


def test_ema_from_the_start_keeps_it(plain):
    plain.first.weight.data.fill_(-4.0)
    averaged, expected = Averaged(plain, Average(decay=0.9, from_start=True)), -4.0
    for step in walk(plain, 7):
        averaged.take(1, last=False)
        expected = 0.9 * expected + 0.1 * step
    assert averaged.tensors["first.weight"].flatten()[0].item() == pytest.approx(expected, rel=1e-5)
    assert averaged.tensors["first_norm.num_batches_tracked"] == 6
    assert not averaged.first


def test_swa_from_the_start_counts_it_once(plain):
    plain.first.weight.data.fill_(-4.0)
    averaged = Averaged(plain, Average(kind="swa", start=2, from_start=True))
    for step in walk(plain, 6):
        averaged.take(1 + step // 2, last=step % 2 == 1)
    assert averaged.tensors["first.weight"].flatten()[0].item() == pytest.approx((-4 + 3 + 5) / 3)


def test_swa_is_the_mean_of_the_epochs_from_its_start(plain):
    averaged = Averaged(plain, Average(kind="swa", start=3))
    for step in walk(plain, 12):
        averaged.take(1 + step // 2, last=step % 2 == 1)
    assert averaged.tensors["first.weight"].flatten()[0].item() == pytest.approx((5 + 7 + 9 + 11) / 4)


def test_what_does_not_move_keeps_its_bits_and_the_network_comes_back(plain):
    averaged = Averaged(plain, Average(decay=0.37))
    for _ in walk(plain, 20):
        averaged.take(1, last=True)
    before = snapshot(plain)
    with averaged.swapped_in():
        inside = snapshot(plain)
    moved = {"first.weight", "first_norm.running_mean"}
    assert {name for name in inside if not same_bits(inside[name], before[name])} == moved
    assert all(same_bits(tensor, before[name]) for name, tensor in snapshot(plain).items())


def test_without_settings_nothing_is_swapped():
    model = Plain()
    averaged, before = Averaged(model, None), snapshot(model)
    averaged.take(1, last=True)
    with averaged.swapped_in():
        assert all(same_bits(tensor, before[name]) for name, tensor in snapshot(model).items())


@pytest.mark.parametrize(
    "average",
    [
        Average(decay=0.8),
        Average(kind="swa", start=2),
        Average(decay=0.9, from_start=True),
        Average(start=3, from_start=True),
    ],
    ids=["ema", "swa", "from the start", "late from the start"],
)
def test_the_best_checkpoint_is_the_average_and_a_killed_run_ends_the_same(average, blobs, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "best_epoch", lambda metrics, recipe: metrics[-1]["epoch"])
    recipe = replace(RECIPE, average=average)
    run = train(recipe, network(), blobs, out=tmp_path / "run")
    plain = train(replace(recipe, average=None), network(), blobs, out=tmp_path / "plain")
    last, best, without = (load_tensors(path)[0] for path in (run.last, run.best, plain.last))
    assert all(same_bits(last[name], without[name]) for name in last)  # averaging does not touch training
    assert load_tensors(run.best)[1]["epoch"] == 3
    assert not same_bits(last["network.conv1.weight"], best["network.conv1.weight"])
    model, _ = load_checkpoint(run.best)
    _, held_out = blobs.hold_out(60, recipe.holdout_seed)
    threat = replace(recipe.threat, steps=2)
    assert evaluate(model, held_out, threat, seed=0).clean.value == run.result["best"]["clean"]

    with dies_before("last", time=2):
        train(recipe, network(), blobs, out=tmp_path / "killed")
    killed = train(recipe, network(), blobs, out=tmp_path / "killed", resume=True)
    assert all(same_bits(tensor, best[name]) for name, tensor in load_tensors(killed.best)[0].items())


@pytest.mark.parametrize("keys", [{"kind": "mean"}, {"decay": 1.0}, {"decay": 0.0}, {"start": 0}])
def test_values_out_of_range_are_refused(keys):
    with pytest.raises(InputError, match="average"):
        Average(**keys)


def test_the_averaged_last_is_kept_evaluated_and_mended(blobs, tmp_path, monkeypatch, capsys):
    """Where the best is the first epoch, ``averaged`` alone holds the average after the last one."""

    monkeypatch.setattr(saving, "best_epoch", lambda metrics, recipe: 1)
    run = train(RECIPE, network(), blobs, out=tmp_path / "run")
    (averaged, facts), (last, _), (best, _) = (load_tensors(path) for path in (run.averaged, run.last, run.best))
    optimizer, _ = load_tensors(run.optimizer(3))
    assert facts["epoch"] == 3
    for name in averaged:
        assert same_bits(averaged[name], optimizer[f"average/{name}"])
    name = "network.conv1.weight"
    assert not same_bits(averaged[name], last[name])
    assert not same_bits(averaged[name], best[name])
    model, _ = load_checkpoint(run.averaged)
    _, held_out = blobs.hold_out(60, RECIPE.holdout_seed)
    assert evaluate(model, held_out, RECIPE.threat, seed=0).clean.value == run.metrics[-1]["clean"]
    assert main(["status", str(run.folder)]) == 0
    assert "averaged.safetensors holds the averaged weights" in " ".join(capsys.readouterr().out.split())

    for time in (1, 2, 3):
        with dies_before("averaged", time=time):
            train(RECIPE, network(), blobs, out=tmp_path / f"killed-{time}")
        killed = train(RECIPE, network(), blobs, out=tmp_path / f"killed-{time}", resume=True)
        assert same_tensors(killed.averaged, run.averaged)
    run.averaged.unlink()  # the tensors above are read from it still
    run.averaged.write_bytes(b"cut")
    train(RECIPE, network(), blobs, out=run.folder, resume=True)
    assert all(same_bits(tensor, averaged[name]) for name, tensor in load_tensors(run.averaged)[0].items())


def test_before_the_start_and_without_averaging_there_is_no_average_to_keep(blobs, tmp_path):
    later = replace(RECIPE, epochs=1, average=Average(start=2))
    for name, recipe in (("later", later), ("none", replace(RECIPE, epochs=1, average=None))):
        run = train(recipe, Plain(), blobs, out=tmp_path / name)
        assert run.last.exists()
        assert not run.averaged.exists()


def test_training_images_are_measured_as_the_held_out_ones_are(blobs, tmp_path):
    run = train(replace(RECIPE, train_sample=40), network(), blobs, out=tmp_path / "run")
    training, held = split(len(blobs), RECIPE.holdout, RECIPE.holdout_seed, None)
    sample = torch.randperm(len(training), generator=torch.Generator().manual_seed(RECIPE.holdout_seed))[:40]
    model = load_checkpoint(run.averaged)[0]
    for prefix, places in (("", held), ("train_", training[sample])):
        found = evaluate(model, blobs.subset(places), replace(RECIPE.threat, start="uniform"))
        entry = run.metrics[-1]
        assert (entry[f"{prefix}clean"], entry[f"{prefix}robust"]) == (found.clean.value, found.robust.value)
    assert run.metrics[-1]["train_images"] == 40
    without = train(replace(RECIPE, train_sample=0), network(), blobs, out=tmp_path / "without")
    assert not any(key.startswith("train_") for key in without.metrics[-1])
    more = train(replace(RECIPE, train_sample=100), network(), blobs, out=tmp_path / "more")
    assert more.metrics[-1]["train_images"] == RECIPE.holdout
    assert same_tensors(run.last, without.last)
    assert same_tensors(run.last, more.last)
