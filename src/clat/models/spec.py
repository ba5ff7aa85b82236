"""What a file can say about its network: a known name, and options of known types and sizes, never code to call."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from clat.errors import InputError
from clat.models.hugging_face import harmless
from clat.text import plain

WEIGHTS = ("pretrained", "weights", "checkpoint_path")  # options that say where weights come from
MOST_CLASSES, MOST_CHANNELS = 1_000_000, 4096
DEEPEST = 3  # networks inside networks


class Option(NamedTuple):
    """The values that an option can have, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


def whole(low: int, high: int) -> Option:
    """A whole number in a range."""
    return Option(
        f"a whole number from {low:,} to {high:,}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
    )


def real(low: float, high: float) -> Option:
    """A finite number in a range."""
    return Option(
        f"a number from {low:g} to {high:g}",
        lambda value: (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and math.isfinite(value)
            and low <= value <= high
        ),
    )


def word(*words: str) -> Option:
    """One of a few words."""
    return Option(" or ".join(words), lambda value: isinstance(value, str) and value in words)


def several(count: int, each: Option) -> Option:
    """A list of that length."""
    return Option(
        f"a list of {count}, each {each.words}",
        lambda value: isinstance(value, (list, tuple)) and len(value) == count and all(map(each.fits, value)),
    )


def either(*options: Option) -> Option:
    """Whatever one of the options takes."""
    return Option(
        ", or ".join(option.words for option in options), lambda value: any(option.fits(value) for option in options)
    )


FLAG = Option("true or false", lambda value: isinstance(value, bool))

_WIDTH = whole(1, 4096)
_BLOCKS = whole(1, 256)
_SHARE = real(0, 1)
_WIDE = {
    "depth": whole(10, 1000),
    "width": whole(1, 128),
    "padding": word("symmetric", "asymmetric"),
    "activation": word("relu", "silu"),
}

OPTIONS: dict[str, dict[str, Option]] = {
    "rn18": {"width": _WIDTH},
    "rn50": {"width": _WIDTH},
    "dn121": {"growth": whole(1, 512), "blocks": several(4, _BLOCKS)},
    "vgg19": {"width": _WIDTH, "hidden": whole(1, 65_536), "dropout": _SHARE},
    "preactrn18": {"width": _WIDTH, "final_norm": FLAG, "shortcut_input": word("activated", "raw")},
    "wrn34-10": _WIDE,
    "wrn70-16": _WIDE,
    "rawrn70-16": {"blocks": several(3, _BLOCKS), "widths": several(3, whole(1, 8192)), "stem": _WIDTH},
    "mixed": {
        "alpha": either(_SHARE, word("learned")),
        "temperature": several(2, real(0, 1000)),
        "width": _WIDTH,
        "gamma": several(2, real(-1000, 1000)),
        "interval": several(2, _SHARE),
    },
}
_SIZE = whole(1, 2048)
TIMM_OPTIONS: dict[str, Option] = {
    **dict.fromkeys(("drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate"), _SHARE),
    "img_size": either(_SIZE, several(2, _SIZE)),
    "patch_size": either(whole(1, 256), several(2, whole(1, 256))),
    "depth": whole(1, 256),
    "depths": several(4, whole(1, 256)),
    "dims": several(4, whole(1, 8192)),
    "embed_dim": whole(1, 8192),
    "num_heads": either(whole(1, 256), several(4, whole(1, 256))),
    "window_size": either(whole(1, 256), several(2, whole(1, 256))),
    "global_pool": word("avg", "max", "avgmax", "catavgmax", "token", "map", "fast", ""),
}
TRANSFORMERS_OPTIONS = {"config": Option("the configuration of an image classifier of transformers", harmless)}
TORCHVISION_OPTIONS: dict[str, Option] = {
    **dict.fromkeys(("dropout", "stochastic_depth_prob"), _SHARE),
    "image_size": _SIZE,
    **dict.fromkeys(("transform_input", "init_weights"), FLAG),
}


def recorded(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A network's specification as a checkpoint keeps it: without where weights and normalisation came from, since
    the file has both."""
    return {
        key: recorded(value) if isinstance(value, Mapping) else value
        for key, value in spec.items()
        if key not in (*WEIGHTS, "normalise")
    }


def check_sizes(spec: Any, where: object) -> None:
    """Raises InputError unless ``spec`` is an object with the name, classes and channels of a network."""
    if not isinstance(spec, dict):
        raise InputError(f"{plain(where)} does not describe its network by keys and values.")
    name = spec.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= 200:
        raise InputError(f"{plain(where)} does not name its network.")
    for key, option in (("classes", whole(1, MOST_CLASSES)), ("channels", whole(1, MOST_CHANNELS))):
        if key in spec or key == "classes":
            _check(spec.get(key), option, key, where)


def from_file(spec: Any, where: object) -> dict[str, Any]:
    """The arguments of ``build_model`` in a file's specification of its network.

    Args:
        where: the file, for messages
    Raises:
        InputError: code to call, an unknown network, an option that a file may not set, or one of another type or size
    """
    check_sizes(spec, where)
    return _checked(spec, where, 0)


def _checked(spec: Any, where: object, depth: int) -> dict[str, Any]:
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str) or depth > DEEPEST:
        raise InputError(f"{plain(where)} does not describe its network by name and options.")
    spec = {key: value for key, value in spec.items() if key not in (*WEIGHTS, "normalise")}
    name = spec["name"]
    known = _known(name, where)
    if known is TRANSFORMERS_OPTIONS and "config" not in spec:
        raise InputError(
            f"{plain(where)} names {plain(name)} without its configuration, and a file may not have that read from "
            f"elsewhere; name the network in this call: --model {plain(name)}."
        )
    for key, value in spec.items():
        if key in ("name", "classes", "channels"):
            continue
        if name == "mixed" and key in ("accurate", "robust"):
            spec[key] = _checked(value, where, depth + 1)
            continue
        if key not in known:
            raise InputError(
                f"{plain(where)} sets {plain(key)} of {plain(name)}, which a file may not; name the network with its "
                f"options in this call: --model {plain(name)},..."
            )
        _check(value, known[key], key, where)
    return spec


def _known(name: str, where: object) -> Mapping[str, Option]:
    """The options that a file may set of a network that it may name."""
    if name in OPTIONS:
        return OPTIONS[name]
    if re.fullmatch(r"timm/[a-z0-9_.]+", name):
        import timm

        if timm.is_model(name.removeprefix("timm/").partition(".")[0]):
            return TIMM_OPTIONS
    elif re.fullmatch(r"torchvision/[a-z0-9_]+", name):
        return TORCHVISION_OPTIONS
    elif name.startswith("transformers/"):
        return TRANSFORMERS_OPTIONS
    elif ":" in name:
        raise InputError(
            f"{plain(where)} was made by {plain(name)}, which a file may not call; name it in this call: "
            "--model mynet.py:make (in Python: load_checkpoint(path, model=make()))."
        )
    raise InputError(f"{plain(where)} names a network {plain(name)!r} that clat does not know.")


def _check(value: Any, option: Option, key: str, where: object) -> None:
    if not option.fits(value):
        raise InputError(f"{plain(where)} gives {plain(key)} as {plain(value)[:40]}; it must be {option.words}.")
