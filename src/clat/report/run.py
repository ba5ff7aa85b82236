"""The page of a run."""

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from clat.report.blocks import Cell, Figure, Missing, Page, Section, Text, number, table, words
from clat.report.examples import Examined, sections_of
from clat.report.learning import held_out, layers, learning, validation_attack
from clat.report.reading import Told
from clat.report.robustness import Network, accuracies, attack_words, ball, ends, sweeps, trust
from clat.report.words import duration

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def run_page(run: Told, examined: Examined | None = None, *, place: int = 1) -> Page:
    """Everything that a run folder tells, and what was measured for the page.

    Args:
        place: of the run on the page
    """
    key = f"run{place}"
    network, base = network_of(run), network_of(run.base) if run.base else None
    verdict = next((verdict for name, verdict in run.records.verdicts if name == run.checkpoint), None)
    sections = [
        accuracies(network, key, base),
        trust(network),
        learning(run, key),
        layers(run, key, examined),
        sweeps(network, key, base),
        *(sections_of(examined, key) if examined else ()),
        cost(run),
        again(run),
    ]
    return Page(
        kind="Run",
        title=run.name,
        verdict=f"{verdict.text[0].upper()}{verdict.text[1:]}." if verdict else "",
        good=verdict.ok if verdict else None,
        figures=figures(run, network),
        sections=tuple(section for section in sections if section is not None),
        missing=tuple(missing(run, network, base, examined)),
        card=card(run, network),
    )


def network_of(run: Told) -> Network:
    return Network(run.name, run.records, run.checkpoint)


def figures(run: Told, network: Network) -> tuple[Figure, ...]:
    """Clean and robust accuracy, the share that trains, and the time."""
    found, trained, entry = network.headline, run.trainable, run.metrics[run.best - 1]
    if found is not None:
        result = found.result
        images = f"{result.clean.n:,} {result.measured.split} images"
        both = [
            ("Clean accuracy", result.clean, images),
            ("Robust accuracy", result.robust, f"{attack_words(result)}, {ball(result)}, {images}"),
        ]
    else:
        images = f"{entry['validation_images']:,} held-out images, which chose the epoch"
        both = [
            ("Clean accuracy, held-out", held_out(entry, "clean"), images),
            ("Robust accuracy, held-out", held_out(entry, "robust"), f"{validation_attack(run)}, {images}"),
        ]
    seconds = sum(entry["seconds"] for entry in run.metrics)
    epochs = f"{len(run.metrics)} epoch{'s' if len(run.metrics) > 1 else ''} on {run.environment.get('device')}"
    return (
        *(
            Figure(label, f"{100 * accuracy.value:.1f} %", f"{ends(accuracy)} {how}", accuracy.value)
            for label, accuracy, how in both
        ),
        Figure(
            "Weights that train",
            f"{100 * trained / run.parameters:.3g} %",
            f"{trained:,} of {run.parameters:,}",
            trained / run.parameters,
        ),
        Figure("Training time", duration(seconds), epochs, seconds),
    )


def cost(run: Told) -> Section:
    """Parameters, time and memory, beside the base."""
    rows = []
    for each in (run, run.base):
        if each is not None:
            seconds = sum(entry["seconds"] for entry in each.metrics)
            validation = sum(entry["validation_seconds"] for entry in each.metrics)
            memory = max(entry["peak_memory_bytes"] for entry in each.metrics)
            trained = 100 * each.trainable / each.parameters
            rows.append(
                (
                    words(each.name),
                    number(each.parameters),
                    Cell(f"{each.trainable:,}", each.trainable, f"{trained:.3g} %"),
                    number(len(each.metrics)),
                    Cell(duration(seconds), seconds),
                    number(seconds / len(each.metrics), "{:.1f}"),
                    Cell(duration(validation), validation),
                    number(memory / 2**20, "{:,.0f}"),
                )
            )
    heading = "run | parameters | train | epochs | training | s an epoch | validation | peak MiB"
    said = "Time and memory are those of the machine that trained; on a CPU, memory is that of the whole process."
    return Section("Cost", (said,), (table("What training took", heading, rows),))


def again(run: Told) -> Section:
    """Command, recipe and environment."""
    command = run.environment.get("command")
    lines = (shlex.join(["clat", *map(str, command[1:])]),) if isinstance(command, list) else ()
    recipe = yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True).splitlines()
    kept = {key: value for key, value in run.environment.items() if key != "command"}
    environment = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).splitlines()
    blocks = (
        *((Text("Command", lines, open=True),) if lines else ()),
        Text("Recipe, every key", tuple(recipe)),
        Text("Data, versions and hardware", tuple(environment)),
    )
    return Section("To do it again", (), blocks)


def missing(run: Told, network: Network, base: Network | None, examined: Examined | None) -> Iterator[Missing]:
    """What the page leaves out, and how it gets there."""
    here = shlex.quote(run.name)
    data = f"--data {shlex.quote(str(run.environment['data'].get('source')))}"
    both = f"{shlex.quote(base.name)} {here}" if base else here
    for said in run.records.left_out:
        yield Missing(said, "")
    if not run.finished:
        yield Missing("The run is not finished: its command with --resume goes on.", "")
    if network.headline is None:
        yield Missing("Accuracy on test images", f"clat evaluate {here} {data}")
    elif base is not None and base.headline is None:
        yield Missing(f"The accuracy of {base.name} beside it", f"clat evaluate {shlex.quote(base.name)} {data}")
    if not run.records.verdicts:
        surrogate = f" --base {shlex.quote(base.name)}" if base else ""
        yield Missing("Whether the robust accuracy can be trusted", f"clat trust {here}{surrogate} {data}")
    if not run.records.curves:
        yield Missing("Accuracy as the attack grows stronger", f"clat sweep {both} {data}")
    if examined is None:
        yield Missing(
            "Adversarial examples, the confusion that the attack causes, and criticality after training",
            f"clat report {here} {data} --out page.html",
        )


def card(run: Told, network: Network) -> Mapping[str, Any]:
    """What the hub's metadata of a model card hold."""
    source = str(run.environment["data"].get("source"))
    found = network.headline
    results = []
    if found is not None:
        result = found.result
        metrics = [
            {"type": "accuracy", "name": name, "value": round(100 * accuracy.value, 2)}
            for name, accuracy in (
                ("clean accuracy (%)", result.clean),
                (f"robust accuracy (%), {attack_words(result)}, {ball(result)}", result.robust),
            )
        ]
        dataset = {"name": source, "type": source, "split": result.measured.split}
        task = {"type": "image-classification"}
        results = [{"name": run.name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}]
    tags = ["image-classification", "adversarial-robustness", "adversarial-training", "clat"]
    return {
        "library_name": "clat",
        "pipeline_tag": "image-classification",
        "tags": tags,
        **({"datasets": [source]} if HUB_NAME.fullmatch(source) else {}),
        **({"model-index": results} if results else {}),
    }
