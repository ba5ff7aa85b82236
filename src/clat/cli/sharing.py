"""Commands that hand a network on: adapter save and apply, and export."""

from pathlib import Path

from clat.checkpoint import checkpoint_path, export_weights, load_header, load_tensors
from clat.cli.shared import checkpoint_named, console, exists
from clat.errors import InputError
from clat.models import Normalized, normalisation_of
from clat.models.spec import recorded
from clat.sharing.adapters import load_adapter, save_adapter, write_applied
from clat.sharing.onnx_file import export_onnx
from clat.text import plain


def adapter_save(run: str, *, out: str, overwrite: bool = False) -> None:
    """Writes only what a run changed: its selected layers, their normalisation, and buffers that moved.

    Args:
        run: a run folder (its best checkpoint), or another checkpoint in one
        out: the adapter to write, a safetensors file
        overwrite: replace the file at out
    """
    _check_free(out, overwrite)
    adapter = save_adapter(run, out)
    whole = checkpoint_path(run)
    names = [*adapter.tensors][:4] + (["..."] if len(adapter.tensors) > 4 else [])
    _say(f"{len(adapter.tensors)} of {len(load_header(whole).shapes)} tensors changed: {', '.join(names)}.")
    _say(f"Written to {out}: {_beside(out, whole)}.")
    _say(f"It goes over the weights that the run began with (digest {adapter.facts['adapter']['base'][:16]}).")


def adapter_apply(base: str, adapter: str, *, out: str, model: str | None = None, overwrite: bool = False) -> None:
    """Makes the fine-tuned network from its base and an adapter, bit for bit.

    Args:
        base: the checkpoint or run folder (its best checkpoint) that the adapter's run began with
        adapter: a file that clat adapter save wrote
        out: the checkpoint to write
        model: the network of the base, if it was named for the run too, such as your file.py:factory
        overwrite: replace the file at out
    """
    _check_free(out, overwrite)
    given = load_adapter(adapter)
    if model is None:
        tensors, facts = load_tensors(checkpoint_path(base))
        spec = facts.get("model")
    else:
        network, _ = checkpoint_named(base, model)
        tensors, spec = network.state_dict(), recorded(network.spec) if isinstance(network, Normalized) else None
    write_applied(tensors, spec, given, out, base)
    _say(f"{len(given.tensors)} of {len(tensors)} tensors come from the adapter, all others from {base}.")
    _say(f"Written to {out}; the adapter has {_beside(adapter, out)}.")


def export(run: str, *, to: str, model: str | None = None, size: int | None = None, overwrite: bool = False) -> None:
    """Writes a network for use without clat: its weights by its own names, or an ONNX file.

    Args:
        run: a checkpoint, or a run folder (its best checkpoint)
        to: FILE.safetensors for the weights, or FILE.onnx, which takes pixels in [0, 1]
        model: for an ONNX file, the network if the checkpoint cannot or does not name it, such as your file.py:factory
        size: for an ONNX file, height and width of the images; default as in training
        overwrite: replace the file at to
    """
    kind = Path(to).suffix
    if kind not in (".safetensors", ".onnx"):
        raise InputError(f"{to} is neither a .safetensors nor an .onnx file, which are what clat exports.")
    if kind == ".safetensors" and (model or size):
        raise InputError("--model and --size are for an ONNX file; weights are exported as they are stored.")
    _check_free(to, overwrite)
    if kind == ".onnx":
        _export_onnx(run, to, model, size)
        return
    statistics = export_weights(run, to)
    name = (load_header(checkpoint_path(run)).facts.get("model") or {}).get("name", "the network")
    _say(f"Written to {to}: the weights by the names of {name} itself, {Path(to).stat().st_size:,} bytes.")
    _say("They load without clat: network.load_state_dict(safetensors.torch.load_file(FILE)).")
    mean, std = ("/".join(f"{value:.6g}" for value in statistics.get(key, [])) for key in ("mean", "std"))
    if any(statistics.get("mean", [])) or set(statistics.get("std", [1.0])) != {1.0}:
        _say(f"The network takes normalised images, (x - mean) / std: mean {mean}, std {std} (in the file's metadata).")
    else:
        _say("The network takes pixels in [0, 1] as they are.")


def _export_onnx(run: str, to: str, model: str | None, size: int | None) -> None:
    network, facts = checkpoint_named(run, model)
    channels, *sides = facts["data"]["shape"] if "data" in facts else [(facts.get("model") or {}).get("channels", 3)]
    if size is not None:
        sides = [size, size]
    if not sides:
        raise InputError(f"{run} does not say how large its images are; give --size.")
    difference = export_onnx(network, to, (channels, *sides))
    shape = "x".join(map(str, (channels, *sides)))
    _say(f"Written to {to}: {Path(to).stat().st_size:,} bytes; pixels (batch x {shape}) to scores (batch x classes).")
    _say(f"It takes pixels in [0, 1]; the normalisation is inside: {normalisation_of(network)}.")
    _say(f"Compared on a random image, its scores differ by at most {difference:.1g} from the network's.")


def _check_free(path: str, overwrite: bool) -> None:
    if exists(path) and not overwrite:
        raise InputError(f"{path} is there already; choose another place or add --overwrite.")


def _beside(adapter: str, whole: Path | str) -> str:
    """The size of an adapter beside the checkpoint's."""
    part, all_ = (Path(path).stat().st_size for path in (adapter, whole))
    return f"{part:,} bytes, {100 * part / all_:.1f} % of the {all_:,} of the whole checkpoint"


def _say(sentence: str) -> None:
    console.print(plain(sentence), markup=False, highlight=False, soft_wrap=True)
