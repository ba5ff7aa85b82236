"""The command evaluate: accuracy under a tier of attacks."""

from collections.abc import Sequence
from typing import Any, Literal

from rich.console import Console

from clat.attacks import Tier, TierName
from clat.attacks import tier as make_tier
from clat.cli.attacking import network_path, opened, records, reported, say_measured, say_read, showing, talking
from clat.cli.shared import is_beside_the_first, say_page, write_json
from clat.cli.tables import evaluation_table, plan
from clat.data.labels import uneven
from clat.evaluation.accuracy import Result, worst_case
from clat.evaluation.cost import pass_seconds
from clat.evaluation.evaluate import evaluate as evaluate_model
from clat.evaluation.measured import Measured
from clat.inputs import check_least
from clat.report.words import attack_name, duration
from clat.text import plain
from clat.threat import Lp

SEEDS_APART = 1000  # between repeats: more than any attack has random starts


def evaluate(
    network: str,
    *,
    data: str,
    model: str | None = None,
    tier: TierName = "quick",
    split: str = "test",
    eps: float | str = "8/255",
    attack_norm: Lp = "linf",
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

    Where classes differ much in size, the balanced accuracy, the mean over classes, stands beside it.

    If an evaluation is interrupted, the same command continues it.

    Args:
        network: a checkpoint, a run folder (its best checkpoint), or a model name
        data: a Hugging Face name, folder, parquet or CSV file; options after commas, e.g.
            uoft-cs/cifar100,label=fine_label
        model: the network of weights that cannot or do not name it, such as your file.py:factory
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
    check_least(1, repeats=repeats, batch_size=batch_size)
    found = opened([network], data, split, model, device)
    evaluated = found.models[network]
    seeds = [seed + repeat * SEEDS_APART for repeat in range(repeats)]
    classes = len(found.data.classes)
    tiers = [make_tier(tier, eps, classes, attack_norm, steps=steps, starts=starts, seed=each) for each in seeds]
    chosen = found.data.sample(tiers[0].images if limit is None else limit, seed)
    talk = talking(json)
    ball = attack_name("", tiers[0].attacks[0].threat).strip()
    talk.print(plain(f"{network} on {len(chosen):,} of {len(found.data):,} images of {data}, {ball}"), highlight=False)
    how: dict[str, Any] = {"batch_size": batch_size, "device": found.place}
    seconds = pass_seconds(evaluated, chosen, **how)
    measured = Measured.of([evaluated], chosen, seed=seed, precision=precision, **how)
    say_measured(talk, measured, chosen, found.models)
    _say_plan(tiers, len(chosen) * seconds, talk)
    results = []
    for each in tiers:
        with showing(talk) as progress:
            result = evaluate_model(
                evaluated,
                chosen,
                each.attacks,
                workers=workers,
                precision=precision,
                record=records(network, out),
                progress=progress,
                **how,
            )
        results.append(result)
        say_read([result.from_record], talk)
        talk.print(evaluation_table(result, balanced=bool(uneven(found.data.labels, found.data.classes, data))))
    facts = {"network": network_path(network), "tier": tier, **results[0].to_json()}
    if repeats > 1:
        facts["repeats"] = _repeated(results, talk)
    if json is not None:
        write_json(json, facts)
    if tier == "quick":
        talk.print("PGD alone can overstate robustness; --tier full runs AutoAttack.", style="dim")
    if shown := reported([network], out):
        say_page(talk, shown)


def _say_plan(tiers: Sequence[Tier], seconds_a_pass: float, talk: Console) -> None:
    """What each attack will do, and how long all of them take at most."""
    for line in plan(tiers[0].attacks):
        talk.print(plain(f"  {line}"), highlight=False)
    most = sum(attack.passes for each in tiers for attack in each.attacks) * seconds_a_pass
    talk.print(f"  At most {duration(most)} here; images once broken are not attacked again.", style="dim")


def _repeated(results: Sequence[Result], talk: Console) -> dict[str, Any]:
    """The lowest and the worst case of several runs, printed and as JSON."""
    worst = worst_case(results)
    lowest = min(results, key=lambda result: result.robust.correct).robust
    talk.print(f"Lowest of {len(results)} runs: {lowest}", highlight=False)
    talk.print(f"Worst case of each image over all runs: {worst}", highlight=False)
    runs = [result.to_json() for result in results]
    return {"runs": runs, "lowest": lowest.to_json(), "worst_case": worst.to_json()}
