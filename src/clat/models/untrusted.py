"""Weights from a file that others made: nothing in it is executed, and no file takes more memory than its length."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from clat.errors import InputError
from clat.text import plain

DEEPEST = 8  # dicts inside dicts around the weights


WRAPPERS = ("state_dict", "model_state_dict", "net", "model", "best", "last")  # the first one present is opened


def read_untrusted(path: Path) -> Any:
    """Reads the file's content; nothing in it is executed."""
    try:
        if not path.is_file():
            raise InputError(f"There is no file at {plain(path)}.")
        if path.suffix == ".safetensors":
            return load_file(path)
        _check_entries(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise InputError(f"{path} is not a PyTorch checkpoint or is damaged.") from error
        raise InputError(
            f"{path} holds a Python object ({refused[1]}), which could run code when read and is refused; where you "
            "trust the file, load it yourself and save its state_dict() alone."
        ) from error
    except InputError:
        raise
    except PermissionError as error:
        raise InputError(f"{path} may not be read; change its permissions.") from error
    except Exception as error:  # the unpickler fails in any way on bytes that are not a checkpoint
        raise InputError(f"{path} is not a PyTorch checkpoint or is damaged; was it cut off?") from error


def _check_entries(path: Path) -> None:
    """Refuses an archive whose content is larger than itself: torch.save never compresses, and shares no bytes."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if sum(entry.file_size for entry in entries) > path.stat().st_size or any(entry.compress_type for entry in entries):
        raise InputError(
            f"{plain(path)} is compressed, as no weights by torch.save are; save the network's state_dict() alone."
        )


def unwrapped(content: Any) -> tuple[Any, tuple[str, ...]]:
    """The innermost dict of weights, and the keys that lead to it."""
    opened: tuple[str, ...] = ()
    while isinstance(content, Mapping) and len(opened) < DEEPEST:  # a dict can hold itself
        key = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if key is None:
            break
        content, opened = content[key], (*opened, key)
    return content, opened


def named_tensors(content: Any, path: Path | str) -> dict[str, Tensor]:
    """The tensors by name, all of them dense, of real numbers and with values of their own."""
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{path} holds no named tensors, so it is no checkpoint of a network's weights.")
    for name, tensor in tensors.items():
        kind = (
            "has no values (it is on the meta device)"
            if tensor.is_meta
            else "is sparse"
            if tensor.layout != torch.strided or tensor.is_nested
            else "is quantised"
            if tensor.is_quantized
            else "is complex"
            if tensor.is_complex()
            else "repeats few values"
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
            else None
        )
        if kind:
            raise InputError(f"{plain(name)} in {path} {kind}; save dense tensors of real numbers.")
    return tensors
