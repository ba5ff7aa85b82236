"""Checkpoints that say how to build their network: safetensors, never a pickle, and never code that a file chose."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from clat.errors import DamagedError, InputError
from clat.facts import parse_facts
from clat.files import write_atomically
from clat.models import Normalized, build_model
from clat.models.spec import check_sizes, from_file, recorded
from clat.text import plain

KEY = "clat"  # metadata entry that tells our checkpoints from others
DIGEST = "sha256"  # metadata entry with the digest of all that the file holds


@dataclass(frozen=True)
class Header:
    """A checkpoint's content without its tensors: facts, and each tensor's shape and whether it is of floats."""

    facts: dict[str, Any]
    shapes: dict[str, tuple[tuple[int, ...], bool]]


def save_checkpoint(path: Path | str, model: nn.Module, state: dict[str, Tensor] | None = None, **facts: Any) -> None:
    """Writes a network's parameters and buffers (``state`` instead, if given), and how to build it, atomically.

    A network that ``build_model`` did not make can be written too; to load it, give ``load_checkpoint`` the module.
    """
    spec = recorded(model.spec) if isinstance(model, Normalized) and model.spec else None
    save_tensors(Path(path), state or model.state_dict(), model=spec, **facts)


def load_checkpoint(path: Path | str, model: nn.Module | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The network stored in a checkpoint file or run folder (its best checkpoint), and the facts stored with it.

    A file may name the library's own networks and those of timm and torchvision. It never chooses code to run: where
    it names a factory, or a module that ``build_model`` did not make, the caller gives the network.

    Args:
        model: a network to read the weights into, made as it was when they were stored; it is changed in place
    Returns:
        the network in eval mode and the facts. The network is ``model``, if given, inside a normalisation where the
        weights were stored with one
    Raises:
        InputError: no checkpoint, not one of clat's, of a network that a file may not choose, or with weights that
            do not fit it
        DamagedError: content that does not match its digest
    """
    path = checkpoint_path(path)
    header = load_header(path)
    if model is not None:
        network, target = _joined(model, header)
    else:
        network = target = _built(header, path)
    facts = load_weights(path, target)
    return network.eval(), facts


def checkpoint_path(path: Path | str) -> Path:
    """The file of a checkpoint or run folder: in a folder, the best checkpoint by validation."""
    path = Path(path)
    if _holds(path.is_dir):
        if not _holds((path / "best.safetensors").is_file):
            raise InputError(f"{plain(path)} has no best.safetensors; is it a run folder whose first epoch is done?")
        return path / "best.safetensors"
    if not _holds(path.exists):
        raise InputError(f"There is no checkpoint or run folder at {plain(path)}.")
    return path


def _built(header: Header, path: Path) -> nn.Module:
    """The network that a header describes; made on the meta device first, where shapes can be compared for free."""
    if not header.facts.get("model"):
        raise InputError(
            f"{plain(path)} holds a network that build_model did not make; give it in this call: --model mynet.py:make "
            "(in Python: load_checkpoint(path, model=yours))."
        )
    spec = from_file(header.facts["model"], path)
    channels = spec.get("channels", 3)
    arguments = {"mean": [0.0] * channels, "std": [1.0] * channels, **spec}  # the real ones are among the weights
    try:
        with torch.device("meta"):
            outline = build_model(**arguments)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"The network in {plain(path)} could not be built: {plain(error)}.") from error
    _check_shapes(outline, header, path)
    model = build_model(**arguments)
    model.source = ""
    return model


def _check_shapes(outline: nn.Module, header: Header, path: Path) -> None:
    expected = {
        name: (tuple(tensor.shape), tensor.is_floating_point()) for name, tensor in outline.state_dict().items()
    }
    name = next((name for name in [*expected, *header.shapes] if expected.get(name) != header.shapes.get(name)), None)
    if name is not None:
        wanted, found = (
            "nothing" if entry is None else f"shape {entry[0]} of {'floats' if entry[1] else 'whole numbers'}"
            for entry in (expected.get(name), header.shapes.get(name))
        )
        raise InputError(
            f"The weights in {plain(path)} do not fit the network that it names: {plain(name)[:100]} has {found} in "
            f"the file and {wanted} in the network."
        )


def _joined(model: nn.Module, header: Header) -> tuple[nn.Module, nn.Module]:
    """What ``load_checkpoint`` returns for the caller's network, and the part of it that the file's tensors go into."""
    if set(model.state_dict()) == set(header.shapes):
        return model, model
    if _is_wrapped(header.shapes) and not isinstance(model, Normalized):
        channels = max(1, *header.shapes["mean"][0])
        device = next((tensor.device for tensor in model.state_dict().values()), None)
        wrapped = Normalized(model, [0.0] * channels, [1.0] * channels).to(device)
        return wrapped, wrapped
    if isinstance(model, Normalized) and not _is_wrapped(header.shapes):
        return model, model.network
    return model, model


def load_weights(path: Path | str, model: nn.Module) -> dict[str, Any]:
    """Reads a checkpoint's tensors into a network that has the same ones, and returns the facts stored with them."""
    tensors, facts = load_tensors(Path(path))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        said = " ".join(" ".join(str(error).splitlines()[1:3]).split())
        raise InputError(f"The weights in {plain(path)} do not fit the network: {plain(said)}") from error
    return facts


def export_weights(source: Path | str | nn.Module, to: Path | str) -> dict[str, list[float]]:
    """Writes a network's weights by its own names, as a safetensors file that loads without clat.

    ``safetensors.torch.load_file(to)`` gives what the network's own ``load_state_dict`` takes. The mean and std by
    which clat normalises the pixels are not among the weights but in the file's metadata, as the JSON lists ``mean``
    and ``std``: without clat, normalise the pixels by them. Its entry ``model`` says how clat builds the network.

    Args:
        source: a checkpoint, a run folder (its best checkpoint) or a network
    Returns:
        mean and std, one number a channel; empty if clat does not normalise
    Raises:
        InputError: no checkpoint, or a place that cannot be written
    """
    if isinstance(source, nn.Module):
        tensors, wrapped = source.state_dict(), isinstance(source, Normalized)
        spec = recorded(source.spec) if isinstance(source, Normalized) else None
    else:
        path = checkpoint_path(source)
        spec, tensors = load_header(path).facts.get("model"), load_tensors(path)[0]
        wrapped = _is_wrapped(tensors)
    statistics = {key: tensors[key].flatten().tolist() for key in ("mean", "std")} if wrapped else {}
    if wrapped:
        tensors = _inside(tensors)
    content = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {key: json.dumps(value) for key, value in {**statistics, "model": spec}.items() if value}
    file = save(content, {"format": "pt", **metadata})
    write_atomically(Path(to), lambda temporary: temporary.write_bytes(file))
    return statistics


def _is_wrapped(names: Any) -> bool:
    """Whether these are the names of a network inside clat's normalisation, with its prefix ``network.``."""
    return {"mean", "std"} <= set(names) and all(
        name in ("mean", "std") or name.startswith("network.") for name in names
    )


def _inside(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("network."): t for name, t in tensors.items() if name not in ("mean", "std")}


def is_checkpoint(path: Path | str) -> bool:
    """Whether the path is a run folder or a checkpoint that clat wrote, even a damaged one; other weights are none."""
    path = Path(path)
    if path.is_dir():
        return True
    try:
        with safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return path.suffix == ".safetensors"


def save_tensors(path: Path, tensors: dict[str, Tensor], /, **facts: Any) -> None:
    """Writes tensors and JSON facts about them, and a digest of both, atomically as safetensors."""
    content = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(facts)
    # Not save_file, which goes through a file of its own beside the temporary one, and leaves it there if killed.
    file = save(content, {KEY: text, DIGEST: _digest(content, text)})
    write_atomically(path, lambda temporary: temporary.write_bytes(file))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what ``save_tensors`` wrote and checks its digest. Older files have no digest.

    Raises:
        InputError: no such file, not safetensors, not written by clat, or with facts of another form
        DamagedError: content that does not match its digest
    """
    with _opened(path) as (file, metadata):
        facts = _facts(metadata, path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a dict)
    if DIGEST in metadata and metadata[DIGEST] != _digest(tensors, metadata[KEY]):
        raise DamagedError(
            f"{plain(path)} is damaged: its content does not match the digest it was written with; use another copy "
            "or epoch."
        )
    return tensors, facts


def load_header(path: Path) -> Header:
    """Facts and shapes in a checkpoint; no tensor is read. Raises InputError as ``load_tensors``, or for an adapter."""
    with _opened(path) as (file, metadata):
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {
            name: (tuple(part.get_shape()), part.get_dtype().startswith(("F", "BF"))) for name, part in parts.items()
        }
        facts = _facts(metadata, path)
    if "adapter" in facts:
        raise InputError(
            f"{plain(path)} is an adapter, which holds only what a run changed; make the whole network with clat "
            f"adapter apply BASE {plain(path)} --out model.safetensors."
        )
    return Header(facts, shapes)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """A file of clat's and its metadata. The format's reader has checked all sizes against the file's length."""
    if not _holds(path.is_file):
        raise InputError(f"There is no checkpoint at {plain(path)}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                raise InputError(
                    f"{plain(path)} was not written by clat: it does not say which network its weights belong to."
                )
            yield file, metadata
    except (SafetensorError, OSError) as error:
        raise DamagedError(
            f"{plain(path)} is not a readable safetensors file ({plain(error)}); bring in a public checkpoint with "
            "clat import."
        ) from error


def _facts(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    """The facts in a file's metadata. Raises InputError if they have another form than clat writes."""
    facts = parse_facts(metadata[KEY], path)
    if facts.get("model") is not None:
        check_sizes(facts["model"], path)
    return facts


def _holds(question: Callable[[], bool]) -> bool:
    """The answer to ``path.is_file`` and the like; no where the system refuses it, as for a name that is too long."""
    try:
        return question()
    except (OSError, ValueError):
        return False


def _digest(tensors: dict[str, Tensor], facts: str) -> str:
    """SHA-256 of the facts and of every tensor's name, type, shape and bytes in row-major order."""
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
