"""How public code bases name the parts of the paper's networks, as one literal table."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Rename = tuple[str, str | Callable[[re.Match[str]], str]]  # a pattern, and what replaces it in a name


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

# weiaicunzai's DenseNet differs (no ReLU before a transition's convolution), and so do its and DeepMind's
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
