"""Networks that clat does not write: timm's, torchvision's, and those that code of the user's makes."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from clat.errors import InputError
from clat.models.fetching import from_hub, reaching
from clat.models.normalisation import Numbers, of_timm, of_torchvision
from clat.network import State
from clat.text import plain


@dataclass(frozen=True)
class Bridged:
    """A network of another library.

    own: gives the mean and std that it was pre-trained with, where weights came with it; head: what became of its head
    then, in words; new_head: whether that has random weights, although the rest has not; options: with which it is
    made again.
    """

    network: nn.Module
    own: Callable[[], tuple[Numbers, Numbers]] | None = None
    head: str = ""
    new_head: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def from_timm(name: str, classes: int, channels: int, options: dict[str, Any]) -> Bridged:
    import timm

    if options.get("checkpoint_path"):
        raise InputError(f"Bring the weights in with clat import FILE --model timm/{name}, not with checkpoint_path.")
    weights = _downloaded(name) if options.get("pretrained") else {}
    try:
        with reaching("The server of timm's weights", f"timm/{name}"):
            network = timm.create_model(name, num_classes=classes, in_chans=channels, **weights, **options)
    except InputError:
        raise
    except (RuntimeError, ValueError, OSError, AssertionError) as error:
        raise InputError(f"timm could not make {name!r}: {error}.") from error
    if not options.get("pretrained"):
        return Bridged(network, options=options)
    trained: Any = getattr(network, "pretrained_cfg", None) or {}
    theirs = trained.get("num_classes") or 0
    head = head_in_words(f"timm/{name}", theirs, classes)
    return Bridged(network, lambda: of_timm(network), head, theirs != classes, options)


def _downloaded(name: str) -> dict[str, Any]:
    """Tells timm where the weights are that it would fetch from the hub, as a safetensors file."""
    from timm.models import get_pretrained_cfg

    trained = get_pretrained_cfg(name)
    if trained is None or not trained.hf_hub_id or "/" not in trained.hf_hub_id:
        return {}  # timm says what is wrong with the name, or fetches a URL, which it reads without executing anything
    file = Path(trained.hf_hub_filename or "model.safetensors").with_suffix(".safetensors").name
    folder = from_hub(trained.hf_hub_id, [file, "open_clip_model.safetensors"], f"timm/{name}")
    found = next(iter(sorted(folder.glob("*.safetensors"))), None)
    if found is None:
        raise InputError(f"The weights of timm/{plain(name)} are not on the hub as safetensors; clat reads no other.")
    return {"pretrained_cfg_overlay": {"file": str(found)}}


def from_torchvision(name: str, classes: int, channels: int, options: dict[str, Any]) -> Bridged:
    from torchvision import models

    options = dict(options)
    if name not in models.list_models(module=models):
        raise InputError(f"torchvision has no classifier {plain(name)!r}.")
    if options.get("weights"):
        raise InputError(f"Write torchvision/{name},pretrained=true in place of weights=.")
    if channels != 3:
        raise InputError(f"Networks of torchvision take images with 3 channels; these have {channels}.")
    pretrained = options.pop("pretrained", False)
    if pretrained and name in ("googlenet", "inception_v3"):
        options["transform_input"] = True  # their weights take the pixels in [-1, 1], which the network itself makes

    def make(count: int) -> nn.Module:
        return models.get_model(name, weights=None, num_classes=count, **options)

    network = make(classes)
    if not pretrained:
        return Bridged(network, options=options)
    trained = models.get_model_weights(name).DEFAULT
    with reaching("The server of torchvision's weights", f"torchvision/{name}"):
        state = trained.get_state_dict(progress=False, check_hash=True, weights_only=True)
    load_but_head(network, state, names_in_head(make, classes), f"torchvision/{name}")
    categories = trained.meta["categories"]
    head = head_in_words(f"torchvision/{name}", len(categories), classes, categories)
    return Bridged(network, lambda: of_torchvision(trained), head, len(categories) != classes, options)


def names_in_head(make: Callable[[int], nn.Module], classes: int) -> set[str]:
    """The names of the tensors whose shape depends on the number of classes.

    Args:
        make: makes the network for a number of classes
    """
    with torch.device("meta"):
        one, other = (make(count).state_dict() for count in (classes, classes + 1))
    return {name for name, tensor in one.items() if tensor.shape != other[name].shape}


def load_but_head(network: nn.Module, state: State, head: set[str], name: str) -> None:
    """Loads pretrained weights; those in the ``head`` may have another shape and then stay as they are.

    Raises:
        InputError: other tensors that are missing or of another shape
    """
    own = network.state_dict()
    misfits = {key for key in own if key not in state or own[key].shape != state[key].shape}
    if misfits - head:
        raise InputError(misfit_in_words(name, misfits - head))
    network.load_state_dict({key: tensor for key, tensor in state.items() if key in own.keys() - misfits}, strict=False)


def misfit_in_words(name: str, tensors: set[str]) -> str:
    """That pretrained weights do not fit the network that was made for them."""
    return (
        f"The pretrained weights of {plain(name)} do not fit these options: {plain(min(tensors))} is missing or has "
        "another shape; leave the options out, or pretrained."
    )


def head_in_words(name: str, theirs: int, classes: int, names: Sequence[str] = ()) -> str:
    """What becomes of the head of a pretrained network, in a sentence.

    Args:
        theirs: the number of classes that it was trained for; 0 if it has no head
        names: those of its classes, if known
    """
    if theirs == classes:
        listed = f" ({', '.join(plain(each)[:30] for each in names[:3])}, ...)" if names else ""
        return f"The head of {name} is kept: its {theirs:,} classes{listed} must be those of the data, in this order."
    was = f"that of {name} is for {theirs:,}" if theirs else f"{name} has none"
    return f"The head is new, with random weights for {classes:,} classes; {was}."


def from_factory(name: str, classes: int, channels: int, options: dict[str, Any]) -> Bridged:
    """Calls the user's factory. The name must come from the user's call, never from a file."""
    place, _, attribute = name.rpartition(":")
    file = Path(place) if place.endswith(".py") else None
    with _importable(file.parent if file else Path()):
        try:
            module = _executed(file) if file else importlib.import_module(place)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"Model {plain(name)!r} could not be imported: {plain(error)}.") from error
        if not callable(factory := getattr(module, attribute, None)):
            own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
            listed = f"; there are {plain(', '.join(own[:10]))}" if own else ""
            raise InputError(f"{plain(place)} has no function or class {plain(attribute)!r}{listed}.")
        given = options
        try:
            accepted = inspect.signature(factory).parameters
            for value, keys in ((classes, ("classes", "num_classes")), (channels, ("channels", "in_chans"))):
                for key in keys:
                    if key in accepted:
                        given = {key: value, **given}
                        break
            network = factory(**given)
        except Exception as error:
            said = f"{type(error).__name__}: {plain(error)}" if str(error) else type(error).__name__
            raise InputError(f"Model {plain(name)!r} failed with the options {given}: {said}.") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"Model {name!r} returned {type(network).__name__}; it must return a torch.nn.Module.")
    return Bridged(network, options=options)


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
