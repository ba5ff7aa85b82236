"""Networks that clat does not write: timm's, torchvision's, and those that code of the user's makes."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from clat.errors import InputError
from clat.text import plain


def from_timm(name: str, classes: int, channels: int, options: dict[str, Any]) -> nn.Module:
    import timm

    if options.get("checkpoint_path"):
        raise InputError(f"Bring the weights in with clat import FILE --model timm/{name}, not with checkpoint_path.")
    try:
        return timm.create_model(name, num_classes=classes, in_chans=channels, **options)
    except (RuntimeError, ValueError, OSError, AssertionError) as error:
        raise InputError(f"timm could not make {name!r}: {error}.") from error


def from_torchvision(name: str, classes: int, channels: int, options: dict[str, Any]) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise InputError(f"torchvision has no classifier {plain(name)!r}.")
    if options.get("weights") or options.get("pretrained"):
        raise InputError(
            f"Weights of torchvision come in with clat import FILE --model torchvision/{name}; timm/NAME has "
            "pretrained=true."
        )
    if channels != 3:
        raise InputError(f"Networks of torchvision take images with 3 channels; these have {channels}.")
    return models.get_model(name, weights=None, num_classes=classes, **options)


def from_factory(name: str, classes: int, channels: int, options: dict[str, Any]) -> nn.Module:
    """Calls the user's factory. The name must come from the user's call, never from a file."""
    place, _, attribute = name.rpartition(":")
    file = Path(place) if place.endswith(".py") else None
    with _importable(file.parent if file else Path()):
        try:
            factory = getattr(_executed(file) if file else importlib.import_module(place), attribute)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"Model {plain(name)!r} could not be imported: {plain(error)}.") from error
        try:
            accepted = inspect.signature(factory).parameters
            for value, keys in ((classes, ("classes", "num_classes")), (channels, ("channels", "in_chans"))):
                for key in keys:
                    if key in accepted:
                        options = {key: value, **options}
                        break
            network = factory(**options)
        except Exception as error:
            said = f"{type(error).__name__}: {plain(error)}" if str(error) else type(error).__name__
            raise InputError(f"Model {plain(name)!r} failed with the options {options}: {said}.") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"Model {name!r} returned {type(network).__name__}; it must return a torch.nn.Module.")
    return network


def _executed(file: Path) -> ModuleType:
    """A Python file as a module, under a name that no other module can have."""
    if not file.is_file():
        raise InputError(f"There is no Python file at {plain(file)}.")
    name = f"_clat_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
    described = importlib.util.spec_from_file_location(name, file)
    assert described is not None
    assert described.loader is not None
    module = importlib.util.module_from_spec(described)
    sys.modules[name] = module  # dataclasses look their module up
    described.loader.exec_module(module)
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Lets the user's code import the files beside it; afterwards ``sys.path`` is as it was."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(entry)
