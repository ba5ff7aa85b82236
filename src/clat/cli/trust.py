"""The command trust: signs that a robust accuracy is overstated or its evaluation broken."""

import os
from pathlib import Path

from clat.cli.attacking import network_path, opened, records, reported, say_measured, talking
from clat.cli.shared import is_beside_the_first, network_named, say_page, write_json
from clat.cli.tables import trust_table
from clat.evaluation.trust import BATCH, BUDGET, IMAGES
from clat.evaluation.trust import trust as trust_model
from clat.evaluation.trust.record import write_verdict
from clat.report.words import attack_name
from clat.text import plain
from clat.threat import Lp, Threat
from clat.training.runs import Run


def trust(
    network: str,
    *,
    data: str,
    model: str | None = None,
    split: str = "test",
    eps: float | str = "8/255",
    attack_norm: Lp = "linf",
    base: str | None = None,
    layers: str | None = None,
    limit: int = IMAGES,
    budget: float = BUDGET,
    seed: int = 0,
    batch_size: int = BATCH,
    device: str | None = None,
    verbose: bool = False,
    out: str | None = None,
    json: str | None = None,
) -> int:
    """Looks for signs that a network's robustness is overstated or its evaluation broken; exit code 1 if there are any.

    The exit code is also 1 if too little was checked; docs/trust.md lists the checks that a verdict needs.

    Args:
        network: a checkpoint, a run folder (its best checkpoint), or a model name
        data: a Hugging Face name, folder, parquet or CSV file; options after commas, e.g. photos,size=64
        model: the network of weights that cannot or do not name it, such as your file.py:factory
        split: split of the data
        eps: radius of the ball in pixels of [0, 1], e.g. 8/255
        attack_norm: norm of the ball
        base: a network that attacks are transferred from, such as the one before fine-tuning
        layers: names, separated by commas, for the attack through them; default those that CLAT selected in the run, or
            else the most critical 5 %
        limit: use this many images, drawn at random by the seed
        budget: minutes; checks that do not fit are skipped, and the verdict says so
        seed: draws the images and the attacks' random numbers
        batch_size: images that run together; lower it if the device's memory does not suffice
        device: cpu, cuda, cuda:1 or mps; default the fastest kind of device here
        verbose: print each check's threshold and where it comes from
        out: folder that keeps the verdict's record; default evaluations beside the checkpoint
        json: write verdict and findings to this file, or to standard output if it is -
    """
    if is_beside_the_first():
        return 0
    found = opened([network], data, split, model, device, base=base)
    surrogate = network_named(base, found.data, model) if base else None
    talk = talking(json)
    with talk.status("") as line:
        verdict = trust_model(
            found.models[network],
            found.data,
            eps,
            attack_norm,
            base=surrogate,
            layers=layers.split(",") if layers else _selected(network),
            limit=limit,
            budget=budget,
            seed=seed,
            batch_size=batch_size,
            device=found.place,
            progress=lambda check: line.update(check.title),
        )
    ball = attack_name("", Threat(eps=eps, norm=attack_norm)).strip()
    talk.print(plain(f"Verdict: {verdict.text}."), style="bold" if verdict.ok else "bold red", highlight=False)
    say_measured(talk, verdict.measured, found.data, found.models)
    title = f"{network} on {verdict.clean.n} images of {data}, {ball}"
    talk.print(trust_table(verdict, title, thresholds=verbose), highlight=False)
    if (folder := records(network, out)) is not None:
        write_verdict(folder, verdict)
        say_page(talk, reported([network], out))
    if json is not None:
        write_json(json, {"network": network_path(network), "base": base, **verdict.to_json()})
    return 0 if verdict.ok else 1


def _selected(network: str) -> list[str]:
    """The layers that CLAT selected in the run that a run folder or a checkpoint in it belongs to, each once."""
    if not os.path.exists(network):
        return []
    run = Run(Path(network) if Path(network).is_dir() else Path(network).parent)
    return run.selected if run.exists and run.recipe["tuner"] == "critical" else []
