"""Writes the generated tables of README.md and docs/*.md between their markers, and docs/pictures: `make docs`.

A table stands between ``<!-- made by make docs: NAME -->`` and ``<!-- end -->``, where NAME is a key of ``TABLES``. The
tables come from results/*.json, from the recipes, from the command line's flags and from the code itself. What stands
between the markers is never edited by hand: tests/test_docs.py fails when a table is stale.
"""

import json
import re
import sys
from collections.abc import Callable, Container
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "bench")]

import page  # noqa: E402 (found in bench/)

from clat import build_model  # noqa: E402
from clat.compare import table as compared  # noqa: E402
from clat.compare.file import load_comparison  # noqa: E402
from clat.compare.plan import Comparison  # noqa: E402
from clat.compare.response import layers_alone  # noqa: E402
from clat.compare.result import Entry, read_entries  # noqa: E402
from clat.evaluation.trust import CHECKS, NEEDED  # noqa: E402
from clat.files import write_text  # noqa: E402
from clat.layers import trace  # noqa: E402
from clat.models import MODELS  # noqa: E402
from clat.report.blocks import Picture, Pictures  # noqa: E402
from clat.report.comparison import comparison_page, learning, read_comparison  # noqa: E402
from clat.report.svg import alone  # noqa: E402
from clat.report.words import percent  # noqa: E402
from clat.training.recipe_files import summary  # noqa: E402

Lines = list[str]
PICTURES = ROOT / "docs/pictures"
OVERFITTING = ROOT / "results/robust-overfitting.json"
BLOCK = re.compile(r"(<!-- made by make docs: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
MARKER = re.compile(r"<!-- (?:made by make docs: .+?|end) -->")


def table(header: str, rows: list[Lines]) -> Lines:
    """Markdown, line by line; the header's titles are separated by ``|``."""
    titles = header.split("|")
    lines = ["| " + " | ".join(title.strip() for title in titles) + " |", "|" + "---|" * len(titles)]
    return [*lines, *("| " + " | ".join(cells) + " |" for cells in rows)]


def results(name: str) -> Any:
    return json.loads((ROOT / f"results/{name}.json").read_text())


def flags() -> Any:
    return json.loads((ROOT / "src/clat/cli/flags.json").read_text())


# From the results


def overfitting() -> Lines:
    """Some arms of the study of robust overfitting, and what it found of them in robust accuracy.

    The last is the average after the last epoch where one was measured.
    """
    asked, entries = read_comparison(OVERFITTING)
    rows = []
    for cells in cells_of_arms(asked, [entry for entry in entries if entry["arm"] in ARMS_IN_README]):
        last = "averaged" if cells["robust averaged"] else "last"
        shown = ("arm", "seeds", "clean best", "robust best", f"clean {last}", f"robust {last}", "trains")
        rows.append([cells[title] for title in shown])
    heading = "arm | seeds | clean, best | robust, best | clean, last | robust, last | weights that train"
    said = robust_contrasts(asked, entries, CONTRASTS_IN_README)
    return [image("overfitting"), "", *table(heading, rows), "", *said]


def cells_of_arms(asked: Comparison, entries: list[Entry]) -> list[dict[str, str]]:
    """The arms' table of a comparison, one row an arm, by the columns' headings."""
    rows = compared.rows(asked, entries, asked.evaluations[0])
    return [dict(zip(compared.columns(asked), row, strict=True)) for row in rows]


def robust_contrasts(asked: Comparison, entries: list[Entry], wanted: Container[tuple[str, str]]) -> Lines:
    """What was found of these pairs in robust accuracy; p is corrected for all pairs of the comparison."""
    found = [verdict.contrast for verdict in compared.verdicts(asked, entries) if verdict.measure == "robust"]
    return [f"- {contrast}" for contrast in found if (contrast.first, contrast.second) in wanted]


def overfitting_picture() -> Picture:
    """Held-out robust accuracy by epoch, of the arms that go on from the base."""
    entries = [
        entry for entry in read_comparison(OVERFITTING)[1] if entry["arm"] in ARMS_IN_README and entry["arm"] != "base"
    ]
    held_out = [{**entry, "curves": {name: entry["curves"][name] for name in ("clean", "robust")}} for entry in entries]
    section = learning(held_out, "overfitting")
    assert section is not None  # the result is committed
    drawn = section.blocks[0]
    assert isinstance(drawn, Pictures)
    return drawn.pictures[-1]


def brief(name: str, *shown: str) -> Lines:
    """Some columns of a comparison's table, and what it found in robust accuracy."""
    asked, entries = read_comparison(ROOT / f"results/{name}.json")
    rows = [[cells[title] for title in shown] for cells in cells_of_arms(asked, entries)]
    every = [(str(first), str(second)) for first, second in asked.contrasts]
    return [*table(" | ".join(shown), rows), "", *robust_contrasts(asked, entries, every)]


def full_size() -> Lines:
    from full_size import markdown

    return markdown(results("full-size")["rows"])


def table_6() -> Lines:
    from table6 import markdown

    return markdown(results("table6"))


def verdicts() -> Lines:
    rows = []
    for name, row in results("verdicts").items():
        figures = [row["clean"], *(found["robust"] for found in row["attacks"].values()), row["worst_case"]]
        rows.append([name, *map(percent, figures), row["verdict"]["text"]])
    return table(
        "network | clean | PGD-20 | through the selected layers | AutoAttack | all together | verdict of `clat trust`",
        rows,
    )


def same_attacks() -> Lines:
    rows = []
    for network, parts in results("peers")["networks"].items():
        for part, found in parts.items():
            if part == "weights":
                continue
            pairs = {"pyautoattack": found} if "clat" in found else found
            for library, pair in pairs.items():
                if library != "seconds":
                    ours, theirs = (f"{100 * pair[side]['accuracy']:.2f}" for side in ("clat", "peer"))
                    cells = [network, part.removesuffix(" as in pyautoattack"), str(pair["clat"]["n"]), ours]
                    rows.append([*cells, f"{library} {theirs}", str(pair["images_that_differ"])])
    return table("network | attack | images | here | other library | images that differ", rows)


def bench(name: str) -> Lines:
    parts: dict[str, Any] = {}
    for file in ("bench", "memory", "loading", "scale"):
        parts |= results(file)["parts"]
    return page.TABLES[name](parts)


# From the code


def recipes() -> Lines:
    """Each recipe with its objective and tuner, and the first sentence of its file."""
    rows = []
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        text = path.read_text()
        keys = yaml.safe_load(text)
        method = f"{keys['objective']} x {keys['tuner']}" + (" with awp" if "awp" in keys else "")
        rows.append([f"[`{path.stem}`](../recipes/{path.name})", method, summary(text)])
    return table("recipe | objective x tuner | what it is", rows)


def recipe_keys() -> Lines:
    rows = []
    for entry in flags()["settings"]:
        values = ", ".join(f"`{word}`" for word in entry.get("choices", ()))
        rows.append([f"`{entry['name']}`", values or f"`{entry['metavar']}`", entry["help"]])
    return [line.replace("true|false", "true or false") for line in table("key | values | what it does", rows)]


def commands() -> Lines:
    lines = []
    for name, command in flags()["commands"].items():
        lines += [f"### `clat {name}`", "", command["summary"], ""]
        rows = []
        for entry in command["arguments"]:
            shown = entry["name"].upper() if entry.get("positional") else f"--{entry['name'].replace('_', '-')}"
            rows.append([f"`{shown}`", entry["help"].replace("|", " or ")])
        lines += [*table("argument | what it is", rows), ""]
    return lines[:-1]


@cache
def networks() -> Lines:
    """Parameters by name, counted on networks without memory."""
    rows = []
    for name in MODELS:
        if name != "mixed":  # two of the others
            counts = []
            for classes in (10, 100):
                with torch.device("meta"):
                    network = build_model(name, classes).network
                counts.append(f"{sum(parameter.numel() for parameter in network.parameters()):,}")
            rows.append([f"`{name}`", *counts])
    return table("name | parameters, 10 classes | 100 classes", rows)


@cache
def layer_numbers() -> Lines:
    """ResNet-18's layers as the paper numbers them."""
    with torch.device("meta"):
        model = build_model("rn18", 10)
    calls = trace(model, torch.empty(1, 3, 32, 32, device="meta"))
    rows = [[str(call.index or ""), f"`{call.name}`", f"{call.parameters:,}"] for call in calls]
    return table("number | layer of `rn18` | parameters", rows)


def checks() -> Lines:
    rows = [[f"`{check.id}`", check.title, check.words, check.source] for check in CHECKS]
    return table("check | a sound network | threshold | source", rows)


def needed_checks() -> Lines:
    return [", ".join(f"`{check}`" for check in NEEDED) + "."]


def comparison(name: str) -> Lines:
    """What a comparison found, from the result that `clat compare` wrote."""
    asked = load_comparison(str(ROOT / f"comparisons/{name}.yaml"))
    entries = read_entries(ROOT / f"results/{name}.json")
    text = compared.markdown(asked, entries, layers_alone(asked, entries))
    shown = [line for file in comparison_pictures(name) for line in (image(file), "")]
    return ["", *text.removeprefix("# ").rstrip("\n").split("\n"), "", *shown]


@cache
def comparison_pictures(name: str) -> dict[str, Picture]:
    """The pictures of the page that ``clat report`` makes of a comparison's result, by the name of their file."""
    page = comparison_page(*read_comparison(ROOT / f"results/{name}.json"))
    blocks = [block for section in page.sections for block in section.blocks if isinstance(block, Pictures)]
    found = [each for block in blocks for each in block.pictures]
    return {f"{name}-{number}": each for number, each in enumerate(found, 1)}


# Pictures


def image(name: str) -> str:
    """The line of a page that shows a picture; pages in docs/ name it from there, and have its figures beside it."""
    alt = every_picture()[name].alt
    if name.startswith(COMPARED):
        return f"![{re.split('[.:] ', alt)[0]}](pictures/{name}.svg)"
    return f"![{alt}](docs/pictures/{name}.svg)"


@cache
def every_picture() -> dict[str, Picture]:
    """What stands in docs/pictures, by the name of the file."""
    found = {"overfitting": overfitting_picture()}
    for name in COMPARED:
        found |= comparison_pictures(name)
    return found


ARMS_IN_README = ("base", "pgd-at", "pgd-at-awp-ema", "random-awp-ema", "clat-awp-ema", "pgd-at-awp-ema-high",
                  "clat-awp-ema-high")  # fmt: skip
CONTRASTS_IN_README = (
    ("clat-awp-ema/last", "pgd-at/last"),
    ("clat-awp-ema/best", "base/best"),
    ("clat-awp-ema/best", "random-awp-ema/best"),
    ("pgd-at-awp-ema-high/best", "base/best"),
)
BEST_AND_LAST = ("clean best", "robust best", "clean last", "robust last")
COMPARED = ("robust-overfitting", "high-rate", "layer-response", "paper-terms")  # shown whole
BRIEF = ("open-points", "cost", "methods")  # of these a page shows a part

TABLES: dict[str, Callable[[], Lines]] = {
    "overfitting": overfitting,
    "methods": partial(brief, "methods", "arm", "clean last", "robust last", "TFLOPs", "trains"),
    "open points": partial(brief, "open-points", "arm", "seeds", *BEST_AND_LAST, "trains"),
    "full size": full_size,
    "table 6": table_6,
    "cost": partial(brief, "cost", "arm", "seeds", *BEST_AND_LAST, "TFLOPs"),
    "verdicts": verdicts,
    "same attacks": same_attacks,
    "recipes": recipes,
    "recipe keys": recipe_keys,
    "commands": commands,
    "networks": networks,
    "layer numbers": layer_numbers,
    "checks": checks,
    "needed checks": needed_checks,
    **{f"comparison: {name}": partial(comparison, name) for name in COMPARED},
    **{f"bench: {name}": partial(bench, name) for name in page.TABLES},
}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def names(text: str) -> list[str]:
    """The tables that a page asks for, in order.

    Raises:
        ValueError: a marker without its partner, or a name that is not in ``TABLES``
    """
    found = [match[2] for match in BLOCK.finditer(text)]
    if len(MARKER.findall(text)) != 2 * len(found):
        raise ValueError("a marker stands alone: each table needs <!-- made by make docs: NAME --> and <!-- end -->")
    for name in found:
        if name not in TABLES:
            raise ValueError(f"no table is named {name!r}; tools/docs.py has {', '.join(TABLES)}")
    return found


def renewed(text: str) -> str:
    """The page with each of its tables made again."""
    names(text)
    return BLOCK.sub(lambda match: match[1] + "\n".join(TABLES[match[2]]()) + "\n" + match[4], text)


if __name__ == "__main__":
    for path in pages():
        before = path.read_text()
        after = renewed(before)
        if after != before:
            path.write_text(after)
            print(f"wrote {path.relative_to(ROOT)}")
    for name, each in every_picture().items():
        write_text(PICTURES / f"{name}.svg", alone(each))
