"""Pages in a real browser: they open without errors, sort, work by keyboard, and what is hostile stays text."""

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from clat.checkpoint import load_checkpoint
from clat.data.dataset import Dataset
from clat.evaluation.evaluate import evaluate
from clat.evaluation.trust import CHECKS, trust
from clat.evaluation.trust.record import write_verdict
from clat.models import build_model
from clat.objectives import Clat
from clat.report.examples import examine
from clat.report.page import markdown, write_page
from clat.report.source import page_of
from clat.threat import Threat
from clat.training.recipe import Recipe
from clat.training.train import train
from clat.tuners import Critical

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install '.[dev]' brings playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium; apt-get install chromium brings it")

ROOT = Path(__file__).parents[1]
SCRIPT = "<script>window.hacked = 1</script>"
HOSTILE = (
    f"\"'>{SCRIPT}",
    "<img src=x onerror='window.hacked = 2'>",
    "\x1b[31mred\x1b[0m [bold]x[/bold] `a|b` ${1} $\\frac{1}{2}$ {{ 7 * 7 }}",
)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Two pages, of a run with everything on it, in which every name is hostile, and of a comparison."""
    folder = tmp_path_factory.mktemp("pages") / "it's <b>&\" [bold]"
    torch.manual_seed(0)
    labels = torch.arange(120) % 3
    pixels = torch.randint(0, 60, (120, 1, 12, 12), dtype=torch.uint8)
    pixels[:, 0, 0] = torch.tensor(list(SCRIPT[:12].encode()), dtype=torch.uint8)
    data = Dataset(pixels, labels, HOSTILE, f"source {SCRIPT} | x", "test")
    recipe = Recipe(
        objective=Clat(), tuner=Critical(k=0.1, every=1), epochs=2, batch_size=30, holdout=30, precision="fp32",
        threat=Threat(eps=0.1, step=0.1, steps=1), validation_steps=1, health=False,
    )  # fmt: skip
    train(recipe, build_model("rn18", 3, channels=1, width=2), data, out=folder)
    environment = json.loads((folder / "environment.json").read_text())
    environment["command"] = ["clat", "train", SCRIPT, "`x`\n</pre>"]
    (folder / "environment.json").write_text(json.dumps(environment))
    network, few = load_checkpoint(folder)[0], data.subset(torch.arange(30))
    evaluate(network, few, Threat(eps=0.1, step=0.1, steps=1), record=folder / "evaluations")
    verdict = trust(network, few, 0.1, checks=CHECKS[:1])
    finding = replace(verdict.findings[0], check=HOSTILE[1], measured=HOSTILE[2])
    write_verdict(folder / "evaluations", replace(verdict, text=HOSTILE[0], findings=(finding,)))

    def load(path: Path) -> Any:
        return load_checkpoint(path)[0]

    page = page_of(str(folder), load, examine=lambda _: examine(network, few, 0.1, base=network))
    out = folder.parent
    write_page([page], out / "run.html")
    (out / "card.md").write_text(markdown([page]))
    both = [page, page_of(str(ROOT / "results/robust-overfitting.json"), load, place=2)]
    write_page(both, out / "both.html")
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, written) -> Iterator[Any]:
    """Opens a page; what it logs and asks for must be nothing."""
    said: list[str] = []
    contexts = []

    def opened(name: str = "both.html", *, width: int = 1280, **how: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800}, **how)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        place = (written / name).as_uri()
        page.on("request", lambda request: said.append(request.url) if request.url != place else None)
        page.goto(place)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [line for line in said if not line.startswith("data:image/png")] == []


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_at_each_width_in_light_and_dark(visit, width, scheme):
    page = visit(width=width, color_scheme=scheme)
    assert page.locator("h1").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background, ink = page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    dark = [sum(map(int, re.findall(r"\d+", colour)[:3])) < 300 for colour in (background, ink)]
    assert dark == ([True, False] if scheme == "dark" else [False, True])
    lines = page.evaluate("[...document.querySelectorAll('svg path')].map(e => getComputedStyle(e).stroke)")
    assert len({line for line in lines if line.startswith("rgb")}) > 3  # the colours' names are known


def test_print_is_black_on_white_even_in_dark_mode(visit):
    page = visit("run.html", color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('svg text')).fill") == "rgb(28, 30, 33)"
    assert page.pdf()[:5] == b"%PDF-"


def test_tables_sort_by_mouse_and_keyboard(visit):
    page = visit("run.html")
    table = page.locator("table:has(caption:text('Accuracy by class'))")
    button = table.locator("thead button").nth(3)
    heading = table.locator("thead th").nth(3)

    def column() -> list[float]:
        return table.locator("tbody tr").evaluate_all("rows => rows.map(row => +row.cells[3].dataset.value)")

    before = column()
    assert len(set(before)) > 1
    button.click()
    assert column() == sorted(before)
    assert heading.get_attribute("aria-sort") == "ascending"
    button.focus()
    page.keyboard.press("Enter")
    assert column() == sorted(before, reverse=True)
    assert heading.get_attribute("aria-sort") == "descending"
    table.locator("thead button").first.press("Space")
    assert heading.get_attribute("aria-sort") is None
    names = table.locator("tbody th").all_inner_texts()
    assert len(names) == 3
    assert page.evaluate("([a, b]) => a.localeCompare(b, 'en', {numeric: true}) <= 0", names[:2])


def test_the_keyboard_reaches_numbers_behind_a_picture(visit):
    page = visit("run.html")
    summary = page.locator("figure summary").first
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("figure table").first.is_visible()


def test_every_picture_has_words_and_numbers(visit):
    page = visit()
    figures = page.locator("figure:has(svg)")
    assert figures.count() >= 8
    for figure in figures.all():
        assert len(figure.locator("svg[role=img]").get_attribute("aria-label")) > 20
        assert figure.locator("details td").count() > 0
    assert all(page.locator("img").evaluate_all("images => images.map(image => image.alt.length > 0)"))
    repeated = page.evaluate(
        "(ids => ids.filter((id, i) => ids.indexOf(id) < i))([...document.querySelectorAll('[id]')].map(e => e.id))"
    )
    assert repeated == []


def test_what_is_hostile_stays_text(visit, written):
    page = visit("run.html")
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.scripts.length") == 1
    assert page.locator("article b:not(.figures b), article img:not([src^='data:image/png'])").count() == 0
    text = page.locator("body").text_content()
    assert "window.hacked = 1" in text
    assert "\\x1b[31mred\\x1b[0m [bold]x[/bold] `a|b` ${1} $\\frac{1}{2}$ {{ 7 * 7 }}" in text
    assert page.locator("svg text").filter(has_text="<img src=x").count() > 0  # as the name of a class
    source = (written / "run.html").read_text()
    assert source.count("<script") == 1
    assert "\x1b" not in source
    assert "<img src=x" not in source


def test_what_is_hostile_stays_text_in_markdown(written):
    card = (written / "card.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert "datasets" not in yaml.safe_load(head)  # its name is none of the hub
    assert "<script" not in re.sub(r"^    .*$", "", body, flags=re.MULTILINE)  # in an indented block it is text
    assert "<img" not in re.sub(r"^    .*$", "", body, flags=re.MULTILINE)
    assert "\x1b" not in card
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert all("a|b" not in row for row in rows)


def test_images_are_written_anew_from_pixels(written):
    """Nothing of a file that images came from reaches the page, only a PNG made of their pixels."""
    found = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", (written / "run.html").read_text())
    assert found
    for each in found:
        content = base64.b64decode(each)
        with Image.open(io.BytesIO(content)) as image:
            assert image.size == (12, 12)
            assert not image.info
        assert b"script" not in content


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_has_no_serious_finding(visit, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = visit("run.html", width=390, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    found = Axe().run(page).response["violations"]
    assert [each["id"] for each in found if each["impact"] in ("serious", "critical")] == []
