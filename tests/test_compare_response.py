"""Layers that train alone, beside what rankings said of them: planted responses come out."""

from dataclasses import asdict

import numpy as np
import pytest

from clat.compare.file import comparison
from clat.compare.plan import Comparison
from clat.compare.response import layers_alone, starts
from clat.compare.statistics import pack
from clat.report.comparison import layers_alone as section_of

LAYERS = {"a": "conv1", "b": "layer1.0.conv1", "c": "layer2.0.conv1", "d": "layer3.0.conv1", "e": "linear"}
GAINS = {"a": 4, "b": -2, "c": 10, "d": 0, "e": 6}  # images of 100, robust
WEIGHTS = {"a": 400, "b": 900, "c": 100, "d": 800, "e": 200}  # the more, the less it gains


@pytest.fixture
def plan() -> Comparison:
    alone = {
        name: {"recipe": "pgd-at", "from": "base/best", "keys": {"tuner": "critical", "critical": {"layers": [layer]}}}
        for name, layer in LAYERS.items()
    }
    by = {
        "good": {"recipe": "clat", "from": "base/best"},
        "bad": {"recipe": "clat", "from": "base/best", "keys": {"critical": {"norm": "rms"}}},
        "elsewhere": {"recipe": "clat", "from": "base/last"},
    }
    return comparison({
        "question": "Which layer?", "base": {"model": "rn18,width=4", "recipe": "pgd-at"}, "arms": {**alone, **by},
        "evaluation": {"tier": "quick", "images": 100}, "contrasts": [], "seeds": [0, 1],
    })  # fmt: skip


def entries(plan: Comparison) -> list[dict]:
    found = []
    for arm, seed in plan.runs():
        robust = 40 + GAINS.get(arm.name, 0) * (1 if seed == 0 else 0.5)
        outcome = pack(np.arange(100) < robust)
        clean = pack(np.arange(100) < 60)
        entry = {"arm": arm.name, "seed": seed, "selected": [], "evaluations": []}
        entry["trainable"] = WEIGHTS.get(arm.name, 0)
        if arm.name in LAYERS:
            entry["selected"] = [
                {"epoch": 1, "layers": [LAYERS[arm.name]], "measured": dict.fromkeys(LAYERS.values(), 1)}
            ]
        elif arm.name != "base":
            sign = -1 if arm.name == "bad" else 1
            measured = {layer: sign * GAINS[name] for name, layer in LAYERS.items()}
            entry["selected"] = [{"epoch": 1, "layers": ["conv1"], "measured": measured}]
        for checkpoint in arm.evaluated:
            evaluation = asdict(plan.evaluations[0])
            entry["evaluations"].append({"checkpoint": checkpoint, "attack": "PGD-20", "evaluation": evaluation,
                                         "robust_images": outcome, "clean_images": clean})  # fmt: skip
        found.append(entry)
    return found


def test_the_response_is_the_change_from_the_start(plan):
    (start,) = starts(plan, entries(plan))
    assert str(start.side) == "base/best"
    assert start.responses["robust"][0] == pytest.approx({LAYERS[name]: gain for name, gain in GAINS.items()})
    assert start.responses["robust"][1] == pytest.approx({LAYERS[name]: gain / 2 for name, gain in GAINS.items()})
    assert set(start.responses["clean"][0].values()) == {0}
    assert start.alike["robust"] < 1e-4
    assert start.alike["clean"] == 1
    # not the one from another checkpoint, nor the arms themselves
    assert set(start.rankings) == {"good", "bad", "number of weights"}


def test_a_ranking_that_tells_the_response_is_told_from_one_that_does_not(plan):
    text = "\n".join(layers_alone(plan, entries(plan)))
    assert "| `layer2.0.conv1` | +10.0, +5.0 | +0.0, +0.0 |" in text
    assert "| good | 2 | +1.00 (p 0.0" in text
    assert "| bad | 2 | -1.00 (p 0.0" in text
    assert "| number of weights | 2 | -1.00 (p 0.0" in text
    assert "Robust: a difference between these networks is found (Cochran's Q, p " in text
    assert "Clean: no difference between these networks is found (Cochran's Q, p 1)." in text
    assert "robust response between the first two seeds: +1.00" in text


def test_a_seed_that_has_not_trained_all_layers_yet_waits(plan):
    whole = entries(plan)
    started = [entry for entry in whole if entry["seed"] == 0 or entry["arm"] in ("base", "a", "b", "c", "good")]
    first = [entry for entry in whole if entry["seed"] == 0]
    text = "\n".join(layers_alone(plan, started))
    assert "| `conv1` | +4.0, +2.0 |" in text
    assert "| `linear` | +6.0,  |" in text
    (told,) = (line for line in text.splitlines() if line.startswith("| good |"))
    assert told in layers_alone(plan, first)[-1]


def test_layers_are_compared_in_one_order_whatever_the_order_in_which_a_seed_lists_them(plan):
    found = entries(plan)
    expected = layers_alone(plan, found)
    for entry in found:
        if entry["arm"] == "good" and entry["seed"] == 1:
            (selection,) = entry["selected"]
            selection["measured"] = dict(reversed(selection["measured"].items()))
    assert layers_alone(plan, found) == expected


def test_the_page_draws_the_responses_and_lists_the_rankings(plan):
    (start,) = starts(plan, entries(plan))
    section = section_of(start, "key")
    (drawn,), ranked = section.blocks[0].pictures, section.blocks[1]
    assert [(row[0].text, pytest.approx(row[1].value), row[2].value) for row in drawn.table.rows] == [
        (layer, 0.75 * GAINS[name], 0) for name, layer in LAYERS.items()
    ]
    assert "layer2.0.conv1 robust +7.5, clean +0.0" in drawn.alt
    assert [row[0].text for row in ranked.rows] == ["good", "bad", "number of weights"]
    assert section.words[0].startswith("Robust: a difference between these networks is found")


def test_a_comparison_of_recipes_has_no_responses(plan):
    found = [entry for entry in entries(plan) if entry["arm"] not in LAYERS]
    assert layers_alone(plan, found) == []


def test_an_entry_from_before_rankings_were_kept(plan):
    found = entries(plan)
    for entry in found:
        for selection in entry["selected"]:
            del selection["measured"]
    text = "\n".join(layers_alone(plan, found))
    assert "| `conv1` | +4.0, +2.0 |" in text
    assert "| number of weights | 2 |" in text
    assert "good" not in text
