"""Checkpoints that say how to build their network: safetensors, never a pickle."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from clat.errors import InputError
from clat.files import write_atomically
from clat.models import build_model

KEY = "clat"  # metadata entry that tells our checkpoints from others


def save_tensors(path: Path, tensors: dict[str, Tensor], **facts: Any) -> None:
    """Writes tensors and JSON facts about them atomically as safetensors."""
    content = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # Not save_file, which goes through a file of its own beside the temporary one, and leaves it there if killed.
    file = save(content, {KEY: json.dumps(facts)})
    write_atomically(path, lambda temporary: temporary.write_bytes(file))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``save_tensors`` wrote.

    Raises:
        InputError: no such file, not safetensors, or not written by clat
    """
    if not path.is_file():
        raise InputError(f"There is no checkpoint at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is not a readable safetensors file ({error}); bring in a public checkpoint with clat import."
        ) from error
    if KEY not in metadata:
        raise InputError(f"{path} was not written by clat: it does not say which network its weights belong to.")
    return tensors, json.loads(metadata[KEY])


def save_checkpoint(path: Path | str, model: nn.Module, state: dict[str, Tensor] | None = None, **facts: Any) -> None:
    """Writes a network's parameters and buffers (``state`` instead, if given), and how to build it, atomically."""
    save_tensors(Path(path), state or model.state_dict(), model=getattr(model, "spec", None), **facts)


def load_weights(path: Path | str, model: nn.Module) -> dict[str, Any]:
    """Reads a checkpoint into a network of the same shape, whatever its state, and returns the facts stored with it."""
    tensors, facts = load_tensors(Path(path))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()
        raise InputError(f"The weights in {path} do not fit the network: {' '.join(first[1:3]).strip()}") from error
    return facts


def load_checkpoint(path: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """The network stored in a checkpoint file or run folder (its best checkpoint), and the facts stored with it.

    Raises:
        InputError: no checkpoint, not one of clat's, or of a network that ``build_model`` cannot make
    """
    path = checkpoint_path(path)
    _, facts = load_tensors(path)
    if not facts.get("model"):
        raise InputError(
            f"{path} holds a network that was not made by build_model; make it yourself and call load_weights."
        )
    spec = dict(facts["model"])
    channels = spec.get("channels", 3)
    spec.pop("pretrained", None)  # the weights are here
    model = build_model(mean=[0.0] * channels, std=[1.0] * channels, **spec)  # its buffers come with the weights
    load_weights(path, model)
    return model.eval(), facts


def checkpoint_path(path: Path | str) -> Path:
    """The file that a checkpoint or run folder stands for: in a folder, the best checkpoint by validation."""
    path = Path(path)
    if path.is_dir():
        if not (path / "best.safetensors").is_file():
            raise InputError(f"{path} has no best.safetensors; is it a run folder whose first epoch is done?")
        return path / "best.safetensors"
    if not path.exists():
        raise InputError(f"There is no checkpoint or run folder at {path}.")
    return path
