"""Reading public PyTorch checkpoints: naming schemes as literal tables, any other network by its own names.

Nothing in a file is executed, and no file takes more memory than its own length.
"""

import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from clat.errors import InputError
from clat.models import MODELS, Normalized, build_model
from clat.models.spec import WEIGHTS
from clat.text import plain

Tensors = dict[str, Tensor]
Rename = tuple[str, str | Callable[[re.Match[str]], str]]  # a pattern, and what replaces it in a name

DEEPEST = 8  # dicts inside dicts around the weights

WRAPPERS = ("state_dict", "model_state_dict", "net", "model", "best", "last")  # the first one present is opened
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "1.")  # dropped where every weight has them
NORMALISATION = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}  # buffers, whatever stands before the name


@dataclass(frozen=True)
class Scheme:
    """How one code base names a network.

    name: what we call the scheme; models: our names of the networks that it names so; renames: from its parameter
    names to ours, applied in order, an empty name is dropped; options: of the network, what the scheme implies;
    rearranged: changes tensors that the same network stores differently; note: what the names cannot tell.
    """

    name: str
    models: tuple[str, ...]
    renames: tuple[Rename, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    rearranged: Callable[[Tensors], Tensors] | None = None
    note: str = ""


def _newest_last(tensors: Tensors) -> Tensors:
    """A DenseNet's input channels in our order (the block's input, then its layers' outputs, oldest first), where
    kuangliu's has the newest first and the block's input last."""
    growth = len(tensors["features.denseblock1.denselayer1.conv2.weight"])
    first_norms = (re.match(r"features\.denseblock(\d)\.denselayer\d+\.norm1\.weight", name) for name in tensors)
    layers = Counter(match[1] for match in first_norms if match)  # of each block

    def ordered(name: str, tensor: Tensor) -> Tensor:
        match = re.match(
            r"features\.(?:denseblock(\d)\.denselayer(\d+)\.(?:norm1|conv1)|transition(\d)|norm5)\.|classifier\.weight",
            name,
        )
        if match is None or not tensor.dim():
            return tensor
        block, layer, transition = match.groups()
        older = int(layer) - 1 if block else layers[transition or "4"]
        axis = min(1, tensor.dim() - 1)
        new = torch.arange(older * growth).view(older, growth).flip(0).flatten()
        return tensor.index_select(axis, torch.cat([torch.arange(len(new), tensor.shape[axis]), new]))

    return {name: ordered(name, tensor) for name, tensor in tensors.items()}


_RESNETS = ("rn18", "rn50")
_WIDE = ("wrn34-10", "wrn70-16")
_SHORTCUT = "If it is from Fast-AT or GradAlign, add shortcut_input=raw; the names are the same."
_DEEPMIND: tuple[Rename, ...] = (
    (r"^init_conv\.", "conv1."),
    (r"^layer\.(\d)\.block\.", lambda match: f"block{int(match[1]) + 1}.layer."),
    (r"\.conv_0\.", ".conv1."),
    (r"\.conv_1\.", ".conv2."),
    (r"\.batchnorm_0\.", ".bn1."),
    (r"\.batchnorm_1\.", ".bn2."),
    (r"\.shortcut\.", ".convShortcut."),
    (r"^batchnorm\.", "bn1."),
    (r"^logits\.", "fc."),
)

# weiaicunzai's DenseNet is another network (no ReLU before a transition's convolution), and so are its and DeepMind's
# pre-activation ResNets; they are refused.
SCHEMES = (
    Scheme("kuangliu (also TRADES, MART, RobustBench)", _RESNETS),
    Scheme("torchvision", _RESNETS, ((r"\.downsample\.", ".shortcut."), (r"^fc\.", "linear."))),
    Scheme(
        "weiaicunzai",
        _RESNETS,
        (
            (r"^conv1\.0\.", "conv1."),
            (r"^conv1\.1\.", "bn1."),
            (r"^conv(\d)_x\.", lambda match: f"layer{int(match[1]) - 1}."),
            (r"\.residual_function\.0\.", ".conv1."),
            (r"\.residual_function\.1\.", ".bn1."),
            (r"\.residual_function\.3\.", ".conv2."),
            (r"\.residual_function\.4\.", ".bn2."),
            (r"\.residual_function\.6\.", ".conv3."),
            (r"\.residual_function\.7\.", ".bn3."),
            (r"^fc\.", "linear."),
        ),
    ),
    Scheme("Rice (also AWP, SCORE)", ("preactrn18",), note=_SHORTCUT),
    Scheme("kuangliu (also Fast-AT, GradAlign)", ("preactrn18",), options={"final_norm": False}, note=_SHORTCUT),
    Scheme("torchvision and weiaicunzai", ("vgg19",)),
    Scheme("torchvision", ("dn121",)),
    Scheme(
        "kuangliu",
        ("dn121",),
        (
            (r"^conv1\.", "features.conv0."),
            (r"^dense(\d)\.(\d+)\.", lambda match: f"features.denseblock{match[1]}.denselayer{int(match[2]) + 1}."),
            (r"\.bn(\d)\.", r".norm\1."),
            (r"^trans(\d)\.bn\.", r"features.transition\1.norm."),
            (r"^trans(\d)\.conv\.", r"features.transition\1.conv."),
            (r"^bn\.", "features.norm5."),
            (r"^linear\.", "classifier."),
        ),
        rearranged=_newest_last,
    ),
    Scheme("TRADES and RobustBench", _WIDE, ((r"^sub_block1\..*", ""),)),  # never run, by an oversight of TRADES
    Scheme(
        "DeepMind (also SCORE, DM-Improves-AT)",
        _WIDE,
        _DEEPMIND,
        {"padding": "asymmetric", "activation": "silu"},
        note="If it was trained with ReLU, add activation=relu; the names are the same.",
    ),
    Scheme("DeepMind (as Peng et al.)", ("rawrn70-16",), _DEEPMIND),
)


@dataclass(frozen=True)
class Imported:
    """A network read from a public checkpoint.

    model: with the file's weights, in eval mode; scheme: how the file names it; wrapper: the keys that lead to the
    weights; options: of the network; normalisation: whence its mean and std.
    """

    model: Normalized
    scheme: Scheme
    wrapper: tuple[str, ...]
    options: dict[str, Any]
    normalisation: Literal["file", "given", "none"]


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
        name: the network: one of those in ``SCHEMES``, which are read by what others call their parts, or any other of
            ``build_model``'s, whose own names the file must have
        classes: number of classes; default: that of the file's last layer, which it must match
        mean, std: per-channel statistics of pixels in [0, 1]; default: the file's own, or none if it has none
        options: of the network, e.g. ``shortcut_input="raw"``; they outweigh what the scheme implies
    Raises:
        InputError: no such file, a file that is no checkpoint or holds Python objects, a network or names that are
            not known, tensors that are missing or of another shape
    """
    schemes = [scheme for scheme in SCHEMES if name in scheme.models]
    if (mean is None) != (std is None):
        raise InputError("Give both mean and std, or neither.")
    content, wrapper = _unwrapped(_read(Path(path)))
    if not schemes:
        return _strictly(content, wrapper, path, name, classes, mean, std, options)
    tensors, statistics = _split(content, path)
    source: Literal["file", "given", "none"] = "file" if statistics else "none"
    if mean is not None and std is not None:
        statistics, source = {"mean": list(mean), "std": list(std)}, "given"

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


def _strictly(
    content: Any,
    wrapper: tuple[str, ...],
    path: Path | str,
    name: str,
    classes: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    options: dict[str, Any],
) -> Imported:
    """Weights by the network's own names, prefixes aside; classes and channels as the file's shapes say."""
    raw = _tensors(content, path)
    if ":" not in name:  # the weights are here
        options = {key: value for key, value in options.items() if key not in WEIGHTS}

    def made(classes: int, channels: int) -> nn.Module:
        """The network, on the meta device if it can be made there, with no normalisation."""
        plainly = {**options, "normalise": "none"}
        try:
            with torch.device("meta"):
                return build_model(name, classes, channels=channels, **plainly).network
        except InputError:
            if ":" not in name:
                raise
            return build_model(name, classes, channels=channels, **plainly).network

    few = classes or 2
    outline = made(few, 3)
    tensors, statistics, missing, strange = _fitted(raw, outline)
    if missing or strange:
        raise InputError(
            f"{path} has "
            + " and ".join(
                f"{what} {_some(map(plain, names))}"
                for what, names in (("nothing for", missing), ("no place in the network for", strange))
                if names
            )
            + f"; is it of another network than {name}, or incomplete?"
        )
    channels = 3
    if not name.startswith("torchvision/"):
        channels = _inferred(tensors, outline, made(few, 4), 3, path, "channels") or 3
    scores = _inferred(tensors, outline, made(few + 1, 3), few, path, "classes")
    if classes is not None and scores not in (None, classes):
        raise InputError(f"{path} has {scores} classes, not {classes}; leave classes out to take them from the file.")
    if scores is None and classes is None and _takes_classes(name):
        raise InputError(f"The shapes in {path} do not tell how many classes there are; give --classes.")
    scores = scores or classes or _last_size(tensors)
    source: Literal["file", "given", "none"] = "file" if statistics else "none"
    if mean is not None and std is not None:
        statistics, source = {"mean": list(mean), "std": list(std)}, "given"
    elif options.get("normalise") is not None:
        source = "given"
    _check(tensors, {key: key for key in tensors}, made(scores, channels), name, path)  # before memory is taken
    model = build_model(
        name, scores, channels=channels, mean=statistics.get("mean"), std=statistics.get("std"), **options
    )
    _check(tensors, {key: key for key in tensors}, model.network, name, path)
    model.network.load_state_dict(tensors, strict=False)  # what may be missing, _fitted knows
    shown = {key: value for key, value in options.items() if key != "normalise"}
    return Imported(model.eval(), Scheme("the network itself", (name,)), wrapper, shown, source)


def _fitted(raw: Tensors, network: nn.Module) -> tuple[Tensors, dict[str, list[float]], list[str], list[str]]:
    """The tensors by the network's names, a normalisation before it, and the names that are missing and strange; of
    the ways to take prefixes off, the one that fits best."""
    wanted = network.state_dict().keys()
    before = [key for key in raw if key.rpartition(".")[2] in NORMALISATION]
    found = {NORMALISATION[key.rpartition(".")[2]]: raw[key].flatten().tolist() for key in before}
    ways: list[tuple[Tensors, dict[str, list[float]]]] = [(raw, {})]  # the network may have a mean and std of its own
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
    return name in MODELS or name.startswith(("timm/", "torchvision/"))


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


def _read(path: Path) -> Any:
    """What the file holds; nothing in it is executed."""
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
    except Exception as error:  # the unpickler fails in any way on bytes that are no checkpoint
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


def _unwrapped(content: Any) -> tuple[Any, tuple[str, ...]]:
    """The innermost dict of weights, and the keys that lead to it."""
    opened: tuple[str, ...] = ()
    while isinstance(content, Mapping) and len(opened) < DEEPEST:  # a dict can hold itself
        key = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if key is None:
            break
        content, opened = content[key], (*opened, key)
    return content, opened


def _tensors(content: Any, path: Path | str) -> Tensors:
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


def _split(content: Any, path: Path | str) -> tuple[Tensors, dict[str, list[float]]]:
    """The weights by name without prefixes, and the normalisation's mean and std if there are any."""
    tensors = _tensors(content, path)
    statistics = {}
    for key in list(tensors):
        kind = NORMALISATION.get(key.rpartition(".")[2])
        if kind is not None:
            statistics[kind] = tensors.pop(key).flatten().tolist()
    if len(statistics) == 1:
        raise InputError(f"{path} holds the {next(iter(statistics))} of a normalisation alone; give mean and std.")
    while tensors and (prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in tensors)), None)):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors, statistics


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
    """The length of an axis; 1 where there is none, so that the shapes are compared and told."""
    return max(1, tensor.shape[axis]) if tensor.dim() > axis else 1


def _some(names: Iterable[str]) -> str:
    """The first names, for an error message."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
