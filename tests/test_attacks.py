"""The tiers on networks of few classes, against closed forms; evaluations that are interrupted, complete or damaged."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from clat.attacks import (
    apgd_ce,
    apgd_targeted,
    autoattack,
    fab_targeted,
    pgd_threat,
    restarts,
    square,
    square_takes,
    tier,
)
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.evaluation.evaluate import evaluate

EPS = 8 / 255


def linear(classes: int) -> nn.Module:
    torch.manual_seed(classes)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


def known_images(model: nn.Module, count: int) -> tuple[Dataset, list[bool]]:
    """Images for a linear network, far from the box, and which of them are robust under linf: this is known exactly.

    The weights of j less those of the label, times a perturbation of the ball, come to eps times their l1 norm at most.
    Every second one is robust, none is on the border, and the first is misclassified clean.
    """
    weight, found, robust = model[1].weight.detach(), [], []
    generator = torch.Generator().manual_seed(0)
    while len(found) < count:
        pixels = torch.randint(40, 216, (1, 1, 8, 8), dtype=torch.uint8, generator=generator)
        with torch.no_grad():
            scores = model(pixels.float() / 255)[0]
        label = int(scores.argmax())
        reach = scores - scores[label] + EPS * (weight - weight[label]).abs().sum(1)
        reach[label] = -torch.inf
        withstands = len(found) % 2 == 1
        if abs(float(reach.max())) > 0.01 and (float(reach.max()) < 0) == withstands:
            found.append((pixels, label if found else (label + 1) % len(weight)))
            robust.append(withstands)
    labels = torch.tensor([label for _, label in found])
    names = tuple(map(str, range(len(weight))))
    return Dataset(torch.cat([pixels for pixels, _ in found]), labels, names, "noise", "test"), robust


def interrupt_at(batch: int):
    """What interrupts an evaluation once this many of its batches are written."""
    seen = []

    def progress(now):
        seen.append(now)
        if len(seen) == batch:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("name", ["quick", "standard", "full"])
def test_few_classes_in_closed_form(name, classes, tmp_path):
    """Each evaluation is killed after every batch and goes on from its record."""
    model = linear(classes)
    data, robust = known_images(model, 6)
    attacks, kills = tier(name, EPS, classes).attacks, 0
    while True:
        try:
            result = evaluate(model, data, attacks, batch_size=3, record=tmp_path, progress=interrupt_at(1))
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills == sum(-(-attack.attacked // 3) for attack in result.attacks)
    withstood = [outcome == 0 for outcome in result.outcomes]
    assert result.outcomes[0] == -1
    if name == "quick":  # the cross-entropy leads PGD to one of several classes, which need not be the nearest
        assert all(found or not known for found, known in zip(withstood, robust, strict=True))
    else:
        assert withstood == robust
    notes = {attack.name: attack.note for attack in result.attacks}
    if name != "quick":
        few = f"{classes - 1} of 9 targets, as there are {classes} classes"
        margin = "; margin loss, as the targeted DLR loss needs 4 classes"
        assert notes["APGD-T"] == (few if classes == 4 else few + margin)
    if name == "full":
        assert list(notes) == ["APGD-CE", "APGD-T", "FAB-T", "Square"]
        assert notes["FAB-T"] == few
        assert notes["APGD-CE"] == notes["Square"] == ""


def test_ten_classes_need_no_note():
    assert {attack.note for name in ("quick", "standard", "full") for attack in tier(name, EPS, 10).attacks} == {""}
    with pytest.raises(InputError, match="quick, standard, full, blackbox"):
        tier("fast", EPS, 10)


def test_the_margin_attack_of_two_classes_finds_what_pgd_finds():
    """Alone, without the cross-entropy before it."""
    model = linear(2)
    data, robust = known_images(model, 6)
    for attack in (apgd_targeted(EPS, 2), fab_targeted(EPS, 2)):
        assert [outcome == 0 for outcome in evaluate(model, data, [attack]).outcomes] == robust


@pytest.fixture
def short(blobs):
    """A network, images and four kinds of attacks, each of which breaks some and leaves some."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    with torch.no_grad():
        labels = model(blobs.pixels.float() / 255).argmax(1)
    data = replace(blobs, labels=labels).subset(torch.arange(40))
    eps = 0.01
    attacks = [
        *restarts(pgd_threat(eps, 1), 2),
        apgd_ce(eps, steps=3),
        apgd_targeted(eps, 3, steps=5),
        square(eps, queries=20),
    ]
    return model, data, attacks


def test_interrupted_evaluations_end_as_uninterrupted_ones(short, tmp_path):
    model, data, attacks = short
    batches = []
    whole = evaluate(model, data, attacks, batch_size=7, progress=batches.append)
    assert set(whole.outcomes) >= {0, 1, 3}
    for kills in ((1,), (4, 2), (6, 1, 1), (9, 3), (len(batches),)):
        record, rest = tmp_path / str(kills), []
        for batch in kills:
            with pytest.raises(KeyboardInterrupt):
                evaluate(model, data, attacks, batch_size=7, record=record, progress=interrupt_at(batch))
        resumed = evaluate(model, data, attacks, batch_size=7, record=record, progress=rest.append)
        assert resumed.outcomes == whole.outcomes
        assert (resumed.clean, resumed.robust, resumed.measured) == (whole.clean, whole.robust, whole.measured)
        assert [(a.attacked, a.broken) for a in resumed.attacks] == [(a.attacked, a.broken) for a in whole.attacks]
        assert len(rest) == len(batches) - sum(kills)  # nothing is done again


def never(*_):
    raise AssertionError("a complete evaluation runs no attack")


def test_a_complete_record_is_read(short, tmp_path):
    model, data, attacks = short
    found = evaluate(model, data, attacks, record=tmp_path)
    inert = [replace(attack, perturb=never) for attack in attacks]
    assert evaluate(model, data, inert, record=tmp_path) == found
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["result"]["robust"]["correct"] == found.robust.correct


@pytest.mark.parametrize("what", ["seed", "images", "attack", "weights", "data", "batch", "precision"])
def test_another_evaluation_has_another_record(what, short, tmp_path):
    model, data, attacks = short
    keys = {"precision": {"precision": "bf16"}, "batch": {"batch_size": 7}}.get(what, {})
    evaluate(model, data, attacks, record=tmp_path)
    if what == "seed":
        attacks = [replace(attack, seed=attack.seed + 9) for attack in attacks]
    if what == "images":
        data = data.sample(20)
    if what == "attack":
        attacks = [*attacks[:-1], square(0.01, queries=21)]
    if what == "weights":
        model[1].bias.data[0] += 1e-3
    if what == "data":
        data.pixels[0, 0, 0, 0] += 1
    evaluate(model, data, attacks, record=tmp_path, **keys)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"state": {}}', '{"state": {"done": 3}}', "\x00\xff"])
def test_a_damaged_record_is_refused(content, short, tmp_path):
    model, data, attacks = short
    evaluate(model, data, attacks, record=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="is not the record of an evaluation; remove it, or") as refusal:
        evaluate(model, data, attacks, record=tmp_path)
    assert str(file) in str(refusal.value)


def test_attacks_on_different_balls_are_refused(short):
    model, data, _ = short
    for attacks in (
        [*restarts(pgd_threat(0.1, 1)), *restarts(pgd_threat(0.2, 1))],
        [apgd_ce(0.1, "linf"), apgd_ce(0.1, "l2")],
        [*autoattack(0.1, 3), square(0.05)],
    ):
        with pytest.raises(InputError, match="different balls"):
            evaluate(model, data, attacks)
    with pytest.raises(InputError, match="no attack"):
        evaluate(model, data, [])


@pytest.mark.parametrize("edge", [4, 5, 8, 9, 10, 12, 14, 16, 18, 19, 20, 24, 28, 32, 64])
def test_l2_square_says_which_images_it_does_not_take(edge, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(edge**2, 3))
    attack, x = square(0.5, "l2", queries=10), torch.rand(2, 1, edge, edge)
    y = model(x).argmax(1)
    works = edge not in (4, 12, 14, 18, 19, 24)
    assert square_takes(edge, "l2") == works
    if works:
        assert attack.perturb(model, x, y).shape == x.shape
    else:
        with pytest.raises(InputError, match=f"images of {edge} pixels"):
            attack.perturb(model, x, y)
        monkeypatch.setattr("clat.attacks.auto.square_takes", lambda *_: True)
        with pytest.raises((RuntimeError, ZeroDivisionError)):  # of pyautoattack: if it takes them, so may we
            attack.perturb(model, x, y)
    assert square_takes(edge, "linf")
