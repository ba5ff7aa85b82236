"""The statistics of a comparison: by hand, on planted differences, and on arms that differ in nothing."""

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clat.compare.statistics import (
    Difference,
    cochran,
    contrasts,
    holm,
    mcnemar,
    pack,
    paired_difference,
    power,
    rank_correlation,
    simulated,
    unpack,
)
from clat.errors import InputError


@given(st.lists(st.booleans(), max_size=70))
def test_outcomes_come_back_as_they_were_packed(outcomes):
    packed = pack(np.array(outcomes, bool))
    assert unpack(packed).tolist() == outcomes
    assert len(packed["bits"]) <= 4 * math.ceil(math.ceil(len(outcomes) / 8) / 3)


@pytest.mark.parametrize(
    "packed",
    [
        None,
        {"n": 8},
        {"n": 8, "bits": "no base64"},
        {"n": 8, "bits": 3},
        {"n": 9, "bits": "AA=="},
        {"n": -1, "bits": ""},
        {"n": True, "bits": "AA=="},
        {"n": "8", "bits": "AA=="},
    ],
)
def test_what_was_not_packed_is_refused(packed):
    with pytest.raises(InputError, match="Packed outcomes"):
        unpack(packed)


def test_mcnemar_by_hand():
    # Of 6 images that the arms differ on, 1 or fewer go one way in (1 + 6) of 64 cases; twice that, for both sides.
    assert mcnemar(5, 1).p == pytest.approx(2 * 7 / 64)
    assert mcnemar(1, 5).p == mcnemar(5, 1).p
    assert mcnemar(10, 0).p == pytest.approx(2 / 1024)
    assert mcnemar(4, 4).p == 1
    assert mcnemar(0, 0).p == 1
    assert mcnemar(1500, 1300).p == pytest.approx(math.erfc(199 / math.sqrt(2 * 2800)), rel=0.01)  # large numbers


def test_holm_by_hand():
    # 0.01 x 4, 0.02 x 3, 0.03 x 2, and 0.04 x 1, which may not be less than the one before.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


def test_the_difference_is_that_of_the_accuracies_and_is_the_same_each_time():
    a, b = simulated(0.05, 500, 3, 0.2, np.random.default_rng(0))
    found = paired_difference(a, b)
    assert found.mean == pytest.approx(a.mean() - b.mean())
    assert found.by_seed == pytest.approx(tuple(a.mean(1) - b.mean(1)))
    assert [(s.first, s.second) for s in found.seeds] == [
        ((x & ~y).sum(), (y & ~x).sum()) for x, y in zip(a, b, strict=True)
    ]
    assert found == paired_difference(a, b)
    swapped = paired_difference(b, a)
    assert swapped.mean == -found.mean
    assert swapped.low == pytest.approx(-found.high, abs=0.003)


def test_the_bootstrap_is_that_of_rows_and_columns_drawn_one_by_one():
    a, b = simulated(0.05, 60, 3, 0.4, np.random.default_rng(1), scatter=0.05)
    pairs, generator = a.astype(float) - b, np.random.default_rng(2)
    drawn = [
        pairs[np.ix_(generator.integers(3, size=3), generator.integers(60, size=60))].mean() for _ in range(10_000)
    ]
    found = paired_difference(a, b)
    assert not found.scattered
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.006)


def test_images_alone_decide_where_there_is_one_seed():
    a, b = simulated(0.02, 4000, 1, 0.15, np.random.default_rng(0))
    found = paired_difference(a, b)
    error = math.sqrt((a ^ b).mean() - found.mean**2) / math.sqrt(4000)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    (seed,) = found.seeds
    assert found.p == pytest.approx(seed.p, abs=0.01)


def most(rate: float, repeats: int) -> float:
    """Successes in so many repeats that a rate stays below in 999 of 1,000 cases."""
    return rate * repeats + 3.1 * math.sqrt(rate * (1 - rate) * repeats)


@pytest.mark.parametrize(("seeds", "scatter"), [(1, 0), (2, 0), (3, 0), (5, 0), (2, 0.005), (3, 0.005), (5, 0.005)])
def test_arms_that_differ_in_nothing_come_out_as_no_difference(seeds, scatter):
    rate = power(0, 1500, seeds, 0.15, scatter=scatter, repeats=200)
    assert 200 * rate <= most(0.05, 200)
    if seeds == 1:
        assert rate > 0  # with one seed the test is exact; one that never finds anything would pass the line above


def test_two_points_are_found_with_the_power_that_images_and_seeds_allow():
    def chance(**keys):
        return power(**{"difference": 0.02, "images": 4000, "seeds": 3, "disagreement": 0.15, "repeats": 100, **keys})

    assert chance() >= 0.85
    one = chance(seeds=1, shared=0, repeats=300)
    z = 0.02 / math.sqrt(0.15 / 4000) - 1.96  # one seed is a test of one proportion
    assert one == pytest.approx(0.5 * math.erfc(-z / math.sqrt(2)), abs=0.08)
    assert chance(images=400) < 0.5
    assert chance(contrasts=20) < chance() + 0.02
    assert chance(seeds=2, scatter=0.02) < 0.6 < chance(seeds=2)


def test_seeds_that_lie_far_apart_count_as_one_measurement_each():
    generator = np.random.default_rng(0)
    parts = [simulated(difference, 2000, 1, 0.2, generator) for difference in (0.10, 0.02)]
    a, b = (np.concatenate(rows) for rows in zip(*parts, strict=True))
    found = paired_difference(a, b)
    assert found.scattered
    error = abs(found.by_seed[0] - found.by_seed[1]) / 2
    assert found.high - found.mean == pytest.approx(12.706 * error, rel=0.03)  # t of one degree of freedom
    assert found.p == pytest.approx(1 - 2 / math.pi * math.atan(found.mean / error), abs=0.01)
    assert all(seed.p < 0.1 for seed in found.seeds)


def made(mean, low, high, p, seeds=2, scattered=False) -> Difference:
    tests = (mcnemar(3, 1),) * seeds
    by_seed = (mean,) * seeds
    return Difference(mean=mean, low=low, high=high, p=p, by_seed=by_seed, seeds=tests, images=100, scattered=scattered)


def test_contrasts_that_wait_are_counted_so_that_a_found_difference_stays_found():
    early = {("A", "B"): made(0.02, 0.01, 0.03, 0.01), ("B", "C"): made(0.02, 0.01, 0.03, 0.03)}
    late = {**early, ("C", "D"): made(0.03, 0.02, 0.04, 0.001), ("D", "E"): made(0, -0.01, 0.01, 1.0)}
    assert [contrast.p for contrast in contrasts(early)] == pytest.approx([0.02, 0.03])
    assert [contrast.p for contrast in contrasts(early, among=4)] == pytest.approx([0.04, 0.09])
    assert [contrast.p for contrast in contrasts(late, among=4)] == pytest.approx([0.03, 0.06, 0.004, 1.0])
    assert [contrast.found for contrast in contrasts(late, among=4)] == [True, False, True, False]


def test_verdicts_in_words():
    found = contrasts(
        {
            ("A", "B"): made(0.013, 0.004, 0.022, 0.001),
            ("B", "C"): made(-0.013, -0.022, -0.004, 0.001),
            ("A", "C"): made(0.002, -0.005, 0.009, 0.6),
            ("C", "D"): made(0.02, 0.001, 0.039, 0.04),
            ("D", "E"): made(0.03, 0.01, 0.05, 0.001, seeds=1),
            ("E", "F"): made(0.03, -0.01, 0.07, 0.2, scattered=True),
        }
    )
    assert [str(contrast) for contrast in found] == [
        "A is better than B by 1.3 points [0.4, 2.2]",
        "C is better than B by 1.3 points [0.4, 2.2]",
        "no difference found between A and C (A +0.2 points [-0.5, 0.9], inside noise)",
        "no difference found between C and D (C +2.0 points [0.1, 3.9], inside the noise of so many contrasts)",
        "D is better than E by 3.0 points [1.0, 5.0]; one seed, so another may say otherwise",
        "no difference found between E and F (E +3.0 points [-1.0, 7.0], inside noise); the seeds differ by more than "
        "chance, run more of them",
    ]
    assert [contrast.p for contrast in found] == pytest.approx([0.006, 0.006, 0.6, 0.12, 0.006, 0.4])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.ones((2, 5), bool), np.ones((3, 5), bool)),
        (np.ones(5, bool), np.ones(5, bool)),
        (np.ones((2, 5)), np.ones((2, 5))),
        (np.ones((2, 0), bool), np.ones((2, 0), bool)),
    ],
)
def test_arms_that_cannot_be_paired_are_refused(a, b):
    with pytest.raises(InputError, match="seeds, images"):
        paired_difference(a, b)


@pytest.mark.parametrize(("difference", "disagreement", "shared"), [(0.2, 0.1, 0.5), (0.1, 2, 0.5), (0.1, 0.2, 2)])
def test_impossible_plans_are_refused(difference, disagreement, shared):
    with pytest.raises(InputError, match="cannot differ"):
        power(difference, 100, 2, disagreement, shared=shared)


def test_a_rank_correlation_is_that_of_the_book():
    """By hand: ranks 1 2 3 4 5 and 2 1 4 3 5 differ by 1 four times, so rho = 1 - 6 * 4 / (5 * 24) = 0.8."""
    first, second = np.array([10.0, 20, 30, 40, 50]), np.array([0.2, 0.1, 7, 3, 9])
    found = rank_correlation([(first, second)])
    assert found.mean == pytest.approx(0.8)
    exact = [abs(1 - 6 * sum((a - b) ** 2 for a, b in enumerate(order)) / 120) for order in permutations(range(5))]
    assert found.p == pytest.approx(np.mean(np.array(exact) >= 0.8 - 1e-9), abs=0.02)
    both = rank_correlation([(first, second), (first, -second)])
    assert both.mean == pytest.approx(0)
    assert both.p == 1
    ties = rank_correlation([(np.array([1.0, 1, 2]), np.array([5.0, 5, 9]))])
    assert ties.mean == pytest.approx(1)
    with pytest.raises(InputError, match="the same layers"):
        rank_correlation([(first, second[:4])])


@pytest.mark.parametrize(("gain", "low", "high"), [(0.0, 0.2, 1.0), (0.06, 0.001, 0.2), (0.25, 0.0, 1e-6)])
def test_cochrans_q_is_the_share_of_shuffles_within_images(gain, low, high):
    """Networks that agree on most images; one of them gains on some."""
    generator = np.random.default_rng(1)
    easy = generator.random(400) < 0.5
    right = np.stack([np.where(generator.random(400) < 0.2, generator.random(400) < 0.5, easy) for _ in range(5)])
    right[2] |= generator.random(400) < gain
    p = cochran([right])
    assert low <= p <= high
    spread = right.sum(1).var()
    shuffled = (generator.permuted(right, axis=0).sum(1).var() for _ in range(2000))
    assert p == pytest.approx(np.mean([each >= spread - 1e-9 for each in shuffled]), abs=0.03)


def test_cochrans_q_of_two_networks_is_mcnemars_without_correction_and_seeds_add_up():
    right = np.array([[True] * 30 + [False] * 12 + [True] * 5, [True] * 30 + [True] * 12 + [False] * 5])
    chi_square = (12 - 5) ** 2 / (12 + 5)
    assert cochran([right]) == pytest.approx(math.erfc(math.sqrt(chi_square / 2)), rel=1e-4)
    assert cochran([right, right]) == pytest.approx(math.exp(-chi_square), rel=1e-4)  # 2 degrees of freedom
    assert cochran([right[:, :30]]) == cochran([]) == 1.0
