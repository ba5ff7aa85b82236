"""Classes of very different sizes are named, and balanced accuracy stands beside accuracy."""

import json

import pytest
import torch
from PIL import Image
from torch import nn

import clat
from clat.attacks import pgd_threat
from clat.cli.main import main
from clat.data.dataset import Dataset
from clat.data.labels import uneven
from clat.evaluation.accuracy import Balanced


class Dark(nn.Module):
    """Calls an image dark (class 0) if its mean is below a half."""

    def forward(self, x):
        light = 100 * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([-light, light], dim=1)


@pytest.fixture
def mostly_dark() -> Dataset:
    """90 dark images, all recognised; 10 light ones, of which 6 look dark."""
    labels = torch.tensor([0] * 90 + [1] * 10)
    light = torch.tensor([0] * 96 + [1] * 4)
    return Dataset(
        (200 * light.view(-1, 1, 1, 1)).expand(-1, 1, 4, 4).to(torch.uint8), labels, ("dark", "light"), "b", "t"
    )


def test_balanced_accuracy_is_the_mean_over_classes(mostly_dark):
    found = clat.evaluate(Dark(), mostly_dark, pgd_threat(0.01, 1))
    assert found.clean.value == 0.94
    assert found.balanced_clean == Balanced((90, 4), (90, 10))
    assert found.balanced_clean.value == pytest.approx((1 + 0.4) / 2)
    assert found.to_json()["balanced_robust"]["accuracy"] == pytest.approx(found.balanced_robust.value)
    assert found.to_json()["balanced_clean"]["classes"] == 2


def test_its_interval_is_that_of_a_stratified_mean_and_is_never_certain():
    low, high = Balanced((50, 50), (100, 100)).interval
    assert (high - low) / 2 == pytest.approx(1.96 * (0.25 / 200) ** 0.5, rel=1e-3)
    low, high = Balanced((3, 2), (3, 2)).interval
    assert low < 0.75
    assert high == 1


def test_it_is_printed_where_classes_differ_much_and_always_in_json(tmp_path, capsys):
    for split, sizes in {"train": (30, 3), "test": (20, 2)}.items():
        for name, count in zip(("cat", "dog"), sizes, strict=True):
            (tmp_path / "uneven" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (8, 8), 10 * i).save(tmp_path / "uneven" / split / name / f"{i}.png")
    evaluated = ["evaluate", "rn18,width=4,normalise=none", "--starts", "1", "--steps", "1"]
    assert main([*evaluated, "--data", str(tmp_path / "uneven"), "--json", str(tmp_path / "found.json")]) == 0
    out, said = capsys.readouterr()
    assert "balanced robust" in out
    assert "differ in size, from 2 images (dog) to 20 (cat)" in " ".join(said.split())
    assert json.loads((tmp_path / "found.json").read_text())["balanced_clean"]["classes"] == 2
    assert (
        main([*evaluated, "--data", "fashion-mnist-mini", "--limit", "5", "--json", str(tmp_path / "even.json")]) == 0
    )
    assert "balanced" not in capsys.readouterr().out
    assert "balanced_robust" in json.loads((tmp_path / "even.json").read_text())


@pytest.mark.parametrize(
    ("counts", "named"), [((20, 20), False), ((1, 3), False), ((40, 20), False), ((41, 20), True), ((0, 10), True)]
)
def test_only_classes_that_differ_much_are_named(counts, named):
    labels = torch.repeat_interleave(torch.arange(2), torch.tensor(counts))
    assert bool(uneven(labels, ("cat", "dog"), "photos")) == named


def test_an_only_class_is_named():
    (said,) = uneven(torch.zeros(3, dtype=torch.int64), ("images",), "photos")
    assert said == "All images of photos are of one class (images)."
