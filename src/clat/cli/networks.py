"""Commands on one network: layers ranks its layers, import reads a public checkpoint."""

from dataclasses import asdict, replace
from typing import Literal

import torch

from clat.attacks import pgd_threat
from clat.checkpoint import save_checkpoint
from clat.cli.attacking import assumed
from clat.cli.shared import (
    console,
    data_named,
    device_named,
    exists,
    fitting,
    is_beside_the_first,
    model_options,
    network_named,
    numbers,
    stored_facts,
    write_json,
)
from clat.cli.tables import layer_rows, layer_table
from clat.criticality import Norm
from clat.data.dataset import to_unit
from clat.data.sources import EMBEDDED
from clat.errors import InputError
from clat.evaluation.fits import check_fits
from clat.evaluation.measured import Measured
from clat.features import At
from clat.models import normalisation_of
from clat.models.importing import import_weights
from clat.network import predict
from clat.report.words import attack_name
from clat.text import plain
from clat.threat import Threat, attack_output
from clat.tuners.rankings import Attacked, rank_layers


def layers(
    network: str,
    data: str = EMBEDDED,
    model: str | None = None,
    split: str = "train",
    batch: int = 100,
    eps: float | str = 0.03,
    steps: int = 10,
    ranking: Literal["criticality", "relative", "loss", "gradient"] = "criticality",
    norm: Norm = "paper",
    at: At = "output",
    seed: int = 0,
    device: str | None = None,
    json: str | None = None,
) -> None:
    """Ranks the layers of a network by criticality (Eq. 5 and 6) or another measure, the highest first.

    Args:
        network: a checkpoint, a run folder (its best checkpoint), or a model name, which starts at random weights
        data: images to attack: a Hugging Face name, folder, parquet or CSV file; options after commas, e.g.
            photos,size=64
        model: the network of weights that cannot or do not name it, such as your file.py:factory
        split: split of the data
        batch: number of images, drawn at random
        eps: radius of the l-infinity ball in pixels of [0, 1], e.g. 8/255
        steps: PGD steps
        ranking: what to rank by: criticality; relative, the change of the features as a share of their length; loss,
            its rise if this layer alone were attacked; or gradient, its length for the layer's size
        norm: divide feature distances by N (paper, Eq. 5), by sqrt N (rms) or by the feature's length (relative)
        at: compare features at the layer's output or after its normalisation and activation
        seed: draws the images and the attack's start
        device: cpu, cuda, cuda:1 or mps; default the fastest kind of device here
        json: write the table to this file, or to standard output if it is -
    """
    if is_beside_the_first():
        return
    if batch < 1:
        raise InputError(f"batch is {batch}; the criticality needs at least one image.")
    place = device_named(device)
    dataset = fitting(data_named(data, split), stored_facts(network), network, unseen=False)
    opened = network_named(network, dataset, model).to(place)
    check_fits(opened, dataset, place)
    chosen = dataset.sample(batch, seed)
    pixels, y = next(chosen.to(place).batches(batch, workers=0))
    torch.manual_seed(seed)
    threat = replace(pgd_threat(eps, steps), step=_paper_step(eps))
    x = to_unit(pixels)
    predict(opened, x)  # its scores are finite
    attacked = Attacked(x, attack_output(opened, x, y, threat), y)
    rows = layer_rows(rank_layers(opened, attacked, ranking, norm=norm, at=at), ranking)
    if json is not None:
        facts = {"network": network, "data": data, "images": len(x), "threat": asdict(threat)}
        write_json(json, {**facts, "ranking": ranking, "norm": norm, "at": at, "layers": rows})
    if json != "-":
        size = sum(parameter.numel() for parameter in opened.parameters())
        attack = attack_name(f"PGD-{steps}", threat)
        measured = Measured.of([opened], chosen, seed=seed, batch_size=len(x), device=place)
        console.print(assumed(measured, dataset), highlight=False)
        console.print(f"Normalisation: {normalisation_of(opened)}", markup=False, highlight=False)
        first = "most critical" if ranking == "criticality" else f"highest {ranking}"
        title = f"Layers of {network}, {first} first ({len(x)} images, {attack})"
        console.print(layer_table(rows, size, title, ranking))


def import_(
    file: str,
    *,
    model: str,
    out: str,
    classes: int | None = None,
    mean: str | None = None,
    std: str | None = None,
    overwrite: bool = False,
) -> None:
    """Reads a public PyTorch checkpoint, without executing anything in it, and writes one of clat's.

    Args:
        file: a file written by torch.save, or a safetensors file
        model: the network in it, such as rn18, timm/NAME, torchvision/NAME or your file.py:factory, with options after
            commas, e.g. preactrn18,shortcut_input=raw or timm/resnet18,normalise=imagenet
        out: the checkpoint to write
        classes: number of classes, to be sure, or where the file's shapes do not tell; default what the file has
        mean: the pixels' mean per channel, e.g. 0.4914,0.4822,0.4465; default the file's own, or none
        std: the pixels' standard deviation per channel; default the file's own, or none
        overwrite: replace the file at out
    """
    if exists(out) and not overwrite:
        raise InputError(f"{out} is there already; choose another place or add --overwrite.")
    name, options = model_options(model)
    imported = import_weights(file, name, classes=classes, mean=numbers(mean), std=numbers(std), **options)
    save_checkpoint(out, imported.model, imported={"file": file, "scheme": imported.scheme.name})
    parameters = sum(p.numel() for p in imported.model.parameters())
    chosen = "".join(f", {key} {value}" for key, value in imported.options.items())
    lines = [
        f"Names as in {imported.scheme.name}{''.join(f', under {key}' for key in imported.wrapper)}.",
        f"{name}{chosen}: {imported.model.spec['classes']} classes, {parameters:,} parameters.",
        f"Normalisation {_WHENCE[imported.normalisation]}: {normalisation_of(imported.model)}. {imported.scheme.note}",
        f"Written to {out}.",
    ]
    for line in lines:
        console.print(plain(line.strip()), markup=False, highlight=False)


_WHENCE = {
    "file": "as in the file",
    "given": "as given",
    "none": "not in the file (if it was trained with one, give --mean and --std)",
}


def _paper_step(eps: float | str) -> float:
    """The paper's step, 7/30 of its eps, for any eps."""
    return Threat(eps=eps).radius * 7 / 30
