"""The command transfer: images attacked on one network, measured on others."""

from typing import Literal

from rich.console import Console

from clat.attacks import activation, pgd_threat, restarts
from clat.cli.attacking import opened, say_measured, showing, talking
from clat.cli.shared import is_beside_the_first, write_json
from clat.cli.tables import transfer_table
from clat.errors import InputError
from clat.evaluation.transfer import Transfer
from clat.evaluation.transfer import transfer as transfer_between
from clat.report.words import attack_name
from clat.text import plain
from clat.threat import Lp


def transfer(
    networks: list[str],
    *,
    data: str,
    model: str | None = None,
    attack: Literal["pgd", "activation"] = "pgd",
    layer: str | None = None,
    split: str = "test",
    eps: float | str = "8/255",
    attack_norm: Lp = "linf",
    steps: int | None = None,
    limit: int = 512,
    seed: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
    batch_size: int = 250,
    workers: int = 2,
    device: str | None = None,
    json: str | None = None,
) -> None:
    """Attacks images on each network and measures every network on them (Table 2): black-box robustness.

    Accuracies are over all images, also those that a network misclassifies clean. Attacks on the network itself
    (white-box) should be stronger than attacks on another. If they are not, a warning is printed.

    Args:
        networks: two or more checkpoints, run folders (their best checkpoints) or model names
        data: a Hugging Face name, folder, parquet or CSV file; options after commas, e.g. photos,size=64
        model: the network of weights that cannot or do not name it, such as your file.py:factory
        attack: pgd, from a random start, or activation (Inkawhich et al. 2019), which is made to transfer
        layer: whose feature the activation attack moves; one for all networks, or one for each, after commas
        split: split of the data
        eps: radius of the ball in pixels of [0, 1], e.g. 8/255
        attack_norm: norm of the ball
        steps: steps of the attack; default 20 of eps / 4 for pgd, 10 of eps / 10 for activation
        limit: attack this many images, drawn at random by the seed
        seed: draws the images, and the attack's start or guide images
        precision: fp32, or bf16 autocast
        batch_size: images attacked together; lower it if the device's memory does not suffice
        workers: processes that decode images which are not kept in memory
        device: cpu, cuda, cuda:1 or mps; default the fastest kind of device here
        json: write the result to this file, or to standard output if it is -
    """
    if (layer is None) == (attack == "activation"):
        raise InputError("--layer NAME goes with --attack activation, and only with it; clat layers lists the names.")
    if is_beside_the_first():
        return
    found = opened(networks, data, split, model, device)
    chosen = found.data.sample(limit, seed)
    if layer is None:
        attacks = list(restarts(pgd_threat(eps, 20 if steps is None else steps, attack_norm), seed=seed))
    else:
        count = 10 if steps is None else steps
        attacks = [activation(name, chosen, eps, attack_norm, steps=count, seed=seed) for name in layer.split(",")]
    talk = talking(json)
    with showing(talk) as progress:
        result = transfer_between(
            found.models,
            chosen,
            attacks[0] if len(attacks) == 1 else attacks,
            batch_size=batch_size,
            workers=workers,
            device=found.place,
            precision=precision,
            progress=progress,
        )
    ball = attack_name(result.attack, attacks[0].threat)
    talk.print(plain(f"{ball}; {len(chosen):,} of {len(found.data):,} images of {data}"), highlight=False)
    say_measured(talk, result.measured, chosen, found.models)
    talk.print(transfer_table(result), highlight=False)
    _warn(result, talk)
    if json is not None:
        write_json(json, result.to_json())


def _warn(result: Transfer, talk: Console) -> None:
    """Names the networks on which their own attack failed."""
    for source, target in result.stronger:
        warning = (
            f"Warning: images attacked on {source} fool {target} more than those attacked on {target} itself: a sign "
            "of gradient masking or of too weak an attack; try clat evaluate --tier full."
        )
        talk.print(plain(warning), highlight=False)
