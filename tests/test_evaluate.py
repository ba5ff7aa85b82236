"""Accuracies, their intervals, and what is refused."""

import pytest
import torch
from torch import nn

from clat.attacks import pgd_threat
from clat.data.dataset import Dataset
from clat.errors import InputError
from clat.evaluation.accuracy import Accuracy
from clat.evaluation.evaluate import evaluate
from clat.network import same_bits, snapshot


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [  # from statsmodels 0.14, proportion_confint(method="wilson")
        (0, 10, 0.0, 0.277533),
        (5, 10, 0.236593, 0.763407),
        (10, 10, 0.722467, 1.0),
        (4321, 5000, 0.854432, 0.873421),
    ],
)
def test_wilson_interval(correct, n, low, high):
    assert Accuracy(correct, n).interval == pytest.approx((low, high), abs=1e-5)


class Brightness(nn.Module):
    """Class 1 if the mean pixel is above a half: robust accuracy under linf is known in closed form."""

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], 1) * 10


def brightness(levels, labels) -> Dataset:
    pixels = torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    return Dataset(pixels, torch.tensor(labels), ("dark", "bright"), "levels", "test")


def test_robust_accuracy_in_closed_form():
    data = brightness([100, 115, 125, 130, 135, 150, 200], [0, 0, 0, 1, 1, 1, 0])
    result = evaluate(Brightness(), data, pgd_threat("8/255", 10), batch_size=3)
    assert result.clean.correct == 6
    assert result.robust.correct == 3  # those at least 8 grey levels from 127.5: 100, 115, 150
    assert result.clean.n == 7


def test_the_same_seed_gives_the_same_result_and_leaves_the_global_generator(tiny, blobs):
    torch.manual_seed(7)
    first = evaluate(tiny, blobs.sample(60, 1), pgd_threat(0.1, 2), seed=1)
    after = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), after)
    second = evaluate(tiny, blobs.sample(60, 1), pgd_threat(0.1, 2), seed=1)
    assert (first.clean, first.robust, first.measured) == (second.clean, second.robust, second.measured)


def test_the_network_is_untouched(plain, blobs):
    before = snapshot(plain)
    plain.train()
    evaluate(plain, blobs.sample(20), pgd_threat(0.1, 2))
    assert plain.training
    assert all(same_bits(tensor, before[name]) for name, tensor in snapshot(plain).items())


def test_what_does_not_fit_is_refused(tiny, blobs):
    with pytest.raises(InputError, match="3 outputs"):
        evaluate(tiny, Dataset(blobs.pixels, blobs.labels, ("a",) * 5, "five", "test"))
    with pytest.raises(InputError, match="2x12x12"):
        evaluate(nn.Sequential(nn.Conv2d(1, 3, 12), nn.Flatten()), Dataset(
            blobs.pixels.repeat(1, 2, 1, 1), blobs.labels, blobs.classes, "two channels", "test"))  # fmt: skip
    with pytest.raises(InputError, match="1 or more"):
        evaluate(tiny, blobs, batch_size=0)
