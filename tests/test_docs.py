"""Tables in the documents are those that ``make docs`` writes, and what the text says of keys and files holds."""

import html
import json
import re
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from clat.models import MODELS
from clat.objectives import Clat
from clat.report.comparison import read_comparison
from clat.tuners import Critical

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import docs  # noqa: E402 (found in tools/)

PAGES = [*docs.pages(), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]


@pytest.mark.parametrize("path", docs.pages(), ids=lambda path: path.name)
def test_no_table_is_stale(path):
    assert docs.renewed(path.read_text()) == path.read_text(), "run make docs"


def test_every_table_is_shown_somewhere():
    assert sorted(docs.TABLES) == sorted(name for path in docs.pages() for name in docs.names(path.read_text()))


def test_a_table_by_hand_is_noticed():
    """No row with a figure stands outside the markers, where nothing would keep it true."""
    for path in docs.pages():
        by_hand = docs.BLOCK.sub("", path.read_text())
        rows = [line for line in by_hand.splitlines() if re.match(r"\|.*\| *[\d,.]+( ±.*)? *\|", line)]
        assert not rows, f"{path.name}: {rows[0]}"


def test_no_picture_is_stale_or_left_over():
    """The numbers of each picture stand in its description; how they are drawn may differ between matplotlibs."""
    files = {path.stem: path.read_text() for path in docs.PICTURES.glob("*.svg")}
    assert files.keys() == docs.every_picture().keys()
    for name, each in docs.every_picture().items():
        described = re.search(r"<desc>(.*?)</desc>", files[name], re.DOTALL)[1]
        assert html.unescape(described) == each.alt, "run make docs"
        assert any(f"pictures/{name}.svg" in page.read_text() for page in docs.pages())
        assert len(files[name]) < 80_000


@pytest.mark.parametrize("name", ["verdicts", "peers", "bench", "memory", "loading", "scale"])
def test_a_changed_result_makes_a_page_stale(name, monkeypatch):
    real = docs.results

    def changed(wanted):
        text = json.dumps(real(wanted))
        return json.loads(re.sub(r"\d(?=[,\]}])", lambda digit: str((int(digit[0]) + 1) % 10), text))

    monkeypatch.setattr(docs, "results", lambda wanted: (changed if wanted == name else real)(wanted))
    monkeypatch.setattr(docs, "every_picture", docs.every_picture.__wrapped__)
    assert any(docs.renewed(path.read_text()) != path.read_text() for path in docs.pages())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<!-- made by make docs: nothing -->\n<!-- end -->", "no table is named 'nothing'"),
        ("<!-- made by make docs: checks -->\n", "stands alone"),
        ("<!-- end -->\n", "stands alone"),
    ],
)
def test_a_broken_marker_is_named(text, says):
    with pytest.raises(ValueError, match=says):
        docs.renewed(text)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", path.read_text())
    for place, heading in links:
        target = path.parent / place if place else path
        assert target.exists(), place
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], heading


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


def test_every_result_is_cited_and_every_command_that_makes_one_is_there():
    """A file in results/ is named by a script that writes it, and by a page that shows it."""
    scripts = [path.read_text() for folder in ("tools", "bench") for path in (ROOT / folder).glob("*.py")]
    for path in (ROOT / "results").glob("*.json"):
        written = any(f"results/{path.name}" in text or f'RESULTS / "{path.name}"' in text for text in scripts)
        compared = path.stem in (*docs.COMPARED, *docs.BRIEF)  # written by clat compare
        assert written or compared, f"nothing makes {path.name}"
        assert any(f"results/{path.name}" in page.read_text() for page in docs.pages()), path.name


def open_points() -> dict[str, str]:
    """The keys in the table of docs/method.md, each with the first of the values beside it."""
    text = (ROOT / "docs/method.md").read_text()
    table = text[text.index("## What the paper leaves open") :].split("\n## ")[0]
    found = {}
    for row in table.splitlines():
        if row.count("|") >= 5:
            _, _, keys, values, *_ = row.split("|")
            first = re.split("[,;]", values)[0].strip().strip("`")
            found |= dict.fromkeys(re.findall(r"`((?:clat|critical)\.\w+)`", keys), first)
    return found


def test_every_open_point_names_a_key_and_its_default():
    listed = open_points()
    keys = {
        f"{name}.{key.name}": getattr(each, key.name)
        for name, each in (("clat", Clat()), ("critical", Critical()))
        for key in fields(each)
    }
    assert keys.keys() - listed.keys() <= {"critical.every", "critical.ranking"}  # these the paper has
    assert listed.keys() <= keys.keys()
    for key, value in listed.items():
        assert value == ("none" if keys[key] in (None, (), []) else str(keys[key]).lower()), key


def test_table_6_is_that_of_the_networks():
    from table6 import rows

    assert json.loads(json.dumps(rows())) == json.loads((ROOT / "results/table6.json").read_text())


def test_the_methods_table_has_every_method():
    _, entries = read_comparison(ROOT / "results/methods.json")
    measured = {entry["arm"].replace("base", "pgd-at") for entry in entries}
    alone = {path.stem for path in (ROOT / "recipes").glob("*.yaml")} - {"rift-code"}  # a form of rift
    on_top = {f"{name}-clat" for name in alone if not name.startswith(("clat", "pgd-at"))}
    assert measured == alone | on_top  # `clat` itself starts from `pgd-at`


def test_the_full_size_table_has_every_network():
    from full_size import NETWORKS

    rows = json.loads((ROOT / "results/full-size.json").read_text())["rows"]
    assert [row["network"] for row in rows] == list(NETWORKS) == [name for name in MODELS if name != "mixed"]


def test_every_dependency_is_justified_and_no_other():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.match(r"[\w-]+", requirement)[0] for requirement in project["dependencies"]}
    listed = re.findall(r"^\| ([\w-]+) \|", (ROOT / "docs/dependencies.md").read_text(), re.MULTILINE)
    assert set(listed) - {"package"} == needed
