"""The command sweep: accuracy as PGD grows stronger."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from clat.attacks import pgd_threat
from clat.cli.attacking import opened, records, reported, say_measured, say_read, showing, talking
from clat.cli.shared import is_beside_the_first, numbers, say_page, write_json
from clat.cli.tables import sweep_table
from clat.errors import InputError
from clat.evaluation.measured import Measured
from clat.evaluation.sweep import Curve, Over, threats
from clat.evaluation.sweep import sweep as sweep_over
from clat.report.pictures import check_picture, draw_curves
from clat.report.words import attack_name, strength
from clat.text import plain
from clat.threat import Lp


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
    attack_norm: Lp = "linf",
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

    Each point is measured separately. If accuracy rises with the strength of the attack, a warning is printed: the
    attack failed there. If a sweep is interrupted, the same command continues it.

    Args:
        networks: checkpoints, run folders (their best checkpoints) or model names
        data: a Hugging Face name, folder, parquet or CSV file; options after commas, e.g. photos,size=64
        model: the network of weights that cannot or do not name it, such as your file.py:factory
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
    found = opened(networks, data, split, model, device)
    chosen, talk = found.data.sample(limit, seed), talking(json)
    how: dict[str, Any] = {"seed": seed, "precision": precision, "batch_size": batch_size, "device": found.place}
    say_measured(talk, Measured.of(list(found.models.values()), chosen, **how), chosen, found.models)
    curves: dict[Over, dict[str, Curve]] = {}
    for over, strengths in wanted.items():
        curves[over] = {}
        for name, swept in found.models.items():
            with showing(talk) as progress:
                curves[over][name] = sweep_over(
                    swept,
                    chosen,
                    over,
                    strengths,
                    eps=eps,
                    steps=steps,
                    norm=attack_norm,
                    workers=workers,
                    record=records(name, out),
                    progress=progress,
                    **how,
                )
            say_read(curves[over][name].from_record, talk)
        ball = pgd_threat(eps, steps, attack_norm)
        kind = f"PGD-{steps} {attack_norm}" if over == "eps" else attack_name("PGD", ball)
        talk.print(plain(f"{kind}; {len(chosen):,} of {len(found.data):,} images of {data}"), highlight=False)
        talk.print(sweep_table(curves[over]), highlight=False)
        _warn(curves[over], talk)
    if picture is not None:
        draw_curves(list(curves.values()), Path(picture))
    if json is not None:
        content = {over: {name: curve.to_json() for name, curve in each.items()} for over, each in curves.items()}
        write_json(json, content)
    if shown := reported(networks, out):
        say_page(talk, shown)


def _warn(curves: Mapping[str, Curve], talk: Console) -> None:
    """Names where a stronger attack left more images right."""
    for name, curve in curves.items():
        for weak, strong in curve.rises:
            warning = (
                f"Warning: the accuracy of {name} rises from {curve.over} {strength(curve, weak)} to "
                f"{strength(curve, strong)} ({weak.accuracy.correct} to {strong.accuracy.correct} images): a sign of "
                "gradient masking or of too weak an attack; try clat evaluate --tier full."
            )
            talk.print(plain(warning), highlight=False)
