"""Accuracy on clean and on attacked images, with counts and confidence intervals."""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clat.arrays import as_dataset
from clat.attacks import Attack, pgd, pgd_attack, restarts
from clat.data import Dataset, to_unit
from clat.errors import InputError
from clat.files import parse_json, read_text, write_text
from clat.integrity import fingerprint, tensors
from clat.layers import logits
from clat.structure import structure_digest
from clat.text import plain
from clat.threat import Images, Labels, NoGradientError, Threat, check_images, held

Precision = Literal["auto", "bf16", "fp32"]

TOLERATED = 0.005  # share of the images by which a weaker attack may seem the stronger one before it counts as a sign
Z95 = 1.959963984540054  # normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Accuracy:
    """Correct of n, with the 95 % Wilson score interval (``low``, ``high``)."""

    correct: int
    n: int

    @property
    def value(self) -> float:
        return self.correct / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        p, z2 = self.value, Z95**2
        centre = (p + z2 / (2 * self.n)) / (1 + z2 / self.n)
        half = Z95 / (1 + z2 / self.n) * math.sqrt(p * (1 - p) / self.n + z2 / (4 * self.n**2))
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.2f} % [{100 * low:.2f}, {100 * high:.2f}] ({self.correct}/{self.n})"

    def to_json(self) -> dict[str, Any]:
        low, high = self.interval
        return {"correct": self.correct, "n": self.n, "accuracy": self.value, "low": low, "high": high}


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """What one attack of an evaluation did: it ran on the images that were correct until then."""

    name: str
    seed: int
    settings: dict[str, Any]
    note: str
    attacked: int
    broken: int
    robust: Accuracy  # after this attack and all before it
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """What ``evaluate`` found, and all that is needed to find it again.

    ``outcomes`` has one number an image: -1 if it was misclassified clean, 0 if it withstood every attack, else the
    1-based number of the attack that broke it. ``model`` is what ``build_model`` made it from, or else its class;
    ``structure`` tells networks with the same weights apart. ``from_record`` says what was not measured now but read
    from a record, in words.
    """

    clean: Accuracy
    robust: Accuracy
    attacks: tuple[AttackResult, ...]
    eps: float
    norm: str
    data: str
    split: str
    limit: int | None
    seed: int
    precision: str
    batch_size: int
    device: str
    weights: str
    model: str
    structure: str
    version: str  # of clat
    seconds: float
    outcomes: tuple[int, ...]
    from_record: str = field(default="", compare=False)

    @property
    def attack(self) -> str:
        """The attacks' names, e.g. "APGD-CE, APGD-T"; random starts of one attack count once."""
        return ", ".join(dict.fromkeys(attack.name.split(", start")[0] for attack in self.attacks))

    def to_json(self) -> dict[str, Any]:
        attacks = [{**asdict(attack), "robust": attack.robust.to_json()} for attack in self.attacks]
        return {**asdict(self), "clean": self.clean.to_json(), "robust": self.robust.to_json(), "attacks": attacks}


@dataclass(frozen=True)
class Progress:
    """How far an evaluation is: attack ``number`` of ``attacks``, ``done`` of its ``total`` images."""

    name: str
    number: int
    attacks: int
    done: int
    total: int
    broken: int


def evaluate(
    model: nn.Module,
    data: Any,
    attacks: Threat | Sequence[Attack] | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 250,
    workers: int = 2,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    record: Path | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Result:
    """Clean accuracy, and robust accuracy as the worst case of each image over all attacks and their random starts.

    An image counts as robust if it is classified correctly clean and after every attack. The attacks run one after the
    other, each on the images that are still correct, so that the order matters for the time and not for the result.

    Args:
        model: takes pixels in [0, 1], returns class scores (batch, classes)
        data: a ``Dataset``, or anything that ``as_dataset`` takes
        attacks: on one ball; a threat stands for one run of PGD, by default of 20 steps of eps/4 at eps 8/255
        limit: evaluate this many images, drawn at random by ``seed``
        workers: processes that decode images which are not kept in memory
        device: where the network is moved for the call, and then back; default where it is
        record: a folder that keeps a JSON file of each evaluation, written after each batch; one of the same network,
            images and attacks that was interrupted goes on from there, and one that is complete is read from it:
            ``Result.from_record`` says so. A record has a digest of its content, which finds damage and careless
            edits; it is no signature, and whoever forges a record can forge its digest too. Of several processes that
            a launcher started, only the first keeps records
        progress: is told after each batch
    Raises:
        InputError: images or labels that do not fit the network, attacks on different balls, class scores that are not
            finite or have no gradient, or a record that is damaged or not of this evaluation
    """
    data = as_dataset(data)
    attacks = _attacks(attacks, seed)
    check_count("batch_size", batch_size)
    data = drawn(data, limit, seed)
    with placed([model], device) as place:
        check_fits(model, data, place)
        facts = _facts(model, data, attacks[0].threat, limit, seed, precision, batch_size, place)
        state = _State.begin(record, facts, attacks, len(data))
        data = data.to(place)
        if not state.outcomes:
            state.outcomes = _clean(model, data, batch_size, workers, place, precision)
            state.write()
        for number, attack in enumerate(attacks, 1):
            places = [i for i, outcome in enumerate(state.outcomes) if outcome in (0, number)]
            rest = torch.tensor(places[state.done[number - 1] :], dtype=torch.long)
            batches = data.batches(batch_size, order=rest, workers=workers) if len(rest) else iter(())
            start = time.perf_counter()
            for images, (pixels, y) in zip(rest.split(batch_size) if len(rest) else (), batches, strict=True):
                survived = _survivors(attack, model, to_unit(pixels), y, place, precision)
                for image, right in zip(images.tolist(), survived, strict=True):
                    state.outcomes[image] = 0 if right else number
                state.done[number - 1] += len(images)
                state.seconds[number - 1] += time.perf_counter() - start
                state.write()
                broken = state.outcomes.count(number)
                progress(Progress(attack.name, number, len(attacks), state.done[number - 1], len(places), broken))
                start = time.perf_counter()
    return state.result()


def _facts(
    model: nn.Module,
    data: Dataset,
    threat: Threat,
    limit: int | None,
    seed: int,
    precision: Precision,
    batch_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """All that decides the result beside the attacks."""
    spec = getattr(model, "spec", None)
    return {
        "eps": threat.radius,
        "norm": threat.norm,
        "data": f"{data.source} sha256:{data.digest()[:16]}",
        "split": data.split,
        "limit": limit,
        "seed": seed,
        "precision": precision,
        "batch_size": batch_size,
        "device": device.type,
        "weights": weights_digest(model),
        "model": json.dumps(spec, sort_keys=True, default=str) if spec else type(model).__qualname__,
        "structure": structure_digest(model),
        "version": version("torch-clat"),
    }


def worst_case(results: Sequence[Result]) -> Accuracy:
    """Accuracy over the images that withstood every attack of every evaluation; all are on the same images."""
    robust = [
        all(outcome == 0 for outcome in outcomes) for outcomes in zip(*(r.outcomes for r in results), strict=True)
    ]
    return Accuracy(sum(robust), len(robust))


def drawn(data: Dataset, limit: int | None, seed: int) -> Dataset:
    """``limit`` images drawn at random by ``seed``, in their order; all if there are no more."""
    if limit is None:
        return data
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise InputError(f"limit is {limit!r}; evaluate at least one image.")
    if limit >= len(data):
        return data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data.subset(order[:limit].sort().values)


def _attacks(attacks: Threat | Sequence[Attack] | None, seed: int) -> Sequence[Attack]:
    if attacks is None or isinstance(attacks, Threat):
        return restarts(attacks or pgd("8/255", 20), seed=seed)
    if not attacks:
        raise InputError("There is no attack to evaluate with.")
    check_one_ball(attacks)
    return attacks


def check_one_ball(attacks: Sequence[Attack]) -> None:
    """Raises InputError unless the attacks share norm and eps."""
    balls = {(attack.threat.radius, attack.threat.norm) for attack in attacks}
    if len(balls) > 1:
        raise InputError(f"The attacks are on different balls ({balls}); evaluate each ball by itself.")


def check_count(name: str, value: int) -> None:
    """Raises InputError unless an option is a whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} is {value!r}; it must be 1 or more.")


def _clean(
    model: nn.Module, data: Dataset, size: int, workers: int, device: torch.device, precision: Precision
) -> list[int]:
    """-1 for each image that is misclassified, 0 for the others."""
    outcomes: list[int] = []
    for pixels, y in data.batches(size, workers=workers):
        with autocast(device, precision):
            outcomes += (predict(model, to_unit(pixels)) == y).int().sub(1).tolist()
    return outcomes


def _survivors(
    attack: Attack, model: nn.Module, x: Images, y: Labels, device: torch.device, precision: Precision
) -> list[bool]:
    """Which of the images are still classified correctly after the attack."""
    with autocast(device, precision), seeded(attack.seed, device):
        return (predict(model, attacked(attack, model, x, y)) == y).tolist()


def attacked(attack: Attack, model: nn.Module, x: Images, y: Labels) -> Images:
    """The images that an attack makes of x, inside ball and box; the network's state is held meanwhile."""
    with held(model):
        return attack.threat.project(attack.perturb(model, x, y).detach(), x)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over every parameter and buffer and its name, the first 16 digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors(model).items()):
        digest.update(f"{name} {fingerprint(tensor)}\n".encode())
    return digest.hexdigest()[:16]


@dataclass
class _State:
    """An evaluation in progress, as its record holds it."""

    record: Path | None
    facts: dict[str, Any]
    attacks: list[dict[str, Any]]  # name, seed, settings, note
    outcomes: list[int]
    done: list[int]  # images, of each attack
    seconds: list[float]  # of each attack
    from_record: str = ""

    @classmethod
    def begin(cls, folder: Path | None, facts: dict[str, Any], attacks: Sequence[Attack], n: int) -> "_State":
        described = [{"name": a.name, "seed": a.seed, "settings": dict(a.settings), "note": a.note} for a in attacks]
        state = cls(None, facts, described, [], [0] * len(attacks), [0.0] * len(attacks))
        if folder is None or os.environ.get("RANK", "0") != "0":
            return state
        name = re.sub(r"[^\w.+-]+", "-", state.result().attack.lower().replace(", ", "-"))[:80]
        identity = hashlib.sha256(json.dumps([facts, described]).encode()).hexdigest()[:12]
        state.record = Path(folder) / f"{name}-{identity}.json"
        if os.path.lexists(state.record):
            state._take_over(state.record, n)
        return state

    def _take_over(self, record: Path, n: int) -> None:
        """Goes on from a record. Raises InputError unless it is whole and of this very evaluation of n images."""
        advice = "remove it, or keep records in another folder (--out)"
        try:
            content = parse_json(read_text(record), record)
        except InputError as error:
            raise InputError(f"{plain(record)} is not the record of an evaluation; {advice}.") from error
        if not isinstance(content, dict) or not isinstance(content.get("state"), dict) or "digest" not in content:
            raise InputError(f"{plain(record)} is not the record of an evaluation; {advice}.")
        if content.pop("digest") != _content_digest(content):
            raise InputError(f"{plain(record)} was changed after clat wrote it: its digest does not match; {advice}.")
        read = content["state"]
        same = all(_json(vars(self)[key]) == read.get(key) for key in ("facts", "attacks"))
        if not same or not _consistent(read, n, len(self.attacks)):
            raise InputError(f"{plain(record)} is not a valid record of this evaluation; {advice}.")
        self.outcomes, self.done, self.seconds = read["outcomes"], read["done"], read["seconds"]
        done, total = self.done[-1], sum(outcome in (0, len(self.done)) for outcome in self.outcomes)
        self.from_record = (
            f"read from the record {plain(record)}; nothing was attacked again"
            if done == total
            else f"continued from the record {plain(record)}, with {sum(self.done):,} attacked images"
        )

    def write(self) -> None:
        if self.record is not None:
            state = {key: getattr(self, key) for key in ("facts", "attacks", "outcomes", "done", "seconds")}
            content = {"state": state, "result": self.result().to_json()}
            write_text(self.record, json.dumps({**content, "digest": _content_digest(content)}) + "\n")

    def result(self) -> Result:
        n = len(self.outcomes)
        wrong = self.outcomes.count(-1)
        robust, attacks = n - wrong, []
        for number, described in enumerate(self.attacks, 1):
            broken = self.outcomes.count(number)
            robust -= broken
            attacks.append(
                AttackResult(
                    **described,
                    attacked=self.done[number - 1],
                    broken=broken,
                    robust=Accuracy(robust, n),
                    seconds=round(self.seconds[number - 1], 2),
                )
            )
        return Result(
            clean=Accuracy(n - wrong, n),
            robust=Accuracy(robust, n),
            attacks=tuple(attacks),
            **self.facts,
            seconds=round(sum(self.seconds), 2),
            outcomes=tuple(self.outcomes),
            from_record=self.from_record,
        )


def _json(value: Any) -> Any:
    """The value as it comes back from JSON."""
    return json.loads(json.dumps(value))


def _content_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _consistent(read: dict[str, Any], n: int, attacks: int) -> bool:
    """Whether what a record holds can have come from an evaluation of n images by so many attacks."""
    lists: list[list[Any]] = [read.get(key) or [] for key in ("outcomes", "done", "seconds")]
    if not all(isinstance(value, list) for value in lists):
        return False
    outcomes, done, seconds = lists
    if len(outcomes) != n or len(done) != attacks or len(seconds) != attacks:
        return False
    if any(type(value) is not int for value in (*outcomes, *done)):
        return False
    if any(not -1 <= outcome <= attacks for outcome in outcomes):
        return False
    if any(type(value) not in (int, float) or not 0 <= value < math.inf for value in seconds):
        return False
    before_is_done = True
    for number, count in enumerate(done, 1):
        todo = [outcome for outcome in outcomes if outcome == 0 or outcome >= number]
        if not 0 <= count <= len(todo) or (count and not before_is_done) or number in todo[count:]:
            return False
        before_is_done = before_is_done and count == len(todo)
    return True


def pass_seconds(
    model: nn.Module, data: Dataset, *, batch_size: int = 250, device: torch.device | str | None = None
) -> float:
    """Seconds that a forward and backward pass takes for an image here, measured in a few seconds."""
    with placed([model], device) as place:
        few = data.subset(torch.arange(min(batch_size, len(data)))).to(place)
        pixels, y = next(few.batches(batch_size, workers=0))
        x, found = to_unit(pixels), 0.0
        for images in (1, min(8, len(x)), len(x)):  # the first warms up; over 5 seconds are left out
            if found * images > 5:
                break
            start = time.perf_counter()
            passes = _passes(model, x[:images], y[:images])
            found = (time.perf_counter() - start) / passes / images
    return found


def _passes(model: nn.Module, x: Images, y: Labels) -> float:
    """Runs the network on the images; returns how many forward and backward passes that was."""
    try:
        pgd_attack(model, x, y, Threat(steps=1)).sum().item()
        return 4 / 3  # a pass and a forward pass, a third of one
    except NoGradientError:
        class_scores(model, x).sum().item()
        return 2 / 3


def class_scores(model: nn.Module, x: Images) -> Tensor:
    """The class scores (batch, classes), in eval mode, without gradients.

    Raises:
        InputError: the network raised an error, which is named, or did not return one row of scores for each image
    """
    shape = "x".join(map(str, x.shape))
    try:
        with held(model), torch.no_grad():
            scores = logits(model(x))
    except InputError:
        raise
    except Exception as error:  # whatever a network raises
        said = plain(" ".join(str(error).split())[:200]).rstrip(".")
        advice = "; lower batch_size" if isinstance(error, torch.OutOfMemoryError) else ""
        raise InputError(
            f"The network raised {type(error).__name__}: {said} on images of shape {shape}{advice}."
        ) from error
    if len(scores) != len(x):
        raise InputError(f"The network returned {len(scores)} rows of class scores for {len(x)} images.")
    return scores


def predict(model: nn.Module, x: Images) -> Tensor:
    """The predicted classes (batch,), in eval mode. Raises InputError if a class score is not finite."""
    scores = class_scores(model, x)
    if not torch.isfinite(scores).all():
        raise InputError("The network gave class scores that are not finite; check its weights.")
    return scores.argmax(1)


def autocast(device: torch.device | str, precision: Precision) -> Any:
    """The context of a precision on a device. Casts are not cached: attacks toggle ``requires_grad`` meanwhile."""
    if precision == "fp32" or (precision == "auto" and native_precision(device) == "fp32"):
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, cache_enabled=False)


@contextmanager
def seeded(seed: int, device: torch.device | str) -> Iterator[None]:
    """Random numbers from ``seed`` for a while; afterwards the global generators go on as if nothing had happened."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def native_precision(device: torch.device | str) -> Literal["fp32", "bf16"]:
    """bf16 if the device has instructions for it, else fp32: without them, bf16 is the slower one."""
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        on_cpu = torch.device(device).type == "cpu"
        found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if on_cpu else {}  # torch 2.6 has it not
        native = any("bf16" in name and there for name, there in found.items())
    return "bf16" if native else "fp32"


def best_device() -> str:
    """The fastest kind of device here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def find_device(name: torch.device | str) -> torch.device:
    """A device by name, such as cpu, cuda, cuda:1 or mps. Raises InputError if there is none of that name here."""
    here = [
        "cpu",
        *(f"cuda:{i}" for i in range(torch.cuda.device_count())),
        *["mps"] * torch.backends.mps.is_available(),
    ]
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"There is no device {plain(name)!r}; here are {', '.join(here)}.") from error
    wanted = f"{device.type}:{device.index or 0}" if device.type == "cuda" else device.type
    if device.type in ("cpu", "cuda", "mps") and (wanted not in here or (device.type != "cuda" and device.index)):
        raise InputError(f"The device {device} is not here; here are {', '.join(here)}.")
    return device


@contextmanager
def placed(models: Sequence[nn.Module], device: torch.device | str | None) -> Iterator[torch.device]:
    """The device that networks run on for a while; those that are elsewhere are moved there, and back afterwards.

    Args:
        device: default where the first network is that has parameters or buffers, or else the CPU
    Raises:
        InputError: no such device here, or a network on several devices that would have to be moved
    """
    homes = [list(dict.fromkeys(tensor.device for tensor in tensors(model).values())) for model in models]
    where = next((home[0] for home in homes if home), torch.device("cpu")) if device is None else find_device(device)
    moved = [(model, home) for model, home in zip(models, homes, strict=True) if home and set(home) != {where}]
    if device is None:  # a network spread over several devices runs as it is
        moved = [(model, home) for model, home in moved if where not in home]
    if any(len(home) > 1 for _, home in moved):
        raise InputError("The network's tensors are on several devices; leave device out, and it runs as it is.")
    try:
        for model, _ in moved:
            model.to(where)
        yield where
    finally:
        for model, home in moved:
            model.to(home[0])


def check_all_fit(models: Mapping[str, nn.Module], data: Dataset, device: torch.device | str) -> None:
    """Raises InputError, with a network's name, unless each takes these images and has one output for each class."""
    for name, model in models.items():
        try:
            check_fits(model, data, device)
        except InputError as error:
            raise InputError(f"{plain(name)}: {error}") from error


def check_fits(model: nn.Module, data: Dataset, device: torch.device | str) -> None:
    """Raises InputError unless the network takes these images and has one output for each class."""
    pixels, _ = next(data.subset(torch.arange(min(2, len(data)))).batches(2, workers=0))
    x = to_unit(pixels).to(device)
    check_images(x)
    outputs = class_scores(model, x).shape[1]
    if outputs != len(data.classes):
        raise InputError(
            f"The network has {outputs} outputs, but {plain(data.source)} has {len(data.classes)} classes; build it "
            "for as many."
        )
