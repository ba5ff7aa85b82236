"""A digest of what a network computes apart from its weights: its modules, their code and their options."""

import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from functools import partial
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clat.network import fingerprint

DEPTH = 4  # how deep nested options are read
_EVERY_MODULE_HAS = frozenset(vars(nn.Module()))  # its tensors have a digest of their own


def structure_digest(model: nn.Module) -> str:
    """SHA-256 over each module's name, class, code and options, the first 16 digits.

    It tells apart networks of equal weights that compute something else: another stride, another function, a forward
    pass that was edited since. Functions outside the modules' classes count only if a module holds them.
    """
    classes = {kind: _class(kind) for kind in {type(module) for module in model.modules()}}
    parts = [[name, classes[type(module)], _options(module)] for name, module in model.named_modules()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _options(module: nn.Module) -> dict[str, Any]:
    own = {key: _described(value) for key, value in vars(module).items() if key not in _EVERY_MODULE_HAS}
    if isinstance(module, torch.jit.ScriptModule):
        own["code"] = str(module.inlined_code)
    return own


def _class(kind: type) -> list[Any]:
    """The classes from this one up to ``nn.Module``, with their methods and constants."""
    above = [each for each in kind.__mro__ if each not in (nn.Module, object)]
    return [
        [f"{each.__module__}.{each.__qualname__}", {k: _described(v) for k, v in vars(each).items() if k[:2] != "__"}]
        for each in above
    ]


def _described(value: Any, depth: int = DEPTH) -> Any:
    """A value as JSON: the same in every process, and different for different values, as far as Python shows them."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, Tensor):
        return fingerprint(value) if value.device.type != "meta" else str(value.shape)
    if isinstance(value, (np.ndarray, np.generic)):
        return [str(value.dtype), list(value.shape), hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()]
    if isinstance(value, (torch.dtype, torch.device, complex, bytes)):
        return repr(value)
    if isinstance(value, CodeType):
        return [value.co_code.hex(), list(value.co_names), _described(value.co_consts, depth)]
    if depth == 0:
        return _name(value)

    def inside(part: Any) -> Any:
        return _described(part, depth - 1)

    if isinstance(value, (list, tuple)):
        return [inside(part) for part in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(inside(part), sort_keys=True) for part in value)
    if isinstance(value, Mapping):
        return {str(key): inside(part) for key, part in value.items()}
    if isinstance(value, partial):
        return [inside(value.func), inside(value.args), inside(value.keywords)]
    if isinstance(value, property):
        return inside(value.fget)
    function = getattr(value, "__func__", value)  # of a method
    if isinstance(getattr(function, "__code__", None), CodeType):
        cells = [_cell(cell) for cell in function.__closure__ or ()]
        given = [function.__defaults__, function.__kwdefaults__]
        return [_name(function), inside(function.__code__), inside(given), inside(cells)]
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return _name(value)
    return [_name(value), {key: inside(part) for key, part in vars(value).items()}]


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _name(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', '')}.{named.__qualname__}"
