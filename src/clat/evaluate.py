"""Accuracy on clean and on attacked images, with counts and confidence intervals."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clat.attacks import Attack, pgd, pgd_attack, restarts
from clat.data import Dataset, to_unit
from clat.errors import InputError
from clat.files import write_text
from clat.integrity import fingerprint, tensors
from clat.layers import logits
from clat.threat import Images, Labels, Threat, check_images, held

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
    1-based number of the attack that broke it.
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
    weights: str
    seconds: float
    outcomes: tuple[int, ...]

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
    data: Dataset,
    attacks: Threat | Sequence[Attack] | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 250,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    record: Path | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Result:
    """Clean accuracy, and robust accuracy as the worst case of each image over all attacks and their random starts.

    An image counts as robust if it is classified correctly clean and after every attack. The attacks run one after the
    other, each on the images that are still correct, so that the order matters for the time and not for the result.

    Args:
        model: takes pixels in [0, 1], returns class scores (batch, classes)
        attacks: on one ball; a threat stands for one run of PGD, by default of 20 steps of eps/4 at eps 8/255
        limit: evaluate this many images, drawn at random by ``seed``
        record: a folder that keeps a JSON file of each evaluation, written after each batch; one of the same network,
            images and attacks that was interrupted goes on from there, and one that is complete is read from it
        progress: is told after each batch
    Raises:
        InputError: images or labels that do not fit the network, attacks on different balls, or an unreadable record
    """
    attacks = _attacks(attacks, seed)
    data = drawn(data, limit, seed)
    model.to(device)
    check_fits(model, data, device)
    facts = {
        "eps": attacks[0].threat.radius,
        "norm": attacks[0].threat.norm,
        "data": f"{data.source} sha256:{data.digest()[:16]}",
        "split": data.split,
        "limit": limit,
        "seed": seed,
        "precision": precision,
        "batch_size": batch_size,
        "weights": weights_digest(model),
    }
    state = _State.begin(record, facts, attacks)
    data = data.to(device)
    if not state.outcomes:
        state.outcomes = _clean(model, data, batch_size, device, precision)
        state.write()
    for number, attack in enumerate(attacks, 1):
        todo = torch.tensor([i for i, outcome in enumerate(state.outcomes) if outcome in (0, number)], dtype=torch.long)
        while state.done[number - 1] < len(todo):
            start = time.perf_counter()
            images = todo[state.done[number - 1] :][:batch_size]
            survived = _run(attack, model, data, images, device, precision)
            for image, right in zip(images.tolist(), survived, strict=True):
                state.outcomes[image] = 0 if right else number
            state.done[number - 1] += len(images)
            state.seconds[number - 1] += time.perf_counter() - start
            state.write()
            broken = state.outcomes.count(number)
            progress(Progress(attack.name, number, len(attacks), state.done[number - 1], len(todo), broken))
    return state.result()


def worst_case(results: Sequence[Result]) -> Accuracy:
    """Accuracy over the images that withstood every attack of every evaluation; all are on the same images."""
    robust = [
        all(outcome == 0 for outcome in outcomes) for outcomes in zip(*(r.outcomes for r in results), strict=True)
    ]
    return Accuracy(sum(robust), len(robust))


def drawn(data: Dataset, limit: int | None, seed: int) -> Dataset:
    """``limit`` images drawn at random by ``seed``, in their order; all if there are no more."""
    if limit is None or limit >= len(data):
        return data
    if limit < 1:
        raise InputError(f"limit is {limit}; evaluate at least one image.")
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


def _clean(model: nn.Module, data: Dataset, size: int, device: torch.device | str, precision: Precision) -> list[int]:
    """-1 for each image that is misclassified, 0 for the others."""
    outcomes: list[int] = []
    for pixels, y in data.batches(size):
        with autocast(device, precision):
            outcomes += (predict(model, to_unit(pixels)) == y).int().sub(1).tolist()
    return outcomes


def _run(
    attack: Attack,
    model: nn.Module,
    data: Dataset,
    images: Tensor,
    device: torch.device | str,
    precision: Precision,
) -> list[bool]:
    """Which of the images, given by their places in the data, are still classified correctly."""
    pixels, y = next(data.subset(images).batches(len(images), workers=0))
    with autocast(device, precision), seeded(attack.seed, device):
        return (predict(model, attacked(attack, model, to_unit(pixels), y)) == y).tolist()


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

    @classmethod
    def begin(cls, folder: Path | None, facts: dict[str, Any], attacks: Sequence[Attack]) -> "_State":
        described = [{"name": a.name, "seed": a.seed, "settings": dict(a.settings), "note": a.note} for a in attacks]
        new = cls(None, facts, described, [], [0] * len(attacks), [0.0] * len(attacks))
        if folder is None:
            return new
        name = new.result().attack.lower().replace(", ", "-")
        identity = hashlib.sha256(json.dumps([facts, described]).encode()).hexdigest()[:12]
        new.record = folder / f"{name}-{identity}.json"
        if not new.record.exists():
            return new
        try:
            return cls(new.record, **json.loads(new.record.read_text())["state"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{new.record} is not the record of an evaluation; remove it.") from error

    def write(self) -> None:
        if self.record is not None:
            state = {key: value for key, value in vars(self).items() if key != "record"}
            write_text(self.record, json.dumps({"state": state, "result": self.result().to_json()}) + "\n")

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
        )


def pass_seconds(
    model: nn.Module, data: Dataset, *, batch_size: int = 250, device: torch.device | str = "cpu"
) -> float:
    """Seconds that a forward and backward pass takes for an image here, measured in a few seconds."""
    pixels, y = next(data.subset(torch.arange(min(batch_size, len(data)))).to(device).batches(batch_size, workers=0))
    x, threat, found = to_unit(pixels), Threat(steps=1), 0.0
    model.to(device)
    for images in (1, min(8, len(x)), len(x)):  # the first warms up; what would take more than 5 seconds is left out
        if found * images > 5:
            break
        start = time.perf_counter()
        pgd_attack(model, x[:images], y[:images], threat).sum().item()  # a pass and a forward pass, a third of one
        found = (time.perf_counter() - start) / (4 / 3) / images
    return found


def predict(model: nn.Module, x: Images) -> Tensor:
    """The predicted classes (batch,), in eval mode. Raises InputError if a class score is not finite."""
    with held(model), torch.no_grad():
        scores = logits(model(x))
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


def check_all_fit(models: Mapping[str, nn.Module], data: Dataset, device: torch.device | str) -> None:
    """Moves the networks to the device; raises InputError, with a network's name, unless each fits the data."""
    for name, model in models.items():
        try:
            check_fits(model.to(device), data, device)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error


def check_fits(model: nn.Module, data: Dataset, device: torch.device | str) -> None:
    """Raises InputError unless the network takes these images and has one output for each class."""
    pixels, _ = next(data.subset(torch.arange(min(2, len(data)))).batches(2, workers=0))
    x = to_unit(pixels).to(device)
    check_images(x)
    try:
        with held(model), torch.no_grad():
            outputs = logits(model(x)).shape[1]
    except (RuntimeError, AssertionError) as error:  # timm asserts its image size
        shape = "x".join(map(str, data.shape))
        raise InputError(
            f"The network does not take the images of {data.source} ({shape}): {' '.join(str(error).split())[:150]}."
        ) from error
    if outputs != len(data.classes):
        raise InputError(
            f"The network has {outputs} outputs, but {data.source} has {len(data.classes)} classes; build it for "
            "as many."
        )
