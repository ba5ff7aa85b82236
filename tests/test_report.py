"""clat report: what a page shows, what it leaves out and says, and what it refuses."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from clat.attacks import pgd_threat, restarts
from clat.checkpoint import load_checkpoint
from clat.cli.main import main
from clat.compare.table import validated_how
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.evaluation.evaluate import Progress, evaluate
from clat.evaluation.record import read_record
from clat.evaluation.sweep import sweep
from clat.evaluation.trust import CHECKS, trust
from clat.evaluation.trust.record import read_verdict, write_verdict
from clat.models import build_model
from clat.objectives import Clat
from clat.report.blocks import side_by_side
from clat.report.comparison import learning
from clat.report.page import LARGEST, html, markdown, write_page
from clat.report.pictures import arms_panel, figure_of, intervals_panel
from clat.report.reading import told
from clat.report.records import records_in
from clat.report.run import run_page
from clat.report.source import page_of
from clat.threat import Threat
from clat.training.recipe import Recipe
from clat.training.runs import Run
from clat.training.train import train
from clat.tuners import Critical

ROOT = Path(__file__).parents[1]
EPS = 0.1
RECIPE = Recipe(epochs=1, batch_size=60, holdout=60, threat=Threat(eps=EPS, step=EPS, steps=1), validation_steps=1,
                health=False, precision="fp32")  # fmt: skip


def images() -> Dataset:
    """Bars in one of three places, as the fixture ``blobs`` has them."""
    torch.manual_seed(0)
    labels = torch.arange(240) % 3
    pixels = torch.randint(0, 60, (240, 1, 12, 12), dtype=torch.uint8)
    for i, label in enumerate(labels):
        pixels[i, :, 4 * label : 4 * label + 3] += 150
    return Dataset(pixels, labels, ("top", "middle", "bottom"), "blobs", "train")


def load(path: Path):
    return load_checkpoint(path)[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a base and a run of CLAT on it, both evaluated and swept, the second one checked."""
    folder = tmp_path_factory.mktemp("runs")
    data = images()
    torch.manual_seed(0)
    train(RECIPE, build_model("rn18", 3, channels=1, width=2), data, out=folder / "base")
    best = folder / "base/best.safetensors"
    clat = replace(RECIPE, epochs=2, objective=Clat(), tuner=Critical(k=0.15, every=1))
    train(clat, load(best), data, out=folder / "clat", origin=str(best))
    test = replace(data.subset(torch.arange(40)), split="test")
    for name in ("base", "clat"):
        network, record = load(folder / name / "best.safetensors"), folder / name / "evaluations"
        evaluate(network, test, restarts(pgd_threat(EPS, 2), 2), record=record)
        sweep(network, test, "eps", [0, EPS / 2, EPS], steps=2, record=record)
        sweep(network, test, "steps", [1, 2], eps=EPS, record=record)
    verdict = trust(load(folder / "clat/best.safetensors"), test, EPS, checks=CHECKS[:3])
    write_verdict(folder / "clat/evaluations", verdict)
    return folder


@pytest.fixture
def copy(runs, tmp_path) -> Path:
    """The runs, to be changed."""
    shutil.copytree(runs, tmp_path / "runs")
    begin_from(tmp_path / "runs", "base")
    return tmp_path / "runs"


def begin_from(folder: Path, name: str) -> None:
    """Has the run of CLAT say that it began with the best checkpoint of another."""
    path = folder / "clat/environment.json"
    content = json.loads(path.read_text())
    content["from"] = str(folder / name / "best.safetensors")
    path.write_text(json.dumps(content))


def shown(page) -> str:
    """A page's text with its tables."""
    return html([page])


def section(page, title):
    return next(each for each in page.sections if each.title.startswith(title))


def test_the_numbers_are_those_of_the_records(runs):
    page = run_page(told(str(runs / "clat"), load))
    results = [read_record(path)[0] for path in (runs / "clat/evaluations").glob("pgd-2-*.json")]
    found = next(result for result in results if len(result.attacks) == 2)
    clean, robust, trained, _ = page.figures
    assert clean.value == f"{100 * found.clean.value:.1f} %"
    assert robust.value == f"{100 * found.robust.value:.1f} %"
    assert robust.note.endswith("PGD-2, 2 starts, linf eps 0.1, 40 test images")
    run = Run(runs / "clat")
    assert trained.note == f"{run.metrics[0]['trainable']:,} of {run.environment['parameters']:,}"
    table = section(page, "Accuracy").blocks[1]
    assert [row[0].text for row in table.rows] == [str(runs / "clat"), str(runs / "base")]
    assert table.rows[0][-1].value == found.robust.value
    assert "paired over the same 40 images" in section(page, "Accuracy").words[0]


def test_several_runs_stand_side_by_side_at_the_top(runs):
    pages = [run_page(told(str(runs / name), load), place=place) for place, name in enumerate(("base", "clat"), 1)]
    overview = side_by_side(pages)
    assert overview.headings == ("run", *(figure.label for figure in pages[0].figures))
    for page, row in zip(pages, overview.rows, strict=True):
        assert [(cell.text, cell.note) for cell in row[1:]] == [(each.value, each.note) for each in page.figures]
    seconds = [sum(entry["seconds"] for entry in Run(runs / name).metrics) for name in ("base", "clat")]
    assert [row[-1].value for row in overview.rows] == seconds
    assert html(pages).index("The runs side by side") < html(pages).index("<article")
    assert "The runs side by side" in markdown(pages)
    assert side_by_side(pages[:1]) is None


def test_training_accuracy_stands_beside_the_held_out_one(runs, copy):
    last = Run(runs / "clat").metrics[-1]
    learned = section(run_page(told(str(runs / "clat"), load)), "Learning")
    gap = 100 * (last["train_robust"] - last["robust"])
    assert f"at {100 * last['train_robust']:.1f} %: a generalisation gap of {gap:.1f} points." in learned.words[0]
    table = learned.blocks[0].pictures[0].table
    assert table.headings[3:5] == ("clean, training %", "robust, training %")
    assert [row[4].value for row in table.rows] == [entry["train_robust"] for entry in Run(runs / "clat").metrics]
    path = copy / "clat/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if not key.startswith("train_")} for line in lines]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
    without = section(run_page(told(str(copy / "clat"), load)), "Learning").blocks[0].pictures[0]
    assert without.table.headings[3:] == ("seconds", "layers selected again")


def test_the_layers_that_trained_are_marked(runs):
    selections = Run(runs / "clat").selections
    heat = section(run_page(told(str(runs / "clat"), load)), "Which layers").blocks[0].pictures[0]
    for column, selection in enumerate(selections, 1):
        marked = [row[0].text for row in heat.table.rows if row[column].text.endswith(" *")]
        assert sorted(f"network.{name.partition(' ')[0]}" for name in marked) == sorted(selection.layers)
    assert heat.svg.count('role="img"') == 1
    assert "Trained from epoch 1: layer" in heat.alt


def test_a_sweep_is_put_together_from_its_records(runs):
    data = replace(images().subset(torch.arange(40)), split="test")
    network = load(runs / "clat/best.safetensors")
    curves = {curve.over: curve for _, curve in records_in([runs / "clat/evaluations"]).curves}
    assert curves["eps"] == sweep(network, data, "eps", [0, EPS / 2, EPS], steps=2)
    assert curves["steps"] == sweep(network, data, "steps", [1, 2], eps=EPS)


def test_a_verdict_comes_back_as_it_was(runs, tmp_path):
    path = next((runs / "clat/evaluations").glob("trust-*.json"))
    verdict = read_verdict(path)
    assert read_verdict(write_verdict(tmp_path, verdict)) == verdict
    page = run_page(told(str(runs / "clat"), load))
    assert page.verdict.lower().startswith(verdict.text[:20].lower())
    assert page.good == verdict.ok


def test_records_of_other_weights_are_left_out_and_that_is_said(copy):
    page = run_page(told(str(copy / "clat"), lambda _: load(copy / "base/best.safetensors")))
    assert page.figures[0].label == "Clean accuracy, held-out"
    assert not page.verdict
    assert any("records are of other weights" in each.what for each in page.missing)


def test_a_run_that_is_not_the_start_is_not_shown_as_the_base(copy):
    assert told(str(copy / "clat"), load).base.name == str(copy / "base")
    (copy / "base/best.safetensors").write_bytes((copy / "clat/best.safetensors").read_bytes())
    assert told(str(copy / "clat"), load).base is None
    assert told(str(copy / "clat"), load, base=str(copy / "base")).base is not None


def test_what_is_not_recorded_is_left_out_with_its_command(copy):
    shutil.rmtree(copy / "clat/evaluations")
    page = run_page(told(str(copy / "clat"), load))
    commands = [each.command for each in page.missing]
    clat, base = copy / "clat", copy / "base"
    assert commands == [
        f"clat evaluate {clat} --data blobs",
        f"clat trust {clat} --base {base} --data blobs",
        f"clat sweep {base} {clat} --data blobs",
        f"clat report {clat} --data blobs --out page.html",
    ]
    assert [each.title for each in page.sections] == ["Learning", "Which layers trained", "Cost", "To do it again"]


def test_an_unfinished_evaluation_is_no_result(copy):
    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    network, data = load(copy / "clat/best.safetensors"), images()
    with pytest.raises(KeyboardInterrupt):
        evaluate(network, data, pgd_threat(EPS, 3), record=copy / "clat/evaluations", progress=stop, batch_size=10)
    records = records_in([copy / "clat/evaluations"])
    assert records.left_out == (
        "1 record is of an evaluation that was interrupted; its command, given again, ends it.",
    )
    assert all(each.result.attack != "PGD-3" for each in records.evaluations)


@pytest.mark.parametrize("kind", ["pgd", "trust"])
@pytest.mark.parametrize("change", ["edited", "forged", "cut"])
def test_a_damaged_record_is_refused(kind, change, copy, capsys):
    from clat.files import digest_of

    path = next((copy / "clat/evaluations").glob(f"{kind}-*.json"))
    content = json.loads(path.read_text())
    if change == "edited":
        path.write_text(re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), path.read_text(), count=1))
    elif change == "forged":
        inner = content["state"]["identity"] if kind == "pgd" else content["verdict"]
        inner["eps"] = "<script>"
        del content["digest"]
        path.write_text(json.dumps({**content, "digest": digest_of(content)}))
    else:
        path.write_text(path.read_text()[:-40])
    assert main(["report", str(copy / "clat"), "--out", str(copy / "page.html")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("clat: ")
    assert path.name in said
    assert said.count("\n") == 1
    assert not (copy / "page.html").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere", "--out", "page.html"], "is no run folder, no comparison and no record"),
        (["CLAT", "--out", "page.pdf"], "end it with .html, or with .md for a model card"),
        (["RESULT", "--out", "page.html", "--data", "blobs"], "--data attacks the network of a run"),
        (["CLAT"], "the following arguments are required: --out"),
        (["CLAT", "--out", "page.html", "--base", "nowhere"], "is no run folder"),
    ],
)
def test_what_is_refused(arguments, says, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    places = {"CLAT": str(runs / "clat"), "RESULT": str(ROOT / "results/robust-overfitting.json")}
    assert main(["report", *(places.get(word, word) for word in arguments)]) == 2
    said = capsys.readouterr().err
    assert says.replace("the following arguments are required: ", "it needs ") in said
    assert not list(tmp_path.iterdir())


def test_a_page_of_records_alone(runs):
    page = page_of(str(runs / "clat/evaluations"), load)
    assert page.kind == "Evaluations"
    one = page_of(str(next((runs / "clat/evaluations").glob("pgd-2-*.json"))), load)
    assert [each.title for each in one.sections] == ["Accuracy"]


def test_a_comparison_has_its_question_contrasts_and_curves():
    path = ROOT / "results/robust-overfitting.json"
    content = json.loads(path.read_text())
    page = page_of(str(path), load)
    assert page.title == content["comparison"]["question"]
    forests = section(page, "Contrasts").blocks[0].pictures
    drawn = {(row[0].text, row[1].text): row[2].value for picture in forests for row in picture.table.rows[:1]}
    first = content["contrasts"][0]
    assert drawn[first["first"], first["second"]] in [each["mean"] for each in content["contrasts"]]
    assert sum(len(picture.table.rows) for picture in forests) == len(content["contrasts"])
    curves = section(page, "Learning").blocks[0].pictures
    assert [len(picture.table.rows) for picture in curves] == [max(unit["epochs"] for unit in content["units"])] * 2
    arms = section(page, "Arms").blocks[0]
    assert [row[0].text for row in arms.rows] == [arm for arm, seeds in content["seeds"].items() if seeds]


def test_the_command_attacks_images_and_writes_both_kinds(runs, tmp_path, monkeypatch, capsys):
    from clat.cli import attacking

    monkeypatch.setattr(attacking, "data_named", lambda *_: replace(images(), split="test"))
    out = tmp_path / "page.html"
    arguments = ["--data", "blobs", "--limit", "60", "--seed", "3"]
    assert main(["report", str(runs / "clat"), *arguments, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"Written: {out} (" in said
    assert "Not shown" not in said
    text = out.read_text()
    assert out.stat().st_size < LARGEST
    assert text.count("data:image/png;base64,") >= 9
    assert "before training" in text  # criticality, measured on the base and on the run
    assert main(["report", str(runs / "clat"), str(runs / "base"), "--out", str(tmp_path / "card.md")]) == 0


def test_a_card_has_the_hubs_metadata_and_the_same_numbers(runs):
    page = run_page(told(str(runs / "clat"), load))
    card = markdown([page])
    _, head, body = card.split("---\n", 2)
    meta = yaml.safe_load(head)
    assert meta["pipeline_tag"] == "image-classification"
    assert meta["datasets"] == ["blobs"]
    values = [metric["value"] for metric in meta["model-index"][0]["results"][0]["metrics"]]
    assert [f"{value:.1f} %" for value in values] == [figure.value for figure in page.figures[:2]]
    for figure in page.figures:
        assert figure.value in body
    assert body.count("\n|---") == html([page]).count("<table>")
    rows = [line for line in body.splitlines() if line.startswith("| ") and "robust %" in line]
    assert rows


def test_a_page_that_is_too_large_is_refused(runs, tmp_path, monkeypatch):
    from clat.report import page as writing

    monkeypatch.setattr(writing, "LARGEST", 1000)
    with pytest.raises(InputError, match="report fewer runs at a time"):
        write_page([run_page(told(str(runs / "clat"), load))], tmp_path / "page.html")


def test_commands_say_which_command_draws_the_page(copy, monkeypatch, capsys):
    from clat.cli import attacking
    from clat.cli import trust as command

    monkeypatch.setattr(attacking, "data_named", lambda *_: replace(images(), split="test"))
    monkeypatch.setattr(command, "trust_model", partial(trust, checks=CHECKS[:2]))
    run, few = str(copy / "clat"), ["--data", "blobs", "--limit", "10"]
    hint = f"To look at: clat report {run} --out page.html"
    for line in (
        ["evaluate", run, *few, "--steps", "1", "--starts", "1"],
        ["sweep", run, *few, "--over_eps", "none", "--over_steps", "1"],
        ["trust", run, *few],
    ):
        assert main(line) in (0, 1)
        assert capsys.readouterr().out.splitlines()[-1] == hint
        main([*line, "--json", "-"])
        assert hint not in capsys.readouterr().out
    assert len(list((copy / "clat/evaluations").glob("trust-*.json"))) == 2


def test_the_commands_of_the_page_run(copy, monkeypatch):
    from clat.cli import attacking

    monkeypatch.setattr(attacking, "data_named", lambda *_: replace(images(), split="test"))
    monkeypatch.chdir(copy.parent)
    text = (ROOT / "docs/report.md").read_text()
    commands = re.findall(r"^clat report .*", text, re.MULTILINE)
    assert len(commands) == 4
    for line in commands:
        few = ["--limit", "20"] if "--data" in line else []
        assert main([*shlex.split(line)[1:], *few]) == 0
    assert Path("card.md").read_text().startswith("---\n")
    assert Path("both.html").read_text().count("<article") == 2


@pytest.mark.parametrize(("letters", "most"), [(3, 3), (14, 2), (60, 1)])
def test_a_legend_lies_within_its_picture(letters, most):
    names = [f"{letter * letters}" for letter in "abcdef"]
    draw = intervals_panel(["row"], {name: [(1.0, 0.0, 2.0)] for name in names}, "x")
    figure = figure_of(draw, height=4, legend=3)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    extent = legend.get_window_extent()
    assert extent.x0 >= 0
    assert extent.x1 <= figure.bbox.width
    columns = {round(text.get_window_extent().x0) for text in legend.get_texts()}
    assert len(columns) == most


def test_curves_of_many_arms_become_their_highest_and_last_epoch():
    def drawn(arms: int):
        entries = [
            {
                "arm": f"arm {arm}",
                "recipe": {},
                "curves": {"clean": [0.5, 0.6, 0.55], "robust": [0.3, 0.3 + arm / 100, 0.2]},
            }
            for arm in range(arms)
        ]
        (axis,) = figure_of(arms_panel(entries, "robust"), height=4).axes
        return axis, learning(entries, "key").blocks[0].pictures[1]

    axis, shown = drawn(8)
    assert [line.get_label() for line in axis.lines] == [f"arm {arm}" for arm in range(8)]
    assert shown.caption.startswith("Lines")
    axis, shown = drawn(9)
    assert [text.get_text() for text in axis.get_yticklabels()] == [f"arm {arm}" for arm in range(9)]
    points = sorted((round(line.get_xdata()[0]), round(line.get_ydata()[0])) for line in axis.lines)
    assert points == sorted([(20, arm) for arm in range(9)] + [(30 + arm, arm) for arm in range(9)])
    assert shown.caption.endswith("The numbers have every epoch.")
    assert len(shown.table.rows) == 3


def test_arms_that_were_validated_under_different_attacks_are_named():
    def entry(arm: str, **recipe):
        return {"arm": arm, "recipe": recipe, "curves": {"clean": [0.5], "robust": [0.3]}}

    alike = [entry("one", validation_steps=3), entry("two", validation_steps=3)]
    other = entry("three", validation_steps=3, threat={"eps": 10 / 255, "step": 5 / 255, "steps": 1})
    far = entry("four", validation_steps=3, threat={"eps": 0.5, "step": 0.1, "norm": "l2"})
    assert validated_how(alike) == ""
    said = validated_how([*alike, other, far])
    assert ". three: PGD-3, linf eps 10/255, step 2.5/255; four: PGD-3, l2 eps 0.5, step 0.1; all others: PGD-3" in said
    assert said.endswith("PGD-3, linf eps 7.65/255, step 1.79/255.")
    clean, robust = learning([*alike, other], "key").blocks[0].pictures
    assert "three: PGD-3" in robust.caption
    assert "PGD" not in clean.caption + learning(alike, "key").blocks[0].pictures[1].caption
