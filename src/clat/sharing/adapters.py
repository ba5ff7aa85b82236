"""Adapters: a file of the tensors that a run changed, which turns the run's base into its fine-tuned network."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clat.checkpoint import checkpoint_path, load_tensors, save_tensors
from clat.errors import InputError
from clat.network import State, digest_of_tensors, fingerprint, same_bits, tensors
from clat.text import plain
from clat.training.runs import Run


@dataclass(frozen=True)
class Adapter:
    """What a run changed in its network.

    Args:
        tensors: whole parameters and buffers, by the network's names
        facts: those of the run's checkpoint (its network, training data and validation accuracies), and under
            ``adapter`` the ``base`` (the digest of the weights that the run began with), ``tied`` (second names of
            shared tensors), ``recipe`` and ``selections`` (the layers, with the epoch from which they trained)
    """

    tensors: State
    facts: dict[str, Any]


def save_adapter(run: Path | str, out: Path | str) -> Adapter:
    """Writes what a run changed, atomically, and returns it.

    Every parameter and buffer of the checkpoint is compared with its fingerprint from before the first step, so that
    the base itself is not needed.

    Args:
        run: a run folder (its best checkpoint), or another checkpoint in one, such as ``runs/clat/last.safetensors``
        out: a safetensors file
    Raises:
        InputError: no run, a damaged file, or a place that cannot be written
    """
    path = checkpoint_path(run)
    folder = Run(path.parent)
    start = folder.start
    state, facts = load_tensors(path)
    if "epoch" not in facts or not state.keys() & start.keys():
        raise InputError(f"{plain(path)} is no checkpoint of the run whose start {plain(folder.folder)} records.")
    # A tensor with two names is recorded under the first. Under the second it is always stored.
    changed = {name: tensor for name, tensor in state.items() if fingerprint(tensor) != start.get(name)}
    about = {
        "base": digest_of_tensors({name: start[name] for name in state if name in start}),
        "tied": [name for name in state if name not in start],
        "recipe": folder.recipe,
        "selections": [
            {"epoch": selection.epoch, "layers": list(selection.layers)}
            for selection in folder.selections
            if selection.epoch <= facts["epoch"]
        ],
    }
    adapter = Adapter(changed, {**facts, "adapter": about})
    save_tensors(Path(out), adapter.tensors, **adapter.facts)
    return adapter


def load_adapter(path: Path | str) -> Adapter:
    """Reads what ``save_adapter`` wrote.

    Raises:
        InputError: no such file, or no adapter
        DamagedError: content that does not match the file's digest
    """
    stored, facts = load_tensors(Path(path))
    if "adapter" not in facts:
        raise InputError(f"{plain(path)} is a whole checkpoint, no adapter; use it as it is.")
    if unstored := [name for name in facts["adapter"]["tied"] if name not in stored]:
        raise InputError(f"{plain(path)} is no usable adapter: it says that it holds {plain(unstored[0])}.")
    return Adapter(stored, facts)


def applied(base: State, adapter: Adapter, name: object = "This network") -> State:
    """The tensors of the fine-tuned network, bit for bit, by name; those that the run left alone are the base's.

    Args:
        base: the ``state_dict`` of the network that the run began with
        name: of the base, for messages
    Raises:
        InputError: another base
    """
    about = adapter.facts["adapter"]
    if digest_of_tensors({key: fingerprint(base[key]) for key in base.keys() - set(about["tied"])}) != about["base"]:
        raise InputError(
            f"{plain(name)} is not the base of this adapter: its weights, or their names, are not those that the run "
            "began with; give the run's own base, and the --model that the run was given, if any."
        )
    for key, tensor in adapter.tensors.items():
        if key not in base or (tensor.shape, tensor.dtype) != (base[key].shape, base[key].dtype):
            raise InputError(f"The adapter does not fit its base: {plain(key)[:100]} has another shape or type there.")
    return {**base, **adapter.tensors}


def apply_adapter(model: nn.Module, adapter: Adapter) -> nn.Module:
    """The fine-tuned network as a new one in eval mode, on the device of the base, which stays as it is.

    The two share the memory of all that the run left alone, so that several adapters over one base cost little. To
    train one of them, make a ``deepcopy`` of it first.

    Args:
        model: the network that the run began with
    Raises:
        InputError: another base
    """
    base = model.state_dict()
    changed = {name: tensor for name, tensor in applied(base, adapter).items() if not same_bits(tensor, base[name])}
    shared = {id(tensor): _view(tensor) for name, tensor in tensors(model).items() if name not in changed}
    tuned = deepcopy(model, shared)  # which takes what it finds in its memo, by id, instead of copying it
    tuned.load_state_dict(changed, strict=False)
    return tuned.eval()


def write_applied(
    base: State, spec: dict[str, Any] | None, adapter: Adapter, out: Path | str, name: object = "This network"
) -> None:
    """Writes the fine-tuned network as a checkpoint, with the facts of the run's own.

    Args:
        base, name: as for ``applied``
        spec: how to build the base's network, as its checkpoint has it; an adapter does not choose that
    Raises:
        InputError: another base, or a place that cannot be written
    """
    facts = {key: value for key, value in adapter.facts.items() if key not in ("adapter", "model")}
    save_tensors(Path(out), applied(base, adapter, name), model=spec, **facts)


def _view(tensor: Tensor) -> Tensor:
    """Another tensor over the same memory, which can be moved to a device or frozen without the first."""
    shared = tensor.detach()
    return nn.Parameter(shared, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shared
