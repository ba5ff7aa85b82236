"""How a figure was measured stands in every result, in the same words wherever it is printed."""

import json
from dataclasses import replace

import pytest
import torch

from clat.attacks import pgd_threat, restarts
from clat.cli.attacking import assumed
from clat.cli.main import main
from clat.data.loading import load_data
from clat.evaluation.evaluate import evaluate
from clat.evaluation.measured import Identity, Measured
from clat.evaluation.sweep import sweep
from clat.evaluation.transfer import transfer
from clat.evaluation.trust import trust
from clat.models import build_model

DATA = ["--data", "fashion-mnist-mini"]
FEW = [*DATA, "--limit", "6", "--batch_size", "3", "--device", "cpu"]


def how(model, data, **keys) -> Measured:
    return Measured.of([model], data, **{"seed": 0, "batch_size": 10, "device": "cpu", **keys})


def test_every_result_says_how_it_was_measured(tiny, plain, blobs):
    few, attacks = blobs.sample(8, 3), restarts(pgd_threat(0.1, 1), seed=4)
    expected = how(tiny, few, seed=4)
    assert expected.images == 8
    assert evaluate(tiny, few, attacks, batch_size=10).measured == expected
    assert sweep(tiny, few, "steps", [1], eps=0.1, seed=4, batch_size=10).measured == expected
    assert trust(tiny, blobs, 0.1, limit=8, seed=3, batch_size=10, checks=[]).measured == replace(expected, seed=3)
    both = transfer({"tiny": tiny, "plain": plain}, few, attacks[0], batch_size=10).measured
    assert both == replace(expected, networks=(Identity.of(tiny), Identity.of(plain)))


def test_what_decides_a_figure_tells_measurements_apart(blobs):
    model = build_model("rn18", 3, channels=1, width=16)
    first = how(model, blobs)
    assert how(model, blobs) == first
    assert how(model, blobs.sample(20)) != first
    for keys in ({"seed": 1}, {"precision": "bf16"}, {"batch_size": 9}, {"device": "meta"}):
        assert how(model, blobs, **keys) != first
        assert str(how(model, blobs, **keys)) != str(first)
    model.to(memory_format=torch.contiguous_format)
    turned = how(model, blobs)
    assert (first.networks[0].layout, turned.networks[0].layout) == ("channels-last", "contiguous")
    assert turned.networks[0].weights == first.networks[0].weights
    assert turned != first


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("evaluate", ["--starts", "1", "--steps", "1"]),
        ("sweep", ["--over_eps", "none", "--over_steps", "1"]),
        ("transfer", ["rn18,width=8,normalise=data", "--steps", "1"]),
        ("trust", ["--budget", "0.3"]),
    ],
)
def test_the_commands_print_it_in_the_same_words(command, keys, tmp_path, capsys):
    found = tmp_path / "found.json"
    assert main([command, "rn18,width=8", *keys, *FEW, "--json", str(found)]) in (0, 1)
    content = json.loads(found.read_text())
    content = content["steps"]["rn18,width=8"] if command == "sweep" else content
    facts = content["measured"]
    measured = Measured(**{**facts, "networks": tuple(Identity(**network) for network in facts["networks"])})
    assert (measured.images, measured.batch_size, measured.device) == (6, 3, "cpu")
    printed = " ".join(capsys.readouterr().out.split())
    assert " ".join(assumed(measured, load_data("fashion-mnist-mini", "test")).split()) in printed


@pytest.mark.parametrize(("count", "images"), [(None, 240), (240, 240), (300, 240), (7, 7)])
def test_a_sample_is_drawn_by_its_seed_and_keeps_the_order(blobs, count, images):
    few = blobs.sample(count, 1)
    assert len(few) == images
    places = [int((blobs.pixels == image).flatten(1).all(1).nonzero()[0]) for image in few.pixels]
    assert places == sorted(set(places))
    assert torch.equal(few.pixels, blobs.sample(count, 1).pixels)
    if images == 7:
        order = torch.randperm(240, generator=torch.Generator().manual_seed(1))
        assert places == sorted(order[:7].tolist())
        assert not torch.equal(few.pixels, blobs.sample(count, 2).pixels)
