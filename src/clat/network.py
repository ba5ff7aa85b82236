"""Running a network, and saving, restoring and comparing its state."""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from clat.errors import InputError
from clat.text import plain

Images = Tensor  # Float[Tensor, "batch channel height width"], pixels in [0, 1]
Labels = Tensor  # Int64[Tensor, "batch"]
Cost = Callable[[Images], Tensor]  # Images -> Float[Tensor, "batch"], one value per image
State = dict[str, Tensor]  # dotted name -> tensor, parameters and buffers

# How networks for one size of images begin to refuse others: timm's, torchvision's, those of transformers.
_WRONG_SIZE = re.compile(r"^(Input|Wrong) (image )?(height|width|size)")


def class_scores(model: nn.Module, x: Images) -> Tensor:
    """The class scores (batch, classes), in eval mode, without gradients.

    Raises:
        InputError: the network raised an error, which is named, or did not return one row of scores for each image
    """
    shape = "x".join(map(str, x.shape))
    try:
        with held(model), torch.no_grad():
            scores = logits(_run(model, x))
    except InputError:
        raise
    except Exception as error:  # a network may raise anything
        said = plain(" ".join(str(error).split())[:200]).rstrip(".")
        advice = "; lower batch_size" if isinstance(error, torch.OutOfMemoryError) else ""
        if _WRONG_SIZE.search(said):
            advice = (
                "; give it images of its size (size= of the data), or make the network for theirs (img_size= of timm, "
                "image_size= of torchvision and transformers)"
            )
        raise InputError(
            f"The network raised {type(error).__name__}: {said} on images of shape {shape}{advice}."
        ) from error
    if len(scores) != len(x):
        raise InputError(f"The network returned {len(scores)} rows of class scores for {len(x)} images.")
    return scores


def predict(model: nn.Module, x: Images) -> Tensor:
    """The predicted classes (batch,), in eval mode. Raises InputError if a class score is not finite."""
    scores = class_scores(model, x)
    if not torch.isfinite(scores).all():
        raise InputError("The network gave class scores that are not finite; check its weights.")
    return scores.argmax(1)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over every parameter and buffer and its name, the first 16 digits."""
    return digest_of_tensors({name: fingerprint(tensor) for name, tensor in tensors(model).items()})[:16]


def digest_of_tensors(fingerprints: Mapping[str, str]) -> str:
    """SHA-256 over the names and fingerprints of tensors."""
    lines = (f"{name} {mark}\n" for name, mark in sorted(fingerprints.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def logits(output: Any) -> Tensor:
    """The class scores (batch, classes) in what a classifier returns.

    They are the tensor itself; what is called ``logits`` in an object, a dict or a named tuple; or else the one tensor
    (batch, classes) in a dict, a tuple or a list. If these hold several, all must have the same shape, and the first
    one is taken, since auxiliary heads come after the main one.

    Raises:
        InputError: no such tensor, or several of different shapes
    """
    if isinstance(output, Mapping):
        output = output.get("logits", output)
    output = getattr(output, "logits", output)
    if isinstance(output, (Mapping, tuple, list)):
        output = _only_scores(list(output.values() if isinstance(output, Mapping) else output))
    if not isinstance(output, Tensor):
        raise InputError(
            f"The network returned {_kind(output)}, in which clat finds no class scores; return the tensor, or name it "
            "logits in an object or a dict."
        )
    scores = output
    if scores.dim() != 2:
        raise InputError(
            f"The network returned shape {tuple(scores.shape)}; a classifier returns (batch, classes): end it with "
            "pooling and a linear layer."
        )
    return scores.float()


def _only_scores(values: list[Any]) -> Any:
    """The tensor of class scores among those that a network returned; the first one if none looks like it."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    scores = [tensor for tensor in tensors if tensor.dim() == 2]
    if len(shapes := list(dict.fromkeys(tuple(tensor.shape) for tensor in scores))) > 1:
        raise InputError(
            f"The network returned tensors of shape {' and '.join(map(str, shapes))}, and does not say which are the "
            "class scores; return these alone, or name them logits in an object or a dict."
        )
    return next(iter([*scores, *tensors]), values)


def _kind(output: Any) -> str:
    return "nothing" if output is None else type(output).__name__


def first_tensor(output: Any) -> Tensor:
    """The first tensor in a module's output, which may be a tensor, a tuple, a list or a dict."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    for value in values if isinstance(values, (tuple, list, type({}.values()))) else ():
        if isinstance(value, Tensor):
            return value
    raise InputError(f"A layer or network returned {type(output).__name__} with no tensor in it.")


def by_image(feature: Tensor, *, images: int, module: nn.Module) -> Tensor:
    """The feature with one row an image, also where the sequence comes first or each image was cut into windows."""
    sequence_first = isinstance(module, nn.MultiheadAttention) and not module.batch_first
    if feature.dim() > 1 and feature.shape[1] == images and (sequence_first or feature.shape[0] % images):
        feature = feature.transpose(0, 1)
    if feature.dim() < 2 or feature.shape[0] % images:
        raise InputError(
            f"A {type(module).__name__} returned shape {tuple(feature.shape)} for {images} images, so its features "
            "cannot be told apart by image."
        )
    return feature if feature.shape[0] == images else feature.unflatten(0, (images, -1))


def per_image(values: Tensor, like: Images) -> Tensor:
    """Reshapes (batch,) to broadcast against (batch, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def check_made(model: nn.Module) -> None:
    """Raises InputError for no network, or a layer without weights as it takes their shape from the first images."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"A {type(model).__name__} is no network; give a torch.nn.Module, such as clat.build_model or "
            "clat.load_checkpoint return."
        )
    named = (*model.named_parameters(), *model.named_buffers())
    if lazy := next((name for name, tensor in named if is_lazy(tensor)), None):
        raise InputError(
            f"The network's {plain(lazy)} has no shape before it has seen images (a lazy layer); run a batch of images "
            "through the network before you hand it over, in a factory too."
        )


def check_images(x: Images) -> None:
    """Raises InputError unless x is (batch, channel, height, width) with finite pixels in [0, 1]."""
    if not isinstance(x, Tensor):
        raise InputError(
            f"Images must be a float tensor (batch, channel, height, width); got {type(x).__name__}, which "
            "torch.as_tensor may convert."
        )
    if x.dim() != 4 or not x.is_floating_point():
        divide = "; divide uint8 pixels by 255" if x.dtype == torch.uint8 else ""
        raise InputError(
            f"Images must be a float tensor (batch, channel, height, width); got {x.dtype} {tuple(x.shape)}{divide}."
        )
    if not x.numel():
        raise InputError("The batch has no images.")
    if x.is_meta:
        return  # a shape without values
    low, high = torch.stack(torch.aminmax(x)).tolist()
    if math.isnan(low) or math.isnan(high):
        raise InputError("Some pixels are NaN; clean the data first.")
    if low < -1e-6 or high > 1 + 1e-6:
        raise InputError(
            f"Pixels lie in [{low:.3g}, {high:.3g}], not in [0, 1]; divide by 255, or leave the normalisation to the "
            "model."
        )


def whole_labels(y: Labels, x: Images, classes: int | None = None) -> Labels:
    """The labels of a batch as int64, whatever integers they come as.

    Args:
        classes: the network's outputs, if labels are to be compared with them
    Raises:
        InputError: no tensor of integers, not one label an image, or labels that the network has no output for
    """
    if not isinstance(y, Tensor):
        raise InputError(f"Labels must be a tensor of whole numbers, one an image; got {type(y).__name__}.")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise InputError(f"Labels must be whole numbers, such as int64; got {y.dtype}.")
    if y.shape != x.shape[:1]:
        raise InputError(f"There are {len(x)} images but labels of shape {tuple(y.shape)}; give one label an image.")
    y = y.long()
    if classes is not None and not y.is_meta:
        first, last = torch.stack(torch.aminmax(y)).tolist()
        if not 0 <= first <= last < classes:
            raise InputError(f"The labels run from {first} to {last}, but the network has {classes} outputs.")
    return y


def learnable_labels(y: Labels, x: Images, classes: int | None = None) -> Labels:
    """What a cross-entropy takes: whole labels, or what each class counts for each image, float (batch, classes).

    Args:
        classes: the network's outputs, if labels are to be compared with them
    Raises:
        InputError: neither of them, or not one an image
    """
    if not isinstance(y, Tensor) or not y.is_floating_point() or y.dim() != 2:
        return whole_labels(y, x, classes)
    if len(y) != len(x) or classes not in (None, y.shape[1]):
        raise InputError(
            f"Labels that give the share of each class must have shape ({len(x)}, {classes or 'classes'}); got "
            f"{tuple(y.shape)}."
        )
    if not y.is_meta and not bool(((y >= 0) & y.isfinite()).all()):
        raise InputError("Labels that give the share of each class must be numbers from 0 on.")
    return y


class NoGradientError(InputError):
    """The network's output has no gradient to the pixels."""


def check_gradient(values: Tensor) -> None:
    """Raises NoGradientError unless a value computed from the pixels has a gradient to them."""
    if not values.requires_grad:
        raise NoGradientError(
            "Gradient attacks cannot see through this network: what it returns has no gradient to the pixels; attack "
            "it without gradients, by clat evaluate --tier blackbox (Square)."
        )


@contextmanager
def no_overwriting() -> Iterator[None]:
    """Raises NoGradientError if a backward pass inside fails since the network overwrote what it needs."""
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise NoGradientError(
            "The network changes a tensor in place that its own gradient needs, so it can be neither trained nor "
            "attacked; write such a step with a new tensor, as in y = y * z in place of y *= z."
        ) from error


@contextmanager
def held(model: nn.Module, mode: Literal["eval", "batch", "train"] = "eval") -> Iterator[None]:
    """Puts the network in ``mode`` and switches off parameter gradients inside the block, then restores both.

    Restored are each module's training flag, each parameter's ``requires_grad`` and, unless the mode is "train",
    each buffer's content.
    """
    training = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = [] if mode == "train" else list(model.buffers())
    copies = [(buffer.clone(), buffer._version) for buffer in buffers]
    try:
        model.train(mode != "eval")
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, was_training in training:
            module.training = was_training
        for parameter in trainable:
            parameter.requires_grad_(True)
        with torch.no_grad():
            for buffer, (copy, version) in zip(buffers, copies, strict=True):
                # Unchanged ones are not written: a graph may need them. BatchNorm in train mode bumps no version.
                if mode == "batch" or buffer._version != version:
                    buffer.copy_(copy)


def eager(model: nn.Module, x: Images) -> Any:
    """Runs the network without ``torch.compile``, because compiled code does not run hooks."""
    return _run(getattr(model, "_orig_mod", model)._call_impl, x)


def _run(model: Callable[[Images], Any], x: Images) -> Any:
    """What a network returns. Raises InputError if it changed its images in place: they are still needed."""
    version = None if x.is_inference() else x._version  # without gradients, torch would let it pass
    output = model(x)
    if version is not None and x._version != version:
        raise InputError(
            "The network changes its images in place; let it begin with a copy, as in x = (x - mean) / std in place of "
            "x.sub_(mean).div_(std)."
        )
    return output


@contextmanager
def hooked(handles: list[RemovableHandle]) -> Iterator[None]:
    """Removes the hooks afterwards. Meanwhile attention does not take its fast path, on which hooks do not run."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()


def tensors(model: nn.Module) -> State:
    """Every parameter and buffer by dotted name, those left out of checkpoints included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def snapshot(model: nn.Module) -> State:
    """A copy on the CPU of every parameter and buffer."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors(model).items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, type and bits; NaN equals the same NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def fingerprint(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in row-major order."""
    return hashlib.sha256(_bytes(tensor).numpy().tobytes()).hexdigest()
