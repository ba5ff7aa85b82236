"""The one training loop, for pre-training and fine-tuning, any objective and any tuner, one process or several."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from clat.checkpoint import load_tensors, load_weights, save_checkpoint, save_tensors
from clat.compute import autocast, best_device, choose, in_words, layout_of, seeded, set_layout
from clat.data.arrays import as_dataset
from clat.data.crops import Crops
from clat.data.dataset import Dataset, to_unit
from clat.errors import InputError
from clat.evaluation.evaluate import evaluate
from clat.evaluation.fits import check_fits
from clat.network import State, fingerprint, snapshot, tensors
from clat.text import plain
from clat.threat import Threat
from clat.training.averaging import Averaged
from clat.training.health import check_attack, check_finite, check_learning
from clat.training.method import Method
from clat.training.optimizer import learning_rate, load_optimizer_state, make_optimizer, optimizer_state, set_rate
from clat.training.recipe import Recipe
from clat.training.runs import Run, environment
from clat.training.warm import Perturbations
from clat.tuners.selection import Selection

Value = TypeVar("Value")
ADDED = {"warm_start": False}  # keys that recipes of earlier versions lack, and what they then stand for


def train(
    recipe: Recipe,
    model: nn.Module,
    data: Any,
    *,
    out: Path | str,
    resume: bool = False,
    overwrite: bool = False,
    device: torch.device | str | None = None,
    workers: int = 2,
    origin: str | None = None,
    console: Console | None = None,
) -> Run:
    """Trains or fine-tunes a network by a recipe and records it in a run folder.

    Args:
        model: takes pixels in [0, 1], returns class scores; changed in place, and ends as it was after the last epoch,
            or as its tuner leaves it then, on the device that it came from. One that ``build_model`` did not make is
            given again to resume its run, and reads its checkpoints with ``load_weights``
        data: the training split; ``recipe.holdout`` images of it are held out for validation
        out: the run folder; no other process may train in it meanwhile
        resume: continue the run in ``out`` after its last finished epoch, or start it if there is none; on the CPU it
            ends bit-identical to an uninterrupted one
        overwrite: replace an existing run in ``out``; only files that a run wrote are removed
        device: where to train, e.g. cpu or cuda:1; default the fastest kind of device here, one for each process
        workers: processes that decode images, where these do not fit into memory
        origin: where the network's weights come from, for the record
        console: where progress goes; default none
    Raises:
        InputError: a network, data, device or folder that does not fit, or a run folder that is damaged
        HealthError: the loss is not finite, the accuracy stays at chance level, or the attack does not work
        IntegrityError: a frozen tensor changed or a selected one did not
    """
    data = as_dataset(data)
    if type(workers) is not int or workers < 0:
        raise InputError(f"workers is {workers!r}; it must be 0 or more.")
    accelerator, place = _started(device)
    run = Run(Path(out))
    came_from = {tensor.device for tensor in tensors(model).values()}
    with ExitStack() as claims:
        claim = run.claim(resume=resume, overwrite=overwrite)
        resuming = _by_first(accelerator, lambda: claims.enter_context(claim))
        if resuming:  # with what was settled when it began
            stored = run.recipe
            recipe = replace(recipe, precision=stored["precision"]) if recipe.precision == "auto" else recipe
            recipe = replace(recipe, layout=stored["layout"]) if recipe.layout == "auto" else recipe
            _check_same_run(run, recipe, data)
        model.to(place)
        check_fits(model, data, place)
        before = layout_of(model)
        settled = _settled(recipe, model, data, place)
        if console and accelerator.is_main_process:
            count = accelerator.num_processes
            words = in_words(place, settled.precision, settled.layout, recipe.layout)
            console.print(f"  {words} on {place}, {count} process{'es' if count > 1 else ''}", highlight=False)
        try:
            _Trainer(settled, model, data, run, accelerator, place, workers, console).fit(resuming, origin)
        finally:
            set_layout(model, before)
            if len(came_from) == 1:
                model.to(came_from.pop())
    return run


def _started(device: torch.device | str | None) -> tuple[Accelerator, torch.device]:
    """The processes that a launcher started, as one, and the device of this one.

    Raises:
        InputError: the launcher was asked for more processes than it started, or there is no such device
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    alone = "RANK" not in os.environ and "LOCAL_RANK" not in os.environ
    if alone and (asked > 1 or {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys()):
        # accelerate launch --cpu sets an address to meet at for several processes, but starts one and gives no ranks.
        raise InputError(
            "The launcher was asked for several processes but started one (accelerate launch does so with --cpu); on "
            "CPUs, start them with torchrun --nproc_per_node N -m clat ..., or ask for one and unset MASTER_ADDR."
        )
    wanted = None if device is None else _device(device)
    # Without cpu=True, torchrun on CPUs is not noticed; one process needs it only where nothing else is here.
    on_cpu = best_device() == "cpu" or (not alone and wanted is not None and wanted.type == "cpu")
    accelerator = Accelerator(cpu=on_cpu)
    if accelerator.num_processes < asked:
        raise InputError(
            f"The launcher was asked for {asked} processes, but {accelerator.num_processes} train together; start "
            "them with torchrun --nproc_per_node N -m clat ..., or ask for one."
        )
    if wanted is None:
        return accelerator, accelerator.device
    if accelerator.num_processes == 1:
        return accelerator, wanted
    if wanted not in (accelerator.device, torch.device(accelerator.device.type)):
        raise InputError(
            f"The processes train on {accelerator.device.type}, one device each; leave --device out, or choose their "
            "devices with the launcher."
        )
    return accelerator, accelerator.device


def _device(name: torch.device | str) -> torch.device:
    """The device of that name. Raises InputError unless a network can train on it here."""
    try:
        device = torch.device(name)
        if torch.ones(1, device=device).item() != 1:
            raise RuntimeError("it does not compute")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = plain(str(error).split("\n")[0].rstrip("."))
        raise InputError(f"There is no device {str(name)!r} here to train on ({reason}); try cpu or cuda.") from error
    return device


def _by_first(accelerator: Accelerator, action: Callable[[], Value]) -> Value:
    """What the first process gets from an action that only it does; where it fails, all end with its sentence."""
    if accelerator.num_processes == 1:
        return action()
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except InputError as error:
            outcome[1] = str(error)
    value, failure = broadcast_object_list(outcome)
    if failure is not None:
        raise InputError(failure)
    return value


def _settled(recipe: Recipe, model: nn.Module, data: Dataset, device: torch.device) -> Recipe:
    """The recipe with the precision and layout of its first process in place of auto; the network takes the layout."""
    pixels, _ = next(data.subset(torch.arange(min(8, len(data)))).to(device).batches(8, workers=0))
    found = [choose(model, to_unit(pixels), recipe.precision, recipe.layout)]  # on every process, so all may refuse
    precision, layout = broadcast_object_list(found)[0]
    set_layout(model, layout)
    return replace(recipe, precision=precision, layout=layout)


def _check_same_run(run: Run, recipe: Recipe, data: Dataset) -> None:
    wanted, stored = _plain(asdict(recipe)), _begun(run.recipe)
    missing = [key for key in wanted if key not in stored]
    if missing:
        raise run.unusable("recipe.yaml", f"is damaged (it lacks {', '.join(missing)})")
    changed = [key for key in wanted if wanted[key] != stored[key]]
    if changed:
        raise InputError(
            f"The run in {run.folder} was started with another {', '.join(changed)}; resume it with the same "
            "recipe, or start a new run."
        )
    if run.environment["data"]["sha256"] != data.digest():
        raise InputError(
            f"The run in {run.folder} was started on other data than {data.source}; resume it on the same."
        )


def _begun(stored: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a run folder, with the keys that it lacks because they are newer than it."""
    usual = _plain(asdict(Recipe()))
    blocks = {
        key: value for key, value in usual.items() if isinstance(value, dict) and isinstance(stored.get(key), dict)
    }
    return {**ADDED, **stored, **{key: {**value, **stored[key]} for key, value in blocks.items()}}


def _plain(value: Any) -> Any:
    """Tuples as lists, so that what is written equals what is read."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


class _Trainer:
    """One run in progress: what has to live from epoch to epoch."""

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        data: Dataset,
        run: Run,
        accelerator: Accelerator,
        device: torch.device,
        workers: int,
        console: Console | None,
    ):
        self.recipe, self.model, self.given, self.run, self.accelerator = recipe, model, data, run, accelerator
        self.device, self.rank, self.world = device, accelerator.process_index, accelerator.num_processes
        self.workers = workers
        if recipe.batch_size % self.world:
            raise InputError(f"batch_size {recipe.batch_size} is not a multiple of the {self.world} processes.")
        training, validation = data.hold_out(recipe.holdout, recipe.holdout_seed)
        if recipe.images is not None and recipe.images < len(training):
            order = torch.randperm(len(training), generator=torch.Generator().manual_seed(recipe.holdout_seed))
            training = training.subset(order[: recipe.images].sort().values)
        self.data = training.to(self.device)
        self.held_out = validation  # all of it; what follows is this process's part
        self.validation = validation.subset(torch.arange(self.rank, len(validation), self.world)).to(self.device)
        self.classes, self.identity = len(data.classes), data.identity()
        objective, tuner = recipe.make_objective(), recipe.make_tuner()
        self.method = Method(model, objective, tuner, recipe.threat, seed=recipe.seed, precision=recipe.precision)
        self.objective, self.tuner = objective, tuner
        self.optimizer: torch.optim.Optimizer | None = None
        self.averaged = Averaged(model, recipe.average)
        if recipe.warm_start and self.world > 1:
            raise InputError("warm_start works in one process, as images change processes from epoch to epoch.")
        self.warm = Perturbations(len(self.data), self.data.shape, self.device) if recipe.warm_start else None
        self.console = console if console and accelerator.is_main_process else Console(quiet=True)
        self.steps = max(1, len(self.data) // recipe.batch_size)
        self.size = min(recipe.batch_size, len(self.data))
        self.extra_size = recipe.extra.count(self.size, self.world) if recipe.extra else 0
        self.extra = recipe.extra.load(training, self.device) if recipe.extra else None
        for note in self.extra.notes if self.extra else ():
            self.console.print(f"  {plain(note)}", markup=False, highlight=False)

    def fit(self, resuming: bool, origin: str | None) -> None:
        start = snapshot(self.model)
        if resuming:
            self._check_start(start)
        if resuming and self.extra and self.run.environment["extra"]["sha256"] != self.extra.digest():
            raise InputError(
                f"The run in {self.run.folder} was started with other extra images or labels; resume it with the same."
            )
        if self.recipe.compile:
            self.model.compile()
        try:
            metrics, overfitted = self._train(resuming, origin)
        finally:
            self.tuner.undo(self.model)
            self.model._compiled_call_impl = None
        load_weights(self.run.last, self.model)  # if the last epoch was dropped, the one before
        self._finish(metrics, overfitted, self._end(start, metrics))

    def _train(self, resuming: bool, origin: str | None) -> tuple[list[dict[str, Any]], int | None]:
        """All epochs: their metrics, and the epoch that was dropped for overfitting, if one was."""
        recipe = self.recipe
        metrics, selections = self._restore() if resuming else ([], [])
        with _progress(self.console) as progress:
            task = progress.add_task("", total=recipe.epochs * self.steps, completed=len(metrics) * self.steps)
            for epoch in range(len(metrics) + 1, recipe.epochs + 1):
                start = time.perf_counter()
                torch.manual_seed(_seed(recipe.seed, epoch, self.rank))
                if self.tuner.due(epoch):
                    selections = [*selections, self._select(epoch)]
                    if epoch == 1 and not resuming:
                        self._begin(origin)  # only now that all input is known to be good may an old run go
                    kept = optimizer_state(self.optimizer, self.model) if self.tuner.momentum == "keep" else {}
                    load_optimizer_state(self._take(selections[-1]), self.model, kept)
                progress.update(task, description=f"epoch {epoch}/{recipe.epochs}")
                losses = self._epoch(epoch, lambda: progress.advance(task))
                self.method.verify()
                trained = time.perf_counter() - start
                entry = self._measure(epoch, losses, trained)
                if self._overfits(metrics, entry):
                    return metrics, epoch
                metrics = [*metrics, entry]
                self._report(metrics[-1])
                self._commit(epoch, metrics, selections)
                check_learning(metrics, self.classes, recipe)
        return metrics, None

    # One epoch

    def _select(self, epoch: int) -> Selection:
        """Algorithm 1, lines 4-9."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(_seed(recipe.seed, epoch, 0))
        x, y = self._drawn(self.data, self.tuner.batch, generator)
        unseen = self._drawn(self.held_out, self.tuner.unseen(), generator) if self.tuner.unseen() else None
        # The same layers on every process. In fp32: early layers' differences of bf16 features are mostly rounding.
        with seeded(_seed(recipe.seed, epoch, 0), self.device):
            selection = self.method.choose(x, y, epoch, unseen=unseen)
        if selection.partial(self.model):
            self.console.print(
                f"  epoch {epoch}: selected {plain(_layer_list(selection))}", markup=False, highlight=False
            )
        return selection

    def _drawn(self, data: Dataset, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = data.subset(torch.randperm(len(data), generator=generator)[:count]).to(self.device)
        pixels, y = next(chosen.batches(count, workers=0))
        return to_unit(pixels), y

    def _take(self, selection: Selection) -> torch.optim.Optimizer:
        """Puts a selection into effect; the optimizer is made anew for what trains from here on."""
        self.method.take(selection)
        self.optimizer = make_optimizer(self.recipe, self.model)
        return self.optimizer

    def _epoch(self, epoch: int, advance: Any) -> dict[str, float]:
        recipe, optimizer = self.recipe, self.optimizer
        assert optimizer is not None
        self.method.begin()
        replays = self.objective.replays
        awp = recipe.awp if recipe.awp and epoch > recipe.awp.warmup else None
        totals: dict[str, Tensor] = {}
        places = self._order(epoch).view(self.steps, -1)
        for step, (pixels, y) in enumerate(self._batches(epoch)):
            crops = Crops.draw(len(pixels)) if recipe.augment else None
            x = to_unit(pixels if crops is None else crops.apply(pixels))
            if step == 0:
                self.first_batch = x, y
            set_rate(optimizer, recipe, self._learning_rate(epoch, step))
            for _ in range(replays):
                warm = self.warm.threat(recipe.threat, places[step], crops) if self.warm else None
                x_adv = self.method.attack(x, y, threat=warm)
                if self.warm:
                    self.warm.keep(x_adv - x, places[step], crops)
                terms = self.method.update(optimizer, x, x_adv, y, awp=awp, clip=recipe.clip, share=self._share)
                for name, term in {"loss": torch.stack(list(terms.values())).sum(), **terms}.items():
                    totals[name] = totals.get(name, torch.zeros((), device=self.device)) + term
            last = step == self.steps - 1
            self.averaged.take(epoch, last=last)
            if step == 0 and x_adv is not x:
                check_attack(x_adv, x, recipe)
            if step % 20 == 0 or last:
                check_finite(totals["loss"], recipe, epoch, step)
            advance()
        self._share_buffers()
        return {name: total.item() / (self.steps * replays) for name, total in totals.items()}

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of each batch; a rest smaller than a batch is left for another epoch's order."""
        generator = torch.Generator().manual_seed(_seed(self.recipe.seed, epoch, 0))
        batches = self._in_batches(self.data, self._order(epoch, generator))
        if self.extra is None:
            return batches
        picked = torch.randint(len(self.extra), (self.steps * self.extra_size,), generator=generator)
        both = zip(batches, self._in_batches(self.extra, picked), strict=True)
        return ((torch.cat([x, more_x]), torch.cat([y, more_y])) for (x, y), (more_x, more_y) in both)

    def _order(self, epoch: int, generator: torch.Generator | None = None) -> Tensor:
        """The places of the epoch's training images, batch after batch."""
        generator = generator or torch.Generator().manual_seed(_seed(self.recipe.seed, epoch, 0))
        return torch.randperm(len(self.data), generator=generator)[: self.steps * (self.size - self.extra_size)]

    def _in_batches(self, data: Dataset, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of the order, cut into the epoch's steps."""
        part = order.view(self.steps, -1)[:, self.rank :: self.world]
        return data.batches(part.shape[1], order=part.reshape(-1), workers=self.workers)

    def _learning_rate(self, epoch: int, step: int) -> float:
        return learning_rate(
            self.recipe, epoch, step, self.steps, self.method.selection.epoch if self.method.selection else 1
        )

    def _share(self, parameters: list[nn.Parameter]) -> None:
        """Averages the gradients over the processes. Only what trains is sent, which under CLAT is little."""
        if self.world > 1:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            flat = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def _share_buffers(self) -> None:
        if self.world > 1 and self.method.selection is not None:
            for held in (dict(self.model.named_buffers()), self.averaged.tensors):
                for name in sorted(self.method.selection.moving_buffers(self.model)):
                    if name in held and held[name].is_floating_point():
                        held[name].copy_(self.accelerator.reduce(held[name].clone(), "mean"))

    # Validation and health

    def _accuracy(self) -> tuple[float, float, int]:
        """Clean and robust accuracy on the held-out images, and their number, over all processes."""
        recipe = self.recipe
        # The one step of a one-step attack is as long as the ball and too long to ascend with.
        length = recipe.threat.step if recipe.threat.steps > 1 else recipe.threat.radius / 4
        threat = Threat(eps=recipe.threat.eps, step=length, norm=recipe.threat.norm, steps=recipe.validation_steps)
        with self.averaged.swapped_in():
            found = evaluate(
                self.model, self.validation, threat, seed=recipe.seed, device=self.device, precision=recipe.precision
            )
        counts = torch.tensor([found.clean.correct, found.robust.correct, found.clean.n], device=self.device)
        clean, robust, n = self.accelerator.reduce(counts, "sum").tolist()
        return clean / n, robust / n, n

    def _measure(self, epoch: int, losses: dict[str, float], seconds: float) -> dict[str, Any]:
        start = time.perf_counter()
        clean, robust, n = self._accuracy()
        return {
            "epoch": epoch,
            **{name if name == "loss" else f"loss/{name}": value for name, value in losses.items()},
            "clean": clean,
            "robust": robust,
            **self._probe(),
            "validation_images": n,
            "learning_rate": self._learning_rate(epoch, 0),
            "trainable": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "seconds": round(seconds, 3),
            "validation_seconds": round(time.perf_counter() - start, 3),
            "peak_memory_bytes": _peak_memory(self.device),
        }

    def _probe(self) -> dict[str, float]:
        """Accuracy under attack on the epoch's first batch, for an objective that watches it."""
        x, y = self.first_batch
        with seeded(self.recipe.seed, self.device), autocast(self.device, self.recipe.precision):
            right = self.objective.probe(self.model, x, y, self.recipe.threat)
        if right is None:
            return {}
        correct, n = self.accelerator.reduce(torch.tensor([right.sum(), len(y)], device=self.device), "sum").tolist()
        return {"probe": correct / n}

    def _overfits(self, metrics: list[dict[str, Any]], entry: dict[str, Any]) -> bool:
        """Whether the probe fell so far in this epoch that the objective ends the run."""
        if "probe" not in entry or not metrics:
            return False
        fall = metrics[-1]["probe"] - entry["probe"]
        if fall <= self.objective.largest_drop:
            return False
        self.console.print(
            f"  epoch {entry['epoch']}: catastrophic overfitting (accuracy under attack on a training batch fell by "
            f"{100 * fall:.0f} points); the run ends with epoch {entry['epoch'] - 1}",
            highlight=False,
        )
        return True

    # The run folder

    def _begin(self, origin: str | None) -> None:
        run, device = self.run, self.device

        def write() -> None:
            run.clear()
            run.write("start.json", {name: fingerprint(tensor) for name, tensor in tensors(self.model).items()})
            run.write("environment.json", {**self._facts(origin), **environment(device, self.world)})
            run.write("recipe.yaml", _plain(asdict(self.recipe)))  # last: from here on the folder is a run

        _by_first(self.accelerator, write)

    def _facts(self, origin: str | None) -> dict[str, Any]:
        data = self.given
        return {
            "model": getattr(self.model, "spec", None) or type(self.model).__qualname__,
            "from": origin,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "data": {"source": data.source, "split": data.split, "images": len(data), "sha256": data.digest()},
            "extra": {"images": len(self.extra), "sha256": self.extra.digest()} if self.extra else None,
        }

    def _restore(self) -> tuple[list[dict[str, Any]], list[Selection]]:
        """Metrics and selections up to the last committed epoch, with network and optimizer as they were then."""
        run = self.run
        metrics, selections = run.progress()
        epoch = len(metrics)
        if not epoch:
            return [], []
        due = [earlier for earlier in range(1, epoch + 1) if self.tuner.due(earlier)]
        if (made := [selection.epoch for selection in selections]) != due:
            raise run.unusable("selections.jsonl", f"holds the selections of epochs {made} and not those of {due}")
        try:
            load_weights(run.last, self.model)
        except InputError as error:
            raise InputError(
                f"{str(error).rstrip('.')}; resume the run with the network that it began with."
            ) from error
        self._restore_optimizer(epoch, selections[-1])
        self.method.mark()
        _by_first(self.accelerator, lambda: self._mend(metrics))
        return metrics, selections

    def _restore_optimizer(self, epoch: int, selection: Selection) -> None:
        """What trains and with which optimizer, average and adapters, as after that epoch."""
        path = self.run.optimizer(epoch)
        try:
            optimizer = self._take(selection)
            if unknown := set(selection.trainable) - dict(self.model.named_parameters()).keys():
                raise AttributeError(f"the network has no parameter {min(unknown)}")
            for name in selection.training:
                self.model.get_submodule(name)
        except (AttributeError, InputError) as error:
            reason = plain(str(error).rstrip("."))
            raise self.run.unusable("selections.jsonl", f"does not fit the network ({reason})") from error
        remedy = (
            f"{self.run.last.name} holds the weights of epoch {epoch} and is intact: start from it with clat finetune "
            f"RECIPE --from {plain(self.run.last)} --out ANOTHER, or put {path.name} back from a copy"
        )
        if not path.exists():
            raise self.run.unusable(path.name, "is missing", remedy)
        try:
            stored, facts = load_tensors(path)
            state = {kind: _section(stored, kind) for kind in ("optimizer", "average", "network", "warm")}
            load_optimizer_state(optimizer, self.model, state["optimizer"])
            self.averaged.count = int(facts["averaged"])
            self.averaged.tensors = {name: tensor.to(self.device) for name, tensor in state["average"].items()}
            if self.warm:
                self.warm.tensors = {name: state["warm"][name].to(self.device) for name in ("delta", "known")}
            if state["network"]:
                self.model.load_state_dict(state["network"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = plain(" ".join(str(error).split())[:300]).rstrip(".")
            raise self.run.unusable(path.name, f"is damaged ({reason})", remedy) from error

    def _mend(self, metrics: list[dict[str, Any]]) -> None:
        """Writes what can be had from the other files anew: the best checkpoint if it is the last, and the result."""
        run, best = self.run, self._best(metrics)
        try:
            held, why = run.epoch_of(run.best), "holds another epoch"
        except InputError:
            held, why = None, "is damaged" if run.best.exists() else "is missing"
        if held != best:
            if best != len(metrics):
                raise run.unusable(run.best.name, f"{why}, and epoch {best} is the best by metrics.jsonl")
            self._save_best(metrics[-1])
            self.console.print(f"  best.safetensors {why}; written anew from epoch {best}", highlight=False)
        if len(metrics) == self.recipe.epochs:
            try:
                _ = run.result
            except InputError:
                self.console.print(
                    "  result.json is missing or damaged; written anew from metrics.jsonl", highlight=False
                )

    def _commit(self, epoch: int, metrics: list[dict[str, Any]], selections: list[Selection]) -> None:
        """Writes the epoch; it counts from the moment that ``last`` is renamed into place."""
        _by_first(self.accelerator, lambda: self._write(epoch, metrics, selections))

    def _write(self, epoch: int, metrics: list[dict[str, Any]], selections: list[Selection]) -> None:
        # Where the tuner has changed the network, ``last`` holds its ordinary form, and this one is with the optimizer.
        network = self.model.state_dict() if self.tuner.state(self.model) is not None else {}
        sections = {
            "optimizer": optimizer_state(self.optimizer, self.model),
            "average": self.averaged.tensors,
            "network": network,
            "warm": self.warm.tensors if self.warm else {},
        }
        stored = {f"{kind}/{name}": tensor for kind, part in sections.items() for name, tensor in part.items()}
        save_tensors(self.run.optimizer(epoch), stored, epoch=epoch, averaged=self.averaged.count)
        self.run.write("selections.jsonl", [selection.to_json() for selection in selections])
        self.run.write("metrics.jsonl", metrics)
        self._save(self.run.last, metrics[-1])
        if self._best(metrics) == epoch:
            self._save_best(metrics[-1])
        for path in self.run.folder.glob("optimizer-*.safetensors"):
            if path != self.run.optimizer(epoch):
                path.unlink()

    def _save_best(self, entry: dict[str, Any]) -> None:
        with self.averaged.swapped_in():
            self._save(self.run.best, entry)

    def _save(self, path: Path, entry: dict[str, Any], **facts: Any) -> None:
        selection = self.method.selection
        save_checkpoint(
            path,
            self.model,
            self.tuner.state(self.model),
            epoch=entry["epoch"],
            validation={key: entry[key] for key in ("clean", "robust", "validation_images")},
            data={**self.identity, "classes": self.data.classes, "shape": self.data.shape},
            holdout={"images": self.recipe.holdout, "seed": self.recipe.holdout_seed},
            selected=list(selection.layers) if selection and selection.partial(self.model) else None,
            **facts,
        )

    # The end

    def _check_start(self, start: State) -> None:
        """The run folder has fingerprints of the network that it began with, which a tuner's end or a teacher needs."""
        needed = self.tuner.ends or self.objective.learns_from_start()
        began = self.run.start
        if began.keys() != start.keys():
            other = "another network"
        elif needed and {name: fingerprint(tensor) for name, tensor in start.items()} != began:
            other = "other weights"
        else:
            return
        raise InputError(
            f"The run in {self.run.folder} began with {other}; resume it from the network that it began with."
        )

    def _end(self, start: State, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        """What the tuner makes of the best network, its facts stored with it; a killed run that had it keeps it."""
        if not self.tuner.ends:
            return {}
        facts = load_weights(self.run.best, self.model)
        self.averaged = Averaged(self.model, None)  # where weights were averaged, the best are
        self.accelerator.wait_for_everyone()  # every process has read it before the first one writes
        if "end" not in facts:
            facts["end"] = self.tuner.end(self.model, start, lambda: self._accuracy()[:2])
            entry = next(entry for entry in metrics if entry["epoch"] == facts["epoch"])
            best = {**entry, **facts["end"]}
            _by_first(self.accelerator, lambda: self._save(self.run.best, best, end=facts["end"]))
        return facts["end"]

    def _best(self, metrics: list[dict[str, Any]]) -> int:
        order = ("robust", "clean") if self.recipe.select_by == "robust" else ("clean", "robust")
        return max(metrics, key=lambda entry: (entry[order[0]], entry[order[1]], entry["epoch"]))["epoch"]

    def _report(self, entry: dict[str, Any]) -> None:
        self.console.print(
            f"  epoch {entry['epoch']}/{self.recipe.epochs}: loss {entry['loss']:.3f}, validation clean "
            f"{100 * entry['clean']:.1f} %, robust {100 * entry['robust']:.1f} %, {entry['seconds']:.0f} s",
            highlight=False,
        )

    def _finish(self, metrics: list[dict[str, Any]], overfitted: int | None, end: dict[str, Any]) -> None:
        best = next(entry for entry in metrics if entry["epoch"] == self._best(metrics))
        best = {**best, **{key: end[key] for key in ("clean", "robust") if key in end}}
        result = {
            "epochs": len(metrics),
            "overfitted": overfitted,  # the epoch that ended the run early and was dropped, if one did
            "best": best,
            **({"end": end} if end else {}),
            "last": metrics[-1],
            "robust_gap": best["robust"] - metrics[-1]["robust"],
            "seconds": round(sum(entry["seconds"] for entry in metrics), 3),
            "trainable": max(entry["trainable"] for entry in metrics),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }
        _by_first(self.accelerator, lambda: self.run.write("result.json", result))


def _section(stored: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors stored under ``kind/``."""
    prefix = f"{kind}/"
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}


def _seed(seed: int, epoch: int, rank: int) -> int:
    """One seed for each run, epoch and process, so that an epoch can be repeated by itself."""
    return (seed * 1_000_003 + epoch) * 1_009 + rank


def _layer_list(selection: Selection) -> str:
    index = {score.name: score.index for score in selection.scores}
    if not index:
        return f"{len(selection.layers)} layers"
    return ", ".join(f"{name} (layer {index[name]})" if index[name] else name for name in selection.layers)


def _peak_memory(device: torch.device) -> int:
    """Most memory in use so far: on a GPU by tensors, elsewhere by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
