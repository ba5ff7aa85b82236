"""Image classifiers of Hugging Face transformers: the configuration is data, the weights are safetensors, and the code
is the library's own."""

import importlib.util
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clat.errors import InputError
from clat.inputs import nearest
from clat.models.bridges import Bridged, head_in_words, misfit_in_words, names_in_head
from clat.models.fetching import from_hub
from clat.models.normalisation import of_preprocessor
from clat.text import plain

# Those that take images alone and whose configuration is one level of keys and values.
KINDS = (
    *("beit", "bit", "convnext", "convnextv2", "cvt", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers"),
    *("efficientnet", "focalnet", "hgnet_v2", "hiera", "ijepa", "levit", "mobilenet_v1", "mobilenet_v2", "mobilevit"),
    *("mobilevitv2", "poolformer", "pvt", "pvt_v2", "regnet", "resnet", "segformer", "swiftformer", "swin", "swinv2"),
    *("textnet", "vit", "vit_msn"),
)

# The largest numbers in a configuration that a checkpoint brings. Counts of layers multiply each other.
_LIMITS = ((re.compile(r"layer|depth|block|level|repeat"), 256), (re.compile(r"image_size|window"), 2048))
_LARGEST, _LONGEST = 65_536, 64


@dataclass(frozen=True)
class _Plan:
    """How a network is made: the kind in its configuration, its class, and the settings that this kind has."""

    kind: str
    network: str
    settings: dict[str, Any]

    def configuration(self, classes: int) -> Any:
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[self.kind](num_labels=classes, **self.settings)

    def architecture(self) -> Any:
        import transformers

        return getattr(transformers, self.network)

    def make(self, classes: int) -> nn.Module:
        return self.architecture()(self.configuration(classes))

    def recorded(self) -> dict[str, Any]:
        """As JSON, with the defaults of this version of transformers; ``_planned`` makes the same plan of it."""
        made = self.configuration(2)
        own = {key: getattr(made, key) for key in _settings(self.kind)}
        return {"model_type": self.kind, "architectures": [self.network], **json.loads(json.dumps(own))}


def from_transformers(name: str, classes: int, channels: int, options: dict[str, Any]) -> Bridged:
    """An image classifier of transformers.

    Args:
        name: a repository on the Hugging Face hub, or a folder that ``save_pretrained`` wrote
        options: ``pretrained=True`` for its weights too; ``config``, its configuration, if not the one at ``name``; any
            other replaces a setting in the configuration, such as ``image_size=32``
    Raises:
        InputError: transformers is not installed, nothing of that name, a network of another kind, an unknown setting,
            or weights that do not fit
    """
    check_installed()
    options, called = dict(options), f"transformers/{name}"
    pretrained, config = options.pop("pretrained", False), options.pop("config", None)
    folder = Path() if config else _folder(name, weights=pretrained)
    config = config or _read(folder / "config.json", called)
    with _quietly():
        try:
            plan = _changed(_planned(config, called), options, channels, called, pretrained)
            again: dict[str, Any] = {"config": plan.recorded()}
            if Path(name).is_dir():  # the place is the user's own affair
                again["name"] = f"transformers/{folder.name}"
            if not pretrained:
                return Bridged(plan.make(classes), options=again)
            network, theirs = _loaded(plan, folder, config, classes, called)
        except InputError:
            raise
        except Exception as error:  # each kind checks its settings in its own way
            said = plain(" ".join(str(error).split())[:300]).rstrip(".")
            raise InputError(f"transformers could not make {plain(called)}: {said}.") from error
    names = [str(each) for each in dict(config.get("id2label") or {}).values()]
    names = [] if all(re.fullmatch(r"LABEL_\d+", each) for each in names) else names  # as if it had none
    head = head_in_words(called, theirs, classes, names)
    return Bridged(network, lambda: of_preprocessor(folder, called), head, theirs != classes, again)


def check_installed() -> None:
    """Raises InputError unless transformers can be imported."""
    if importlib.util.find_spec("transformers") is None:
        raise InputError("Networks of transformers need that package; run: pip install 'torch-clat[transformers]'.")


def _folder(name: str, *, weights: bool) -> Path:
    """The folder with the files of a network: the one named, or one with those that are downloaded."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith(("/", ".", "~")):
        raise InputError(f"There is no folder {plain(name)}.")
    wanted = ["config.json", "preprocessor_config.json", *(["model*.safetensors*"] if weights else [])]
    return from_hub(name, wanted, f"transformers/{name}")


def _read(file: Path, called: str) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{plain(called)} has no config.json that can be read; is it of transformers?") from error


def _planned(config: Mapping[str, Any], called: str) -> _Plan:
    """The plan in a configuration; what else it may name stays unread, such as code, kernels and quantisation."""
    kind = config.get("model_type")
    if kind not in KINDS:
        raise InputError(
            f"{plain(called)} is of the kind {plain(kind)}, but clat takes {', '.join(KINDS)}; bring another as "
            "file.py:factory."
        )
    networks, asked = _networks(kind), (config.get("architectures") or [None])[0]
    settings = {key: config[key] for key in _settings(kind) if key in config}
    return _Plan(kind, asked if asked in networks else networks[0], settings)


def _settings(kind: str) -> list[str]:
    """The names of the settings that this kind of network has beyond those of every network."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    common = {each.name for each in fields(PreTrainedConfig)}
    return [each.name for each in fields(CONFIG_MAPPING[kind]) if each.name not in common and each.name[0] != "_"]


def _networks(kind: str) -> tuple[str, ...]:
    """The classes of this kind's image classifiers, the usual one first."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[kind]
    return (found,) if isinstance(found, str) else tuple(found)


def _changed(plan: _Plan, options: dict[str, Any], channels: int, called: str, pretrained: bool) -> _Plan:
    """The plan with the caller's options and the number of channels of the images."""
    known = _settings(plan.kind)
    for key in options:
        if key not in known:
            raise InputError(f"{plain(called)} has no setting {plain(key)}.{nearest(key, known)}")
    theirs = getattr(plan.configuration(2), "num_channels", 3)
    if channels != theirs and (pretrained or "num_channels" not in known):
        raise InputError(f"{plain(called)} takes images with {theirs} channels; these have {channels}.")
    more = {"num_channels": channels} if channels != theirs else {}
    return _Plan(plan.kind, plan.network, {**plan.settings, **options, **more})


def _loaded(plan: _Plan, folder: Path, config: Mapping[str, Any], classes: int, called: str) -> tuple[nn.Module, int]:
    """The network with the weights in a folder, and how many classes these are for; 0 if they have no head."""
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{plain(called)} has no weights as safetensors, and clat reads no pickle; where you trust them, load them "
            "in Python and write them with save_pretrained."
        )
    network, found = plan.architecture().from_pretrained(
        folder,
        config=plan.configuration(classes),
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        dtype=torch.float32,
    )
    missing, resized = set(found["missing_keys"]), {key for key, *_ in found["mismatched_keys"]}
    if others := (missing | resized) - names_in_head(plan.make, classes):
        raise InputError(misfit_in_words(called, others))
    trained_for = len(config.get("id2label") or ()) or config.get("num_labels") or 2  # 2 where nothing is said
    return network.train(), 0 if missing else trained_for if resized else classes


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the progress bars and reports of transformers; clat says itself what it did."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def harmless(config: Any) -> bool:
    """Whether a configuration from a file names a known kind, and gives plain settings of bounded size."""
    if not isinstance(config, Mapping) or config.get("model_type") not in KINDS:
        return False
    check_installed()
    known = {"model_type", "architectures", *_settings(config["model_type"])}
    return all(key in known and _bounded(key, value) for key, value in config.items())


def _bounded(key: str, value: Any, depth: int = 3) -> bool:
    if isinstance(value, list):
        return depth > 0 and len(value) <= _LONGEST and all(_bounded(key, each, depth - 1) for each in value)
    if isinstance(value, str):
        return len(value) <= _LONGEST
    if isinstance(value, (bool, type(None))):
        return True
    largest = next((limit for pattern, limit in _LIMITS if pattern.search(key)), _LARGEST)
    return isinstance(value, (int, float)) and math.isfinite(value) and abs(value) <= largest
