"""Public PyTorch checkpoints as networks: by the names that known code bases use, or by the network's own names."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clat.errors import InputError
from clat.models import MODELS, Normalized, bridge, build_model
from clat.models.schemes import SCHEMES, Rename, Scheme, Tensors
from clat.models.spec import WEIGHTS
from clat.models.untrusted import named_tensors, read_untrusted, unwrapped
from clat.text import plain

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "1.")  # dropped where every weight has them
NORMALISATION = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}  # buffers, with any prefix before the name

Statistics = dict[str, list[float]]  # mean and std of a normalisation, one number a channel; empty if there is none
Origin = Literal["file", "given", "none"]


@dataclass(frozen=True)
class Imported:
    """A network read from a public checkpoint.

    model: with the file's weights, in eval mode; scheme: how the file names it; wrapper: the keys that lead to the
    weights; options: of the network; normalisation: where its mean and std come from.
    """

    model: Normalized
    scheme: Scheme
    wrapper: tuple[str, ...]
    options: dict[str, Any]
    normalisation: Origin


def import_weights(
    path: Path | str,
    name: str,
    *,
    classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **options: Any,
) -> Imported:
    """Reads a public checkpoint into a network.

    Args:
        path: a file written by torch.save (only tensors and plain values in it) or a safetensors file
        name: the network: one of those in ``SCHEMES``, whose parts may have the names that other code bases use, or any
            other of ``build_model``'s, whose own names the file must have
        classes: number of classes; default: that of the file's last layer, which it must match
        mean, std: per-channel statistics of pixels in [0, 1]; default: the file's own, or none if it has none
        options: of the network, e.g. ``shortcut_input="raw"``; they come before what the scheme implies
    Raises:
        InputError: no such file, a file that is not a checkpoint or holds Python objects, a network or names that are
            not known, tensors that are missing or of another shape
    """
    if (mean is None) != (std is None):
        raise InputError("Give both mean and std, or neither.")
    given = {"mean": list(mean), "std": list(std)} if mean is not None and std is not None else {}
    content, wrapper = unwrapped(read_untrusted(Path(path)))
    tensors = named_tensors(content, path)
    schemes = [scheme for scheme in SCHEMES if name in scheme.models]
    if schemes:
        return _by_scheme(schemes, tensors, wrapper, path, name, classes, given, options)
    return _by_own_names(tensors, wrapper, path, name, classes, given, options)


def _by_scheme(
    schemes: list[Scheme],
    tensors: Tensors,
    wrapper: tuple[str, ...],
    path: Path | str,
    name: str,
    classes: int | None,
    given: Statistics,
    options: dict[str, Any],
) -> Imported:
    """Weights by the names of the code base that fits best; classes and channels as the file's shapes say."""
    tensors, own = _split(tensors, path)
    statistics, source = _normalisation(own, given)
    scheme, network, names = _recognised(schemes, name, options, tensors, path)
    normalise = options.pop("normalise", None)
    if normalise is not None:
        source = "given"
        if statistics:
            raise InputError(f"The normalisation is in {path} or given by mean and std; leave normalise out.")
    options = {**scheme.options, **options}
    found = {ours: tensors[theirs] for theirs, ours in names.items()}
    head = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    stem = next(key for key, module in network.named_modules() if isinstance(module, nn.Conv2d))
    scores, channels = _size(found[f"{head}.weight"], 0), _size(found[f"{stem}.weight"], 1)
    if classes is not None and classes != scores:
        raise InputError(f"{path} has {scores} classes, not {classes}; leave classes out to take them from the file.")
    for key, values in statistics.items():
        if len(values) != channels or (key == "std" and not min(values) > 0):
            raise InputError(f"{key} is {values}; give one number a channel ({channels}), std above 0.")

    model = build_model(
        name,
        scores,
        channels=channels,
        mean=statistics.get("mean"),
        std=statistics.get("std"),
        normalise=normalise,
        **options,
    )
    _check(tensors, names, model.network, name, path)
    model.network.load_state_dict(scheme.rearranged(found) if scheme.rearranged else found, strict=False)
    return Imported(model.eval(), scheme, wrapper, options, source)


def _split(tensors: Tensors, path: Path | str) -> tuple[Tensors, Statistics]:
    """The weights by name without prefixes, and the normalisation's mean and std if there are any."""
    buffers = {key: kind for key in tensors if (kind := NORMALISATION.get(key.rpartition(".")[2]))}
    statistics = {kind: tensors[key].flatten().tolist() for key, kind in buffers.items()}
    tensors = {key: tensor for key, tensor in tensors.items() if key not in buffers}
    if len(statistics) == 1:
        raise InputError(f"{path} holds the {next(iter(statistics))} of a normalisation alone; give mean and std.")
    while tensors and (prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in tensors)), None)):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors, statistics


def _normalisation(own: Statistics, given: Statistics) -> tuple[Statistics, Origin]:
    """The mean and std to use, and where they come from."""
    if given:
        return given, "given"
    return own, "file" if own else "none"


def _recognised(
    schemes: list[Scheme], name: str, options: dict[str, Any], tensors: Tensors, path: Path | str
) -> tuple[Scheme, nn.Module, dict[str, str]]:
    """The scheme whose names fit best, its network (on the meta device) and our name of each tensor by the file's."""
    tried = []
    for scheme in schemes:
        with torch.device("meta"):
            network = build_model(name, 2, **{**scheme.options, **options}).network
        wanted = set(network.state_dict())
        names = {theirs: ours for theirs in tensors if (ours := _renamed(theirs, scheme.renames))}
        strange = [theirs for theirs, ours in names.items() if ours not in wanted]
        # Files from before PyTorch 0.4.1 do not count batches.
        missing = [ours for ours in wanted - set(names.values()) if not ours.endswith("num_batches_tracked")]
        tried.append((len(strange) + len(missing), scheme, network, names, strange, sorted(missing)))
    _, scheme, network, names, strange, missing = min(tried, key=lambda entry: entry[0])
    if 2 * len(strange) > len(names):
        known = "; ".join(scheme.name for scheme in schemes)
        raise InputError(
            f"The names in {path} fit no scheme known for {name} ({known}); its first are {_some(tensors)}."
        )
    if strange:
        raise InputError(
            f"{path} names tensors as {scheme.name} does, but {name} has no place for {_some(strange)}; is it another "
            "network?"
        )
    if missing:
        raise InputError(
            f"{path} names tensors as {scheme.name} does, but has nothing for {_some(missing)} of {name}; is it "
            "another network, or incomplete?"
        )
    if len(set(names.values())) < len(names):
        raise InputError(f"{path} names some tensors of {name} twice; its first names are {_some(tensors)}.")
    return scheme, network, names


def _renamed(name: str, renames: Sequence[Rename]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def _size(tensor: Tensor, axis: int) -> int:
    """The length of an axis, 1 if there is none; the later comparison of shapes then reports it."""
    return max(1, tensor.shape[axis]) if tensor.dim() > axis else 1


def _by_own_names(
    raw: Tensors,
    wrapper: tuple[str, ...],
    path: Path | str,
    name: str,
    classes: int | None,
    given: Statistics,
    options: dict[str, Any],
) -> Imported:
    """Weights by the network's own names, prefixes aside; classes and channels as the file's shapes say."""
    if ":" not in name:  # the weights are here
        options = {key: value for key, value in options.items() if key not in WEIGHTS}
    few = classes or 2
    outline = _outline(name, few, 3, options)
    tensors, own, missing, strange = _fitted(raw, outline)
    _check_names(missing, strange, name, path)
    channels = 3
    if not name.startswith("torchvision/"):
        channels = _inferred(tensors, outline, _outline(name, few, 4, options), 3, path, "channels") or 3
    scores = _inferred(tensors, outline, _outline(name, few + 1, 3, options), few, path, "classes")
    if classes is not None and scores not in (None, classes):
        raise InputError(f"{path} has {scores} classes, not {classes}; leave classes out to take them from the file.")
    if scores is None and classes is None and _takes_classes(name):
        raise InputError(f"The shapes in {path} do not tell how many classes there are; give --classes.")
    scores = scores or classes or _last_size(tensors)
    statistics, source = _normalisation(own, given)
    if not given and options.get("normalise") is not None:
        source = "given"
    names = {key: key for key in tensors}
    _check(tensors, names, _outline(name, scores, channels, options), name, path)  # before memory is taken
    model = build_model(
        name, scores, channels=channels, mean=statistics.get("mean"), std=statistics.get("std"), **options
    )
    _check(tensors, names, model.network, name, path)
    model.network.load_state_dict(tensors, strict=False)  # _fitted knows what may be missing
    shown = {key: value for key, value in options.items() if key != "normalise"}
    return Imported(model.eval(), Scheme("the network itself", (name,)), wrapper, shown, source)


def _outline(name: str, classes: int, channels: int, options: Mapping[str, Any]) -> nn.Module:
    """The network, on the meta device if it can be made there, with no normalisation."""
    arguments = {**options, "normalise": "none"}
    try:
        with torch.device("meta"):
            return build_model(name, classes, channels=channels, **arguments).network
    except InputError:
        if ":" not in name:
            raise
        return build_model(name, classes, channels=channels, **arguments).network


def _fitted(raw: Tensors, network: nn.Module) -> tuple[Tensors, Statistics, list[str], list[str]]:
    """The tensors by the network's names, a normalisation before it, and the names that are missing and strange; of
    the ways to take prefixes off, the one that fits best."""
    wanted = network.state_dict().keys()
    before = [key for key in raw if key.rpartition(".")[2] in NORMALISATION]
    found = {NORMALISATION[key.rpartition(".")[2]]: raw[key].flatten().tolist() for key in before}
    ways: list[tuple[Tensors, Statistics]] = [(raw, {})]  # the network may have a mean and std of its own
    if len(found) == len(before) == 2:
        ways.append(({key: tensor for key, tensor in raw.items() if key not in before}, found))
    for tensors, statistics in ways:  # which grows as prefixes go
        prefix = next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in tensors)), None)
        if prefix and tensors:
            ways.append(({key.removeprefix(prefix): value for key, value in tensors.items()}, statistics))

    def misfits(way: Tensors) -> tuple[list[str], list[str]]:
        # Files from before PyTorch 0.4.1 do not count batches.
        missing = [key for key in wanted if key not in way and not key.endswith("num_batches_tracked")]
        return missing, [key for key in way if key not in wanted]

    best, statistics = min(ways, key=lambda way: sum(map(len, misfits(way[0]))))
    return best, statistics, *misfits(best)


def _check_names(missing: Sequence[str], strange: Sequence[str], name: str, path: Path | str) -> None:
    """Raises InputError if the file lacks names of the network or has others."""
    kinds = (("nothing for", missing), ("no place in the network for", strange))
    said = " and ".join(f"{what} {_some(map(plain, names))}" for what, names in kinds if names)
    if said:
        raise InputError(f"{path} has {said}; is it of another network than {name}, or incomplete?")


def _inferred(
    tensors: Tensors, first: nn.Module, second: nn.Module, low: int, path: Path | str, what: str
) -> int | None:
    """How many classes or channels the file's network has, from the same network made for ``low`` and one more; None
    where these do not differ."""
    one, two = first.state_dict(), second.state_dict()
    for name, tensor in one.items():
        if isinstance(tensor, nn.UninitializedParameter) or name not in tensors or name not in two:
            continue
        if isinstance(two[name], nn.UninitializedParameter) or tensor.dim() != tensors[name].dim():
            continue
        for axis, (a, b) in enumerate(zip(tensor.shape, two[name].shape, strict=True)):
            if a != b:
                count, rest = divmod(tensors[name].shape[axis] - a, b - a)
                if rest or low + count < 1:
                    shape = tuple(tensors[name].shape)
                    raise InputError(f"{plain(name)} has shape {shape} in {path}, which fits no number of {what}.")
                return low + count
    return None


def _takes_classes(name: str) -> bool:
    return name in MODELS or bridge(name) is not None


def _last_size(tensors: Tensors) -> int:
    """The first axis of the last matrix, which is the classes' where a network ends in a linear layer."""
    return next((len(tensor) for tensor in reversed(list(tensors.values())) if tensor.dim() == 2 and len(tensor)), 1)


def _check(tensors: Tensors, names: Mapping[str, str], network: nn.Module, name: str, path: Path | str) -> None:
    """Raises InputError unless the file's tensors have the network's shapes and are finite."""
    expected = network.state_dict()
    for theirs, ours in names.items():
        tensor, wanted = tensors[theirs], expected[ours]
        if isinstance(wanted, nn.UninitializedParameter):
            continue
        if tensor.shape != wanted.shape:
            raise InputError(
                f"{plain(theirs)} has shape {tuple(tensor.shape)} in {path}, but {tuple(wanted.shape)} in "
                f"{name}; choose the network, or the options, that the file was made with."
            )
        if tensor.is_floating_point() != wanted.is_floating_point() and wanted.is_floating_point():
            raise InputError(f"{plain(theirs)} in {path} holds whole numbers; save the weights as floating point.")
    for theirs in names:
        if tensors[theirs].is_floating_point() and not torch.isfinite(tensors[theirs]).all():
            raise InputError(f"{plain(theirs)} in {path} holds numbers that are not finite; the network is broken.")


def _some(names: Iterable[str]) -> str:
    """The first names, for an error message."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
