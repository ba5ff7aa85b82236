"""How long a run trains: patience, other epochs on resume, and what it says and calls as epochs end."""

from dataclasses import replace

import pytest
from rich.console import Console

from clat.cli.main import main
from clat.errors import InputError
from clat.threat import Threat
from clat.training import job, loop
from clat.training.optimizer import learning_rate
from clat.training.recipe import Recipe
from clat.training.runs import Run
from clat.training.train import train
from clat.tuners import Critical
from conftest import dies_before, network, same_tensors

SHORT = Recipe(
    epochs=4,
    batch_size=32,
    images=32,
    holdout=60,
    lr=0.01,
    schedule="constant",
    threat=Threat(eps=0.1, step=0.05, steps=1),
    validation_steps=1,
    health=False,
)


@pytest.fixture
def robust(monkeypatch):
    """Epoch by epoch, the robust validation accuracy that runs are told; the rest is as measured."""
    told = [0.2, 0.5, 0.4, 0.3, 0.6, 0.1, 0.1, 0.1]
    real = loop.validate
    monkeypatch.setattr(
        loop, "validate", lambda job, epoch, *rest: {**real(job, epoch, *rest), "robust": told[epoch - 1]}
    )
    return told


PATIENT = replace(SHORT, epochs=8, patience=2, schedule="cosine")


def epochs(run):
    return [entry["epoch"] for entry in run.metrics]


@pytest.mark.usefixtures("robust")
def test_a_run_ends_when_its_patience_does(blobs, tmp_path):
    run = train(PATIENT, network(), blobs, out=tmp_path / "run")
    assert (epochs(run), run.result["epochs"], run.result["best"]["epoch"]) == ([1, 2, 3, 4], 4, 2)
    assert "last epoch 4" in run.in_words()
    fitted = f"while it has {100 * run.metrics[-1]['train_robust']:.1f} % on training images"
    assert f"The last is 20.0 points less robust, {fitted}: robust overfitting. Use best" in run.in_words()
    ended = run.last.read_bytes()
    train(PATIENT, network(), blobs, out=run.folder, resume=True)
    assert run.last.read_bytes() == ended
    train(replace(PATIENT, patience=3), network(), blobs, out=run.folder, resume=True)
    assert (epochs(run), run.result["best"]["epoch"], run.recipe["patience"]) == ([*range(1, 9)], 5, 3)
    whole = train(replace(PATIENT, patience=None), network(), blobs, out=tmp_path / "whole")
    assert same_tensors(whole.last, run.last)


@pytest.mark.usefixtures("robust")
def test_a_killed_run_ends_where_it_would_have(blobs, tmp_path):
    whole = train(PATIENT, network(), blobs, out=tmp_path / "whole")
    with dies_before("last", time=4):
        train(PATIENT, network(), blobs, out=tmp_path / "killed")
    killed = Run(tmp_path / "killed")
    assert "in 2 epochs" not in killed.in_words()
    assert "10.0 points less robust, which on 60 images may be chance" in killed.in_words()  # of epochs 1 to 3
    train(PATIENT, network(), blobs, out=killed.folder, resume=True)
    assert same_tensors(whole.last, killed.last)
    assert same_tensors(whole.best, killed.best)
    assert (epochs(killed), killed.result["best"]) == (epochs(whole), killed.metrics[1])


def test_status_says_best_and_last(robust, blobs, tmp_path, capsys):
    run = train(replace(SHORT, epochs=2), network(), blobs, out=tmp_path / "run")
    assert main(["status", str(run.folder)]) == 0
    assert f"Best epoch 2, the last: validation clean {100 * run.metrics[1]['clean']:.1f} %, robust 50.0 %." in (
        capsys.readouterr().out
    )
    robust[0] = 0.55
    run = train(replace(SHORT, epochs=2), network(), blobs, out=tmp_path / "run", overwrite=True)
    main(["status", str(run.folder)])
    assert "The last is 5.0 points less robust, which on 60 images may be chance." in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize("end", ["finished", "killed"])
def test_a_run_goes_on_for_more_epochs(end, blobs, tmp_path):
    whole = train(SHORT, network(), blobs, out=tmp_path / "whole")
    first = replace(SHORT, epochs=2 if end == "finished" else 3)
    if end == "finished":
        train(first, network(), blobs, out=tmp_path / "run")
    else:
        with dies_before("last", time=3):
            train(first, network(), blobs, out=tmp_path / "run")
    with dies_before("recipe.yaml"):  # the old result is gone by then, the old recipe is not
        train(SHORT, network(), blobs, out=tmp_path / "run", resume=True)
    run = Run(tmp_path / "run")
    assert not run.finished
    assert run.recipe["epochs"] == first.epochs
    train(SHORT, network(), blobs, out=run.folder, resume=True)
    assert same_tensors(whole.last, run.last)
    assert same_tensors(whole.best, run.best)
    assert (run.recipe["epochs"], run.result["epochs"]) == (4, 4)


RESTARTED = replace(SHORT, schedule="cosine", tuner=Critical(every=2, lr_schedule="restart"))


@pytest.mark.parametrize(
    ("begun", "then", "says"),
    [
        (replace(SHORT, schedule="cosine"), {"epochs": 5}, "cosine schedule depends on them: with 5 the epochs"),
        (replace(SHORT, schedule="cyclic"), {"epochs": 4}, "cyclic schedule depends on them"),
        (replace(RESTARTED, epochs=3), {"epochs": 4}, "cosine schedule depends on them"),
        (SHORT, {"epochs": 2}, "has 4 epochs; epochs 2 cannot be fewer"),
        (SHORT, {"epochs": 5, "lr": 0.02}, "started with another lr"),
    ],
)
def test_what_would_change_earlier_epochs_is_refused(begun, then, says, blobs, tmp_path):
    begun = replace(begun, epochs=4 if "fewer" in says else 3)
    run = train(begun, network(), blobs, out=tmp_path / "run")
    kept = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    with pytest.raises(InputError, match=says):
        train(replace(begun, **then), network(), blobs, out=run.folder, resume=True)
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == kept


def test_a_schedule_that_restarts_goes_on_after_a_whole_one(blobs, tmp_path):
    whole = train(RESTARTED, network(), blobs, out=tmp_path / "whole")
    train(replace(RESTARTED, epochs=2), network(), blobs, out=tmp_path / "run")
    run = train(RESTARTED, network(), blobs, out=tmp_path / "run", resume=True)
    assert same_tensors(whole.last, run.last)


def test_the_learning_rate_warms_up():
    recipe = replace(SHORT, warmup=2, lr=0.4)
    rates = [learning_rate(recipe, epoch, step, 2, 1) for epoch in (1, 2, 3) for step in (0, 1)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    cosine, cold = replace(recipe, schedule="cosine"), replace(recipe, schedule="cosine", warmup=0)
    assert learning_rate(cosine, 2, 0, 2, 1) == pytest.approx(0.75 * learning_rate(cold, 2, 0, 2, 1))
    restarted = replace(recipe, tuner=Critical(every=3, lr_schedule="restart"))
    assert learning_rate(restarted, 4, 0, 2, 4) == pytest.approx(0.1)
    with pytest.raises(InputError, match="warmup works without the schedule cyclic"):
        replace(recipe, schedule="cyclic")


def test_each_epoch_is_told_once_it_is_saved(blobs, tmp_path):
    told = []

    def tell(entry):
        assert Run(tmp_path / "run").epoch == entry["epoch"]
        told.append(entry)
        if len(told) == 2:
            raise KeyError("pruned")

    with pytest.raises(KeyError, match="pruned"):
        train(SHORT, network(), blobs, out=tmp_path / "run", on_epoch=tell)
    run = train(SHORT, network(), blobs, out=tmp_path / "run", resume=True, on_epoch=tell)
    assert told == run.metrics


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_shows_a_bar_where_it_can(widgets, blobs, tmp_path, monkeypatch):
    """rich draws a bar in a notebook with ipywidgets and warns without them, so that there is none then."""
    monkeypatch.setattr(job, "find_spec", lambda name: object() if widgets else None)
    shown, real = [], job.Progress
    monkeypatch.setattr(job, "Progress", lambda *args, disable, **keys: shown.append(not disable) or real(
        *args, **{**keys, "disable": True}))  # fmt: skip
    notebook = Console(force_jupyter=True)
    monkeypatch.setattr(notebook, "print", lambda *words, **keys: None)
    train(replace(SHORT, epochs=1), network(), blobs, out=tmp_path / "run", console=notebook)
    assert shown == [widgets]
