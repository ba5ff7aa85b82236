"""Figures in the documents are those of the committed results, and their links lead somewhere."""

import json
import re
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from clat.models import MODELS
from clat.objectives import Clat
from clat.tuners import Critical

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))


def test_the_screening_table_is_that_of_its_result_file():
    from screen import markdown

    rows = json.loads((ROOT / "results/screening.json").read_text())["rows"]
    assert "\n".join(markdown(rows)) in (ROOT / "docs/method.md").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
        assert (path.parent / link).exists(), link


def test_every_open_point_names_a_key_and_its_values():
    text = (ROOT / "docs/method.md").read_text()
    table = text[text.index("## What the paper leaves open") : text.index("## Where the defaults")]
    defaults = {"clat": Clat(), "critical": Critical()}
    for section, block in defaults.items():
        for key in fields(block):
            if key.name not in ("every", "ranking"):  # these the paper has
                assert f"`{section}.{key.name}`" in table, key.name
    for row in table.splitlines():
        match = re.match(r"\|[^|]+\| `(clat|critical)\.(\w+)` \| `([\w.]+)`", row)
        if match:
            default = getattr(defaults[match[1]], match[2])
            assert match[3] == str(default).lower(), row


def test_table_6_is_that_of_its_result_file_and_of_the_networks():
    from table6 import markdown, rows

    stored = json.loads((ROOT / "results/table6.json").read_text())
    assert "\n".join(markdown(stored)) in (ROOT / "docs/baselines.md").read_text()
    assert json.loads(json.dumps(rows())) == stored


def test_the_methods_table_is_that_of_its_result_file_and_has_every_method():
    from compare_methods import FINE_TUNED, FROM_SCRATCH, ON_TOP, markdown

    rows = json.loads((ROOT / "results/methods.json").read_text())["rows"]
    assert "\n".join(markdown(rows)) in (ROOT / "docs/baselines.md").read_text()
    assert {row["method"] for row in rows} == {*FROM_SCRATCH, *FINE_TUNED, *ON_TOP.values()}


def test_the_full_size_table_is_that_of_its_result_file_and_has_every_network():
    from full_size import NETWORKS, markdown

    rows = json.loads((ROOT / "results/full-size.json").read_text())["rows"]
    assert "\n".join(markdown(rows)) in (ROOT / "docs/baselines.md").read_text()
    assert [row["network"] for row in rows] == list(NETWORKS) == [name for name in MODELS if name != "mixed"]


def test_the_performance_tables_are_those_of_their_result_files():
    sys.path.insert(0, str(ROOT / "bench"))
    import cheaper
    from page import tables

    text = (ROOT / "docs/performance.md").read_text()
    found = [json.loads((ROOT / f"results/{name}.json").read_text())["parts"] for name in ("bench", "memory")]
    for name, lines in tables(found[0] | found[1]).items():
        assert "\n".join(lines) in text, name
    assert "\n".join(cheaper.markdown(json.loads((ROOT / "results/cheaper.json").read_text()))) in text


def test_the_verdicts_are_those_of_their_result_file():
    from verdicts import markdown

    rows = json.loads((ROOT / "results/verdicts.json").read_text())
    assert "\n".join(markdown(rows)) in (ROOT / "docs/trust.md").read_text()


def test_the_peers_table_is_that_of_its_result_file():
    from peers import markdown

    found = json.loads((ROOT / "results/peers.json").read_text())
    assert "\n".join(markdown(found)) in (ROOT / "docs/trust.md").read_text()
    assert len(found["networks"]) == 2


def test_every_recipe_and_network_is_listed():
    text = (ROOT / "docs/baselines.md").read_text()
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"| `{path.stem}` |" in text
    for name in MODELS:
        assert f"| `{name}` |" in text


def test_every_dependency_is_justified():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "docs/dependencies.md").read_text()
    for requirement in project["dependencies"]:
        name = re.match(r"[\w-]+", requirement)
        assert name
        assert f"| {name[0]} |" in text, requirement


def test_the_cifar10_table_is_that_of_its_result_file():
    runs = json.loads((ROOT / "results/cifar10-rn18w16.json").read_text())["runs"]
    text = (ROOT / "docs/method.md").read_text()
    names = {
        "base": "PGD-AT, 5 epochs",
        "clat": "+ CLAT, λ 0.1",
        "clat01": "+ CLAT, λ 0.01, 5 attack steps",
    }
    for run, name in names.items():
        clean, robust = (100 * runs[run]["test_last"][key]["accuracy"] for key in ("clean", "robust"))
        assert f"| {name} | {clean:.1f} | {robust:.1f} |" in text
