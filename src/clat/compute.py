"""Which precision and memory layout a network computes in when a recipe says ``auto``."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from clat.errors import InputError
from clat.inputs import check_word
from clat.network import Images, check_made, held, logits, tensors
from clat.text import plain

Precision = Literal["auto", "bf16", "fp32"]

Layout = Literal["auto", "contiguous", "channels-last"]
LAYOUTS: dict[Layout, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "channels-last": torch.channels_last,
}
CHANNELS_LAST = ("cpu", "cuda")  # kinds of device on which ``auto`` is this layout
TOLERANCE = 0.01  # of the largest score: how far rounding, of TF32 too, may move one from layout to layout


def layout_of(model: nn.Module) -> Layout:
    """channels-last if most kernels are stored that way; those where both layouts coincide are not counted."""
    kernels = [p for p in model.parameters() if p.dim() == 4]
    orders = [[p.is_contiguous(memory_format=order) for order in LAYOUTS.values()] for p in kernels]
    told = [last for contiguous, last in orders if contiguous != last]
    return "channels-last" if 2 * sum(told) > len(told) else "contiguous"


def set_layout(model: nn.Module, layout: Layout) -> None:
    """Changes the memory layout of the kernels, not their values."""
    model.to(memory_format=LAYOUTS[layout])


def choose(
    model: nn.Module, x: Images, precision: Precision = "auto", layout: Layout = "auto"
) -> tuple[Precision, Layout]:
    """Chooses what ``auto`` means from the kind of device alone, and stores the network in that layout.

    The precision is bf16 where the device has instructions for it, else fp32; the layout is channels-last on CPUs and
    CUDA, elsewhere contiguous, as torch makes them. A network that fails in channels-last, as one that flattens with
    ``view`` may, gives other scores in it, or has gradients that the CPU would get wrong (``works_in_channels_last``),
    stays contiguous.

    Args:
        x: a few images on the network's device
    Raises:
        InputError: the network does not work in the layout that is asked for
    """
    if precision == "auto":
        precision = native_precision(x.device)
    wanted = ("channels-last" if x.device.type in CHANNELS_LAST else "contiguous") if layout == "auto" else layout
    why = _refusal(model, x, wanted)
    if why and layout != "auto":
        raise InputError(f"With layout {layout} the network {why}; leave it auto.")
    if why:
        wanted = "contiguous"
        set_layout(model, wanted)
    return precision, wanted


def in_words(device: torch.device, precision: Precision, layout: Layout, asked: Layout = "auto") -> str:
    """The precision and layout in words, with the flags that repeat them, and whether channels-last was refused."""
    refused = asked == "auto" and layout == "contiguous" and device.type in CHANNELS_LAST
    why = ", as the network does not work in channels-last" if refused else ""
    return f"computes in {precision}, {layout}{why} (--precision {precision} --layout {layout})"


def _refusal(model: nn.Module, x: Images, layout: Layout) -> str:
    """Why the network does not work in this layout; empty if it does, and it is then stored in the layout."""
    if layout == "channels-last" and x.device.type == "cpu" and not works_in_channels_last(model):
        return "has strided 1x1 convolutions of too few channels, whose gradients this CPU gets wrong"
    before = layout_of(model)
    scores = _scores(model, x)
    try:
        set_layout(model, layout)
        tolerance = TOLERANCE * scores.nan_to_num().abs().max().item()
        if torch.allclose(_scores(model, x), scores, rtol=0, atol=tolerance, equal_nan=True):
            return ""
        why = "gives other scores"
    except RuntimeError as error:
        why = f"does not run ({' '.join(str(error).split())[:150]})"
    set_layout(model, before)
    return why


def _scores(model: nn.Module, x: Images) -> Tensor:
    with held(model), torch.no_grad(), seeded(0, x.device):
        return logits(model(x))


def autocast(device: torch.device | str, precision: Precision) -> Any:
    """The context of a precision on a device. Casts are not cached: attacks toggle ``requires_grad`` inside it.

    Raises:
        InputError: another word than auto, bf16 and fp32
    """
    check_word("precision", precision, get_args(Precision))
    if precision == "fp32" or (precision == "auto" and native_precision(device) == "fp32"):
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, cache_enabled=False)


@contextmanager
def seeded(seed: int, device: torch.device | str) -> Iterator[None]:
    """Draws from ``seed`` inside the block; afterwards the global generators continue from where they were."""
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
        # torch 2.6 does not have get_capabilities
        found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if on_cpu else {}
        native = any("bf16" in name and there for name, there in found.items())
    return "bf16" if native else "fp32"


def best_device() -> str:
    """The fastest kind of device here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def find_device(name: torch.device | str, *, computing: bool = False) -> torch.device:
    """A device by name, such as cpu, cuda, cuda:1 or mps.

    Args:
        computing: refuse one that holds no values either, such as meta
    Raises:
        InputError: there is none of that name here
    """
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
    if computing:
        try:
            torch.ones(1, device=device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise InputError(f"The device {device} does not compute; here are {', '.join(here)}.") from error
    return device


@contextmanager
def placed(models: Sequence[nn.Module], device: torch.device | str | None) -> Iterator[torch.device]:
    """Moves networks to a device inside the block, and back afterwards.

    Args:
        device: default where the first network is that has parameters or buffers, or else the CPU
    Raises:
        InputError: no network, no such device here, or a network on several devices that would have to be moved
    """
    for model in models:
        check_made(model)
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


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Switches autocast off inside the block, on devices that have it."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def works_in_channels_last(model: nn.Module) -> bool:
    """False if the CPU would compute wrong gradients, or crash, with the kernels stored channels-last.

    oneDNN's gradient of a strided 1x1 kernel writes past its memory if it has fewer input channels than a vector has
    numbers (uxlfoundation/oneDNN issue 6035, seen with torch 2.14).
    """
    vector = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return not any(
        layer.kernel_size == (1, 1) and max(layer.stride) > 1 and layer.in_channels // layer.groups < vector
        for layer in convolutions
    )
