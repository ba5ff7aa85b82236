"""The commands that attack a network: evaluate, transfer, sweep and trust."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import rich.progress
from rich.console import Console
from torch import nn

from clat.attacks import TierName, activation, pgd, restarts
from clat.attacks import tier as make_tier
from clat.checkpoint import checkpoint_path
from clat.cli.pictures import check_picture, draw_curves
from clat.cli.shared import (
    assumed,
    console,
    data_named,
    device_named,
    fitting,
    is_beside_the_first,
    network_named,
    numbers,
    stored_facts,
    write_json,
)
from clat.cli.tables import (
    attack_name,
    duration,
    evaluation_table,
    plan,
    strength,
    sweep_table,
    transfer_table,
    trust_table,
)
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.evaluation.accuracy import worst_case
from clat.evaluation.cost import pass_seconds
from clat.evaluation.evaluate import Progress, check_count, drawn
from clat.evaluation.evaluate import evaluate as evaluate_model
from clat.evaluation.fits import check_all_fit, check_fits
from clat.evaluation.sweep import Curve, Over, threats
from clat.evaluation.sweep import sweep as sweep_over
from clat.evaluation.transfer import transfer as transfer_between
from clat.evaluation.trust import BATCH, BUDGET, IMAGES
from clat.evaluation.trust import trust as trust_model
from clat.models import normalisation_of
from clat.text import plain
from clat.threat import Threat
from clat.training.runs import Run

SEEDS_APART = 1000  # between repeats: more than any attack has random starts


def evaluate(
    network: str,
    *,
    data: str,
    model: str | None = None,
    tier: TierName = "quick",
    split: str = "test",
    eps: float | str = "8/255",
    attack_norm: Literal["linf", "l2"] = "linf",
    steps: int = 20,
    starts: int = 5,
    limit: int | None = None,
    repeats: int = 1,
    seed: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
    batch_size: int = 250,
    workers: int = 2,
    device: str | None = None,
    out: str | None = None,
    json: str | None = None,
) -> None:
    """Measures clean and robust accuracy under a tier of attacks, with counts and 95 % Wilson intervals.

    An evaluation that was interrupted goes on where it stopped when the same command is given again.

    Args:
        network: a checkpoint, a run folder (its best checkpoint), or a model name
        data: a Hugging Face name, folder or parquet file; options after commas, e.g. uoft-cs/cifar100,label=fine_label
        model: the network of weights that may not or do not say it, such as your file.py:factory
        tier: quick (PGD on 512 images), standard (APGD-CE and targeted APGD on 1,000), full (AutoAttack on all) or
            blackbox (Square alone on 1,000), for networks without gradients
        split: split of the data
        eps: radius of the ball in pixels of [0, 1], e.g. 8/255
        attack_norm: norm of the ball
        steps: PGD steps of the quick tier, each eps / 4 long
        starts: random starts of the quick tier's PGD
        limit: evaluate this many images, drawn at random by the seed, in place of the tier's number
        repeats: evaluate so often, each time with other seeds, and name the lowest accuracy beside the worst case
        seed: draws the images and the attack's start
        precision: fp32, or bf16 autocast
        batch_size: images attacked together; lower it if the device's memory does not suffice
        workers: processes that decode images which are not kept in memory
        device: cpu, cuda, cuda:1 or mps; default the fastest kind of device here
        out: folder that keeps the evaluation's record; default evaluations beside the checkpoint
        json: write the result to this file, or to standard output if it is -
    """
    if is_beside_the_first():
        return
    for key, value in (("repeats", repeats), ("batch_size", batch_size)):
        check_count(key, value)
    place, dataset = device_named(device), _fitted(data, split, [network])
    opened = network_named(network, dataset, model).to(place)
    check_fits(opened, dataset, place)
    tiers = [
        make_tier(
            tier, eps, len(dataset.classes), attack_norm, steps=steps, starts=starts, seed=seed + repeat * SEEDS_APART
        )
        for repeat in range(repeats)
    ]
    limit = tiers[0].images if limit is None else limit
    chosen = drawn(dataset, limit, seed)
    talk = console if json != "-" else Console(quiet=True)
    passes = sum(attack.passes for each in tiers for attack in each.attacks)
    most = passes * len(chosen) * pass_seconds(opened, chosen, batch_size=batch_size, device=place)
    ball = attack_name("", tiers[0].attacks[0].threat).strip()
    images = f"{len(chosen):,} of {len(dataset):,} images of {data}"
    talk.print(plain(f"{network} on {images}, {ball}"), highlight=False)
    talk.print(assumed(place, precision, dataset), highlight=False)
    talk.print(f"Normalisation: {normalisation_of(opened)}", highlight=False)
    for line in plan(tiers[0].attacks):
        talk.print(plain(f"  {line}"), highlight=False)
    talk.print(f"  At most {duration(most)} here; images once broken are not attacked again.", style="dim")
    results = []
    for each in tiers:
        with _showing(talk) as progress:
            result = evaluate_model(
                opened,
                dataset,
                each.attacks,
                limit=limit,
                seed=seed,
                batch_size=batch_size,
                workers=workers,
                device=place,
                precision=precision,
                record=_records(network, out),
                progress=progress,
            )
        results.append(result)
        _say_read([result.from_record], talk)
        talk.print(evaluation_table(result))
    facts = {"network": _path(network), "tier": tier, **results[0].to_json()}
    if repeats > 1:
        worst = worst_case(results)
        lowest = min(results, key=lambda result: result.robust.correct).robust
        facts["repeats"] = {
            "runs": [result.to_json() for result in results],
            "lowest": lowest.to_json(),
            "worst_case": worst.to_json(),
        }
        talk.print(f"Lowest of {repeats} runs: {lowest}", highlight=False)
        talk.print(f"Worst case of each image over all runs: {worst}", highlight=False)
    if json is not None:
        write_json(json, facts)
    if tier == "quick":
        talk.print("PGD alone can overstate robustness; --tier full runs AutoAttack.", style="dim")


def transfer(
    networks: list[str],
    *,
    data: str,
    model: str | None = None,
    attack: Literal["pgd", "activation"] = "pgd",
    layer: str | None = None,
    split: str = "test",
    eps: float | str = "8/255",
    attack_norm: Literal["linf", "l2"] = "linf",
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

    Accuracies are over all images, also those that a network misclassifies clean. An attack on the network itself
    (white-box) should fool it more than images attacked on another; where it does not, this is said.

    Args:
        networks: two or more checkpoints, run folders (their best checkpoints) or model names
        data: a Hugging Face name, folder or parquet file; options after commas, e.g. photos,size=64
        model: the network of weights that may not or do not say it, such as your file.py:factory
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
    place, dataset = device_named(device), _fitted(data, split, networks)
    models = _several(networks, dataset, model)
    if layer is None:
        attacks = list(restarts(pgd(eps, 20 if steps is None else steps, attack_norm), seed=seed))
    else:
        guides, count = drawn(dataset, limit, seed), 10 if steps is None else steps
        attacks = [activation(name, guides, eps, attack_norm, steps=count, seed=seed) for name in layer.split(",")]
    talk = console if json != "-" else Console(quiet=True)
    with _showing(talk) as progress:
        found = transfer_between(
            models,
            dataset,
            attacks[0] if len(attacks) == 1 else attacks,
            limit=limit,
            seed=seed,
            batch_size=batch_size,
            workers=workers,
            device=place,
            precision=precision,
            progress=progress,
        )
    ball = attack_name(found.attack, attacks[0].threat)
    talk.print(plain(f"{ball}; {found.clean[0].n:,} of {len(dataset):,} images of {data}"), highlight=False)
    talk.print(assumed(place, precision, dataset), highlight=False)
    _say_normalisations(models, talk)
    talk.print(transfer_table(found), highlight=False)
    for source, target in found.stronger:
        warning = (
            f"Warning: images attacked on {source} fool {target} more than those attacked on {target} itself: a sign "
            "of gradient masking or of too weak an attack; try clat evaluate --tier full."
        )
        talk.print(plain(warning), highlight=False)
    if json is not None:
        write_json(json, found.to_json())


def sweep(
    networks: list[str],
    *,
    data: str,
    model: str | None = None,
    over_eps: str = "0,2/255,4/255,8/255,16/255,32/255,64/255",
    over_steps: str = "1,2,5,10,20,50,100",
    eps: float | str = "8/255",
    steps: int = 20,
    split: str = "test",
    attack_norm: Literal["linf", "l2"] = "linf",
    limit: int = 512,
    seed: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
    batch_size: int = 250,
    workers: int = 2,
    device: str | None = None,
    out: str | None = None,
    picture: str | None = None,
    json: str | None = None,
) -> None:
    """Measures accuracy as PGD grows stronger, over eps and over its number of steps (Figure 4).

    Each point is measured by itself. Accuracy that rises with the strength of the attack is named: there the attack
    failed. A sweep that was interrupted goes on where it stopped when the same command is given again.

    Args:
        networks: checkpoints, run folders (their best checkpoints) or model names
        data: a Hugging Face name, folder or parquet file; options after commas, e.g. photos,size=64
        model: the network of weights that may not or do not say it, such as your file.py:factory
        over_eps: radii of the ball in pixels of [0, 1], 0 being clean, or none to leave this curve out
        over_steps: numbers of PGD steps, each eps / 4 long, or none to leave this curve out
        eps: radius of the ball when the number of steps varies
        steps: number of steps when eps varies
        split: split of the data
        attack_norm: norm of the ball
        limit: evaluate this many images, drawn at random by the seed
        seed: draws the images and the attack's start
        precision: fp32, or bf16 autocast
        batch_size: images attacked together; lower it if the device's memory does not suffice
        workers: processes that decode images which are not kept in memory
        device: cpu, cuda, cuda:1 or mps; default the fastest kind of device here
        out: folder that keeps the evaluations' records; default evaluations beside each checkpoint
        picture: draw the curves into this file: .png, .pdf or .svg
        json: write the curves to this file, or to standard output if it is -
    """
    if is_beside_the_first():
        return
    lists: dict[Over, str] = {"eps": over_eps, "steps": over_steps}
    wanted = {over: numbers(text) or [] for over, text in lists.items() if text != "none"}
    if not wanted:
        raise InputError("Both curves are left out; sweep over eps or over steps.")
    if picture is not None:
        check_picture(Path(picture))
    for over, strengths in wanted.items():
        threats(over, strengths, eps=eps, steps=steps, norm=attack_norm)
    place, dataset = device_named(device), _fitted(data, split, networks)
    models = {name: opened.to(place) for name, opened in _several(networks, dataset, model).items()}
    check_all_fit(models, dataset, place)
    talk = console if json != "-" else Console(quiet=True)
    talk.print(assumed(place, precision, dataset), highlight=False)
    _say_normalisations(models, talk)
    curves: dict[Over, dict[str, Curve]] = {}
    for over, strengths in wanted.items():
        curves[over] = {}
        for name, opened in models.items():
            with _showing(talk) as progress:
                curves[over][name] = sweep_over(
                    opened,
                    dataset,
                    over,
                    strengths,
                    eps=eps,
                    steps=steps,
                    norm=attack_norm,
                    limit=limit,
                    seed=seed,
                    batch_size=batch_size,
                    workers=workers,
                    device=place,
                    precision=precision,
                    record=_records(name, out),
                    progress=progress,
                )
            _say_read(curves[over][name].from_record, talk)
        images = min(limit, len(dataset))
        kind = f"PGD-{steps} {attack_norm}" if over == "eps" else attack_name("PGD", pgd(eps, steps, attack_norm))
        talk.print(plain(f"{kind}; {images:,} of {len(dataset):,} images of {data}"), highlight=False)
        talk.print(sweep_table(curves[over]), highlight=False)
        for name, curve in curves[over].items():
            for weak, strong in curve.rises:
                warning = (
                    f"Warning: the accuracy of {name} rises from {over} {strength(curve, weak)} to "
                    f"{strength(curve, strong)} ({weak.accuracy.correct} to {strong.accuracy.correct} images): a "
                    "sign of gradient masking or of too weak an attack; try clat evaluate --tier full."
                )
                talk.print(plain(warning), highlight=False)
    if picture is not None:
        draw_curves(list(curves.values()), Path(picture))
    if json is not None:
        write_json(
            json, {over: {name: curve.to_json() for name, curve in each.items()} for over, each in curves.items()}
        )


def trust(
    network: str,
    *,
    data: str,
    model: str | None = None,
    split: str = "test",
    eps: float | str = "8/255",
    attack_norm: Literal["linf", "l2"] = "linf",
    base: str | None = None,
    layers: str | None = None,
    limit: int = IMAGES,
    budget: float = BUDGET,
    seed: int = 0,
    batch_size: int = BATCH,
    device: str | None = None,
    verbose: bool = False,
    json: str | None = None,
) -> int:
    """Looks for signs that a network's robustness is overstated or its evaluation broken; exit code 1 if there are any.

    So it is if not enough was checked: docs/trust.md lists the checks that a verdict needs.

    Args:
        network: a checkpoint, a run folder (its best checkpoint), or a model name
        data: a Hugging Face name, folder or parquet file; options after commas, e.g. photos,size=64
        model: the network of weights that may not or do not say it, such as your file.py:factory
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
        json: write verdict and findings to this file, or to standard output if it is -
    """
    if is_beside_the_first():
        return 0
    place, dataset = device_named(device), _fitted(data, split, [network, *([base] if base else [])])
    opened = network_named(network, dataset, model)
    surrogate = network_named(base, dataset, model) if base else None
    talk = console if json != "-" else Console(quiet=True)
    with talk.status("") as line:
        verdict = trust_model(
            opened,
            dataset,
            eps,
            attack_norm,
            base=surrogate,
            layers=layers.split(",") if layers else _selected(network),
            limit=limit,
            budget=budget,
            seed=seed,
            batch_size=batch_size,
            device=place,
            progress=lambda check: line.update(check.title),
        )
    ball = attack_name("", Threat(eps=eps, norm=attack_norm)).strip()
    talk.print(plain(f"Verdict: {verdict.text}."), style="bold" if verdict.ok else "bold red", highlight=False)
    talk.print(assumed(place, "fp32", dataset), highlight=False)
    talk.print(f"Normalisation: {normalisation_of(opened)}", highlight=False)
    title = f"{network} on {verdict.clean.n} images of {data}, {ball}"
    talk.print(trust_table(verdict, title, thresholds=verbose), highlight=False)
    if json is not None:
        write_json(json, {"network": _path(network), "base": base, **verdict.to_json()})
    return 0 if verdict.ok else 1


@contextmanager
def _showing(console: Console) -> Iterator[Callable[[Progress], None]]:
    """A bar for the attack that is running, on a terminal."""
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("")

        def show(now: Progress) -> None:
            name = f"{plain(now.name)} ({now.number} of {now.attacks}), {now.broken} broken"
            bar.update(task, description=name, completed=now.done, total=now.total)

        yield show


def _fitted(data: str, split: str, networks: Sequence[str]) -> Dataset:
    """The images, with their classes in the order that the networks know them in."""
    dataset = data_named(data, split)
    fitted = [fitting(dataset, stored_facts(name), name) for name in networks]
    for name, each in zip(networks, fitted, strict=True):
        if each.classes != fitted[0].classes:
            raise InputError(
                f"{plain(networks[0])} and {plain(name)} order the classes differently; evaluate each by itself."
            )
    return fitted[0]


def _several(names: Sequence[str], data: Dataset, model: str | None) -> dict[str, nn.Module]:
    """The networks that a command is given, by the names given."""
    if len(set(names)) < len(names):
        raise InputError("A network is named twice; name each once.")
    return {name: network_named(name, data, model) for name in names}


def _say_normalisations(models: Mapping[str, nn.Module], talk: Console) -> None:
    for name, model in models.items():
        talk.print(plain(f"Normalisation of {name}: {normalisation_of(model)}"), highlight=False)


def _path(network: str) -> str:
    """The file that a network is read from, or its name if it is from none."""
    return str(checkpoint_path(network)) if os.path.exists(network) else network


def _records(network: str, out: str | None) -> Path | None:
    """The folder of an evaluation's record; None for a network by name, unless one is given."""
    if out is not None:
        return Path(out)
    return checkpoint_path(network).parent / "evaluations" if os.path.exists(network) else None


def _say_read(words: Sequence[str], talk: Console) -> None:
    """Says what was read from records and not measured now."""
    for each in filter(None, words):
        talk.print(f"{each[0].upper()}{each[1:]}.", highlight=False)


def _selected(network: str) -> list[str]:
    """The layers that CLAT selected in the run that a run folder or a checkpoint in it belongs to, each once."""
    if not os.path.exists(network):
        return []
    run = Run(Path(network) if Path(network).is_dir() else Path(network).parent)
    return run.selected if run.exists and run.recipe["tuner"] == "critical" else []
