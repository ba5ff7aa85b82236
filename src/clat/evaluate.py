"""Accuracy on clean and on attacked images, with counts and confidence intervals."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clat.data import Dataset, to_unit
from clat.errors import InputError
from clat.layers import logits
from clat.threat import Images, Labels, Threat, ascend, check_images, held

Z95 = 1.959963984540054  # normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Accuracy:
    """Correct of n, with the 95 % Wilson score interval (``low``, ``high``)."""

    correct: int
    n: int

    @property
    def value(self) -> float:
        return self.correct / self.n

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
class Result:
    """What ``evaluate`` found, and all that is needed to find it again."""

    clean: Accuracy
    robust: Accuracy
    attack: str
    threat: Threat
    data: str
    split: str
    seed: int
    precision: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "clean": self.clean.to_json(), "robust": self.robust.to_json()}


def evaluate(
    model: nn.Module,
    data: Dataset,
    threat: Threat | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 250,
    device: torch.device | str = "cpu",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Result:
    """Clean accuracy, and robust accuracy under PGD on the cross-entropy, the strongest iterate of each image kept.

    An image counts as robust if it is classified correctly both clean and attacked.

    Args:
        model: takes pixels in [0, 1], returns class scores (batch, classes)
        threat: default PGD-20 at eps 8/255 with steps of eps/4 from a random start
        limit: evaluate this many images, drawn at random by ``seed``
    Raises:
        InputError: images or labels that do not fit the network
    """
    threat = threat or pgd(8 / 255, 20)
    if limit is not None and limit < len(data):
        if limit < 1:
            raise InputError(f"limit is {limit}; evaluate at least one image.")
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        data = data.subset(order[:limit].sort().values)
    model.to(device)
    check_fits(model, data, device)
    start = time.perf_counter()
    clean = robust = 0
    with seeded(seed, device):
        for pixels, y in data.to(device).batches(batch_size):
            x = to_unit(pixels)
            with autocast(device, precision):
                right = predict(model, x) == y
                x_adv = threat.project(pgd_attack(model, x, y, threat), x)
                right_adv = predict(model, x_adv) == y
            clean += int(right.sum())
            robust += int((right & right_adv).sum())
    return Result(
        clean=Accuracy(clean, len(data)),
        robust=Accuracy(robust, len(data)),
        attack=f"PGD-{threat.steps}",
        threat=threat,
        data=f"{data.source} sha256:{data.digest()[:16]}",
        split=data.split,
        seed=seed,
        precision=precision,
        seconds=round(time.perf_counter() - start, 2),
    )


def pgd(eps: float | str, steps: int, norm: Literal["linf", "l2"] = "linf") -> Threat:
    """The evaluation attack: random start, steps of eps / 4."""
    radius = Threat(eps=eps, norm=norm).radius
    return Threat(eps=radius, step=radius / 4, steps=steps, norm=norm)


def pgd_attack(model: nn.Module, x: Images, y: Labels, threat: Threat) -> Images:
    """PGD on the cross-entropy; of each image the iterate with the highest loss."""
    return ascend(lambda z: F.cross_entropy(logits(model(z)), y, reduction="none"), x, threat, model=model, keep="best")


def predict(model: nn.Module, x: Images) -> Tensor:
    """The predicted classes (batch,), in eval mode. Raises InputError if a class score is not finite."""
    with held(model), torch.no_grad():
        scores = logits(model(x))
    if not torch.isfinite(scores).all():
        raise InputError("The network gave class scores that are not finite; check its weights.")
    return scores.argmax(1)


def autocast(device: torch.device | str, precision: Literal["fp32", "bf16"]) -> Any:
    """The context of a precision on a device. Casts are not cached: attacks toggle ``requires_grad`` meanwhile."""
    if precision == "fp32":
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
    """bf16 if the device has instructions for it, else fp32: without them, bf16 takes ten times as long on a CPU."""
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        on_cpu = torch.device(device).type == "cpu"
        found = getattr(torch.cpu, "get_capabilities", dict)() if on_cpu else {}  # torch 2.6 has it not
        native = any("bf16" in name and there for name, there in found.items())
    return "bf16" if native else "fp32"


def best_device() -> str:
    """The fastest kind of device here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


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
