"""What a run writes: its start, each epoch as it ends, and its result; and how a run is resumed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from clat.checkpoint import load_tensors, load_weights, save_checkpoint, save_tensors
from clat.data.dataset import Dataset
from clat.data.varying import PolicyName
from clat.errors import InputError
from clat.network import State, fingerprint, tensors
from clat.text import plain
from clat.training.claims import clear
from clat.training.contents import ADDED
from clat.training.environment import environment
from clat.training.job import Job
from clat.training.optimizer import learning_rate, load_optimizer_state, make_optimizer, optimizer_state
from clat.training.recipe import Recipe
from clat.training.runs import Run
from clat.training.validation import Metrics, accuracy, best_epoch
from clat.tuners.selection import Selection

LENGTH = ("epochs", "patience")  # keys that may change when a run is resumed

# The beginning


def begin(job: Job, data: Dataset, origin: str | None) -> None:
    """Makes the folder a run's: its settings and its network. An earlier run in it is removed.

    Args:
        data: the training split as given, with the images that are held out
        origin: where the network's weights come from
    """
    run, extra, digest = job.run, job.images.extra, data.digest()
    if job.processes.of_first(digest) != digest:
        raise InputError(f"Process {job.processes.rank} has other data than the first one; give all the same.")
    facts = {
        "model": getattr(job.model, "spec", None) or type(job.model).__qualname__,
        "from": origin,
        "parameters": sum(parameter.numel() for parameter in job.model.parameters()),
        "data": {"source": data.source, "split": data.split, "images": len(data), "sha256": digest},
        "extra": {"images": len(extra), "sha256": extra.digest()} if extra else None,
    }

    def write() -> None:
        clear(run)
        run.write("start.json", {name: fingerprint(tensor) for name, tensor in tensors(job.model).items()})
        run.write("environment.json", {**facts, **environment(job.processes.device, job.processes.count)})
        run.write("recipe.yaml", job.recipe.keys())  # last: from here on the folder is a run

    job.processes.by_first(write)
    if job.processes.totals(int(run.exists))[0] < job.processes.count:
        raise InputError(
            f"Some processes do not see {plain(run.folder)}, which the first one made; choose an --out on a file "
            "system that all machines share."
        )


def check_same_run(run: Run, recipe: Recipe, data: Dataset) -> None:
    """Raises InputError unless the run in the folder was started with this recipe, on this data.

    Keys that an objective or tuner got since then must have their defaults. Epochs and patience may be others, if the
    epochs that are done stay as they are.
    """
    wanted, stored = recipe.keys(), run.recipe
    own = [] if stored.get("augment", True) in (True, False, *get_args(PolicyName)) else ["augment"]  # a function
    changed = [key for key in ("objective", "tuner", *own) if stored.get(key, wanted[key]) != wanted[key]]
    missing = [key for key in wanted if key not in stored and key not in ADDED]
    if missing and not changed:
        raise run.unusable("recipe.yaml", f"is damaged (it lacks {', '.join(missing)})")
    if not changed:
        try:
            begun = Recipe.from_keys(stored, like=recipe)
        except InputError as error:
            raise run.unusable("recipe.yaml", f"is damaged ({str(error).rstrip('.')})") from error
        if "accumulate" not in stored and begun.augment:  # an earlier clat knew this one alone
            begun = replace(begun, augment="padded-crop")
        wanted, found = (replace(each, augment=each.augmentation(data.shape)).keys() for each in (recipe, begun))
        changed = [key for key in wanted if wanted[key] != found[key] and key not in LENGTH]
    if changed:
        raise InputError(
            f"The run in {run.folder} was started with another {', '.join(changed)}; resume it with the same "
            "recipe, or start a new run."
        )
    if recipe.epochs != stored["epochs"]:
        _check_length(run, recipe)
    if run.environment["data"]["sha256"] != data.digest():
        raise InputError(
            f"The run in {run.folder} was started on other data than {data.source}; resume it on the same."
        )


def _check_length(run: Run, recipe: Recipe) -> None:
    """Raises InputError if another number of epochs would have changed the epochs that the run has finished."""
    done, before = run.epoch, replace(recipe, epochs=run.recipe["epochs"])
    if recipe.epochs < done:
        raise InputError(f"The run in {plain(run.folder)} has {done} epochs; epochs {recipe.epochs} cannot be fewer.")
    due = [epoch for epoch in range(1, done + 1) if recipe.tuner.due(epoch)]
    for epoch in range(1, done + 1):
        selected = max(earlier for earlier in due if earlier <= epoch)
        first, second = (learning_rate(each, epoch, 1, 2, selected) for each in (before, recipe))
        if first != second:
            raise InputError(
                f"The run in {plain(run.folder)} was started with epochs {before.epochs}, and its {recipe.schedule} "
                f"schedule depends on them: with {recipe.epochs} the epochs that are done would have had other "
                "learning rates; leave epochs as they are, or train on from its last checkpoint in a run of its own: "
                f"clat finetune RECIPE --from {plain(run.last)} --out ANOTHER."
            )


def check_same_start(job: Job, start: State) -> None:
    """Raises InputError unless the run in the folder began with such a network and such extra images.

    A tuner that blends the network with its start at the end, and an objective that learns from the start, need the
    very weights that the run began with.
    """
    run, extra = job.run, job.images.extra
    began, method = run.start, job.method
    needed = method.tuner.ends or method.objective.learns_from_start()
    if began.keys() != start.keys():
        other = "another network"
    elif needed and {name: fingerprint(tensor) for name, tensor in start.items()} != began:
        other = "other weights"
    else:
        other = ""
    if other:
        raise InputError(f"The run in {run.folder} began with {other}; resume it from the network that it began with.")
    if extra and run.environment["extra"]["sha256"] != extra.digest():
        raise InputError(
            f"The run in {run.folder} was started with other extra images or labels; resume it with the same."
        )


# Each epoch


def commit(
    job: Job, optimizer: torch.optim.Optimizer, metrics: Sequence[Metrics], selections: Sequence[Selection]
) -> None:
    """Commits the last epoch by renaming ``last`` into place."""
    job.processes.by_first(lambda: write_epoch(job, optimizer, metrics, selections))


def write_epoch(
    job: Job, optimizer: torch.optim.Optimizer, metrics: Sequence[Metrics], selections: Sequence[Selection]
) -> None:
    """The files of an epoch, in the order in which a kill between any two of them does no harm."""
    run, epoch = job.run, metrics[-1]["epoch"]
    # Where the tuner has changed the network, ``last`` holds its ordinary form, and this one is with the optimizer.
    network = job.model.state_dict() if job.method.tuner.state(job.model) is not None else {}
    sections = {
        "optimizer": optimizer_state(optimizer, job.model),
        "average": job.averaged.tensors,
        "network": network,
        "warm": job.images.warm.tensors if job.images.warm else {},
    }
    stored = {f"{kind}/{name}": tensor for kind, part in sections.items() for name, tensor in part.items()}
    save_tensors(run.optimizer(epoch), stored, epoch=epoch, averaged=job.averaged.count)
    run.write("selections.jsonl", [selection.to_json() for selection in selections])
    run.write("metrics.jsonl", list(metrics))
    _save(job, run.last, metrics[-1])
    if job.averaged.tensors:
        _save_averaged(job, run.averaged, metrics[-1])
    if best_epoch(metrics, job.recipe) == epoch:
        _save_averaged(job, run.best, metrics[-1])
    for path in run.folder.glob("optimizer-*.safetensors"):
        if path != run.optimizer(epoch):
            path.unlink()


def _save_averaged(job: Job, path: Path, entry: Metrics) -> None:
    """The average of the weights, or the weights themselves where none are averaged."""
    with job.averaged.swapped_in():
        _save(job, path, entry)


def _save(job: Job, path: Path, entry: Metrics, **facts: Any) -> None:
    selection, recipe = job.method.selection, job.recipe
    save_checkpoint(
        path,
        job.model,
        job.method.tuner.state(job.model),
        epoch=entry["epoch"],
        validation={key: entry[key] for key in ("clean", "robust", "validation_images")},
        data={**job.images.identity, "classes": job.images.training.classes, "shape": job.images.training.shape},
        holdout={"images": recipe.holdout, "seed": recipe.holdout_seed},
        selected=list(selection.layers) if selection and selection.partial(job.model) else None,
        **facts,
    )


# Taken up again


def restore(job: Job) -> tuple[list[dict[str, Any]], list[Selection], torch.optim.Optimizer | None]:
    """Metrics, selections and optimizer after the last finished epoch, with the network as it was then."""
    run, tuner = job.run, job.method.tuner
    metrics, selections = run.progress()
    epoch = len(metrics)
    if not epoch:
        job.processes.by_first(lambda: _lengthen(job))
        return [], [], None
    due = [earlier for earlier in range(1, epoch + 1) if tuner.due(earlier)]
    if (made := [selection.epoch for selection in selections]) != due:
        raise run.unusable("selections.jsonl", f"holds the selections of epochs {made} and not those of {due}")
    try:
        load_weights(run.last, job.model)
    except InputError as error:
        raise InputError(f"{str(error).rstrip('.')}; resume the run with the network that it began with.") from error
    optimizer = _restore_selection(job, selections[-1])
    _restore_optimizer(job, epoch, optimizer)
    job.method.mark()
    job.processes.by_first(lambda: _lengthen(job))
    job.processes.by_first(lambda: _mend(job, metrics))
    return metrics, selections, optimizer


def _lengthen(job: Job) -> None:
    """Puts other epochs and patience into the run's recipe. Its result goes first: it is no longer that of the run."""
    run, wanted = job.run, job.recipe.keys()
    if any(run.recipe.get(key) != wanted[key] for key in LENGTH):
        (run.folder / "result.json").unlink(missing_ok=True)
        run.write("recipe.yaml", wanted)


def _restore_selection(job: Job, selection: Selection) -> torch.optim.Optimizer:
    """Puts a stored selection into effect, and makes the optimizer of what it trains."""
    try:
        job.method.take(selection)
        optimizer = make_optimizer(job.recipe, job.model)
        if unknown := set(selection.trainable) - dict(job.model.named_parameters()).keys():
            raise AttributeError(f"the network has no parameter {min(unknown)}")
        for name in selection.training:
            job.model.get_submodule(name)
    except (AttributeError, InputError) as error:
        reason = plain(str(error).rstrip("."))
        raise job.run.unusable("selections.jsonl", f"does not fit the network ({reason})") from error
    return optimizer


def _restore_optimizer(job: Job, epoch: int, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's state, the average and the tuner's form of the network, as after that epoch."""
    run, path = job.run, job.run.optimizer(epoch)
    remedy = (
        f"{run.last.name} holds the weights of epoch {epoch} and is intact: start from it with clat finetune "
        f"RECIPE --from {plain(run.last)} --out ANOTHER, or put {path.name} back from a copy"
    )
    if not path.exists():
        raise run.unusable(path.name, "is missing", remedy)
    try:
        stored, facts = load_tensors(path)
        state = {kind: _section(stored, kind) for kind in ("optimizer", "average", "network", "warm")}
        load_optimizer_state(optimizer, job.model, state["optimizer"])
        average = {name: tensor.to(job.processes.device) for name, tensor in state["average"].items()}
        job.averaged.count, job.averaged.tensors = int(facts["averaged"]), average
        if job.images.warm:
            job.images.warm.tensors = {key: state["warm"][key].to(job.processes.device) for key in ("delta", "known")}
        if state["network"]:
            job.model.load_state_dict(state["network"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = plain(" ".join(str(error).split())[:300]).rstrip(".")
        raise run.unusable(path.name, f"is damaged ({reason})", remedy) from error


def _section(stored: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors stored under ``kind/``."""
    prefix = f"{kind}/"
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}


def _mend(job: Job, metrics: Sequence[Metrics]) -> None:
    """Writes again what other files hold too: the average, the best checkpoint if it is the last, and the result."""
    run, best, last = job.run, best_epoch(metrics, job.recipe), len(metrics)
    held, why = _held(run, run.averaged)
    if job.averaged.tensors and held != last:
        _save_averaged(job, run.averaged, metrics[-1])
        job.say(f"{run.averaged.name} {why}; written again from {run.optimizer(last).name}")
    held, why = _held(run, run.best)
    if held != best:
        if best != last:
            raise run.unusable(run.best.name, f"{why}, and epoch {best} is the best by metrics.jsonl")
        _save_averaged(job, run.best, metrics[-1])
        job.say(f"best.safetensors {why}; written again from epoch {best}")
    if last == job.recipe.epochs:
        try:
            _ = run.result
        except InputError:
            job.say("result.json is missing or damaged; written again from metrics.jsonl")


def _held(run: Run, path: Path) -> tuple[int | None, str]:
    """The epoch that a checkpoint of the run holds, and what is wrong if it should hold another."""
    try:
        return run.epoch_of(path), "holds another epoch"
    except InputError:
        return None, "is damaged" if path.exists() else "is missing"


# The end


def end_best(job: Job, start: State, metrics: Sequence[Metrics]) -> dict[str, Any]:
    """Lets the tuner change the best network and stores its facts; a resumed run that already did keeps the result.

    Args:
        start: every tensor as it was before the first epoch
    """
    tuner, run = job.method.tuner, job.run
    if not tuner.ends:
        return {}
    facts = load_weights(run.best, job.model)
    job.averaged.stop()  # where weights were averaged, the best are
    job.processes.wait()  # every process has read it before the first one writes
    if "end" not in facts:
        facts["end"] = tuner.end(job.model, start, lambda: accuracy(job)[:2])
        entry = next(entry for entry in metrics if entry["epoch"] == facts["epoch"])
        best = {**entry, **facts["end"]}
        job.processes.by_first(lambda: _save(job, run.best, best, end=facts["end"]))
    return facts["end"]


def write_result(job: Job, metrics: Sequence[Metrics], overfitted: int | None, end: Mapping[str, Any]) -> None:
    """The summary.

    Args:
        overfitted: the epoch that ended the run early and was dropped, if one did
        end: what ``end_best`` returned
    """
    chosen = best_epoch(metrics, job.recipe)
    best = next(entry for entry in metrics if entry["epoch"] == chosen)
    best = {**best, **{key: end[key] for key in ("clean", "robust") if key in end}}
    result = {
        "epochs": len(metrics),
        "overfitted": overfitted,
        "best": best,
        **({"end": end} if end else {}),
        "last": metrics[-1],
        "robust_gap": best["robust"] - metrics[-1]["robust"],
        "seconds": round(sum(entry["seconds"] for entry in metrics), 3),
        "trainable": max(entry["trainable"] for entry in metrics),
        "parameters": sum(parameter.numel() for parameter in job.model.parameters()),
    }
    job.processes.by_first(lambda: job.run.write("result.json", result))
