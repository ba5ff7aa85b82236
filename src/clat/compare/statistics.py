"""Is one arm better than another? Paired over images and seeds, with an interval, a p-value and a verdict in words.

An arm is a recipe trained with several seeds. All runs are measured on the same images, so two arms are compared image
by image, seed by seed: what is hard for both cancels out.
"""

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clat.errors import InputError

Outcomes = NDArray[np.bool_]  # True where the answer is right: (images,), or (seeds, images) for an arm

LEVEL = 0.05  # of every test here, and of the intervals: 95 %
RESAMPLES = 10_000  # of a bootstrap
DRAWS = 100_000  # that represent a t or chi-square distribution


def pack(outcomes: Outcomes) -> dict[str, Any]:
    """Outcomes of one run, shape (images,), as JSON: their number ``n``, and eight of them a byte in base64."""
    return {"n": len(outcomes), "bits": base64.b64encode(np.packbits(outcomes).tobytes()).decode("ascii")}


def unpack(packed: Mapping[str, Any]) -> Outcomes:
    """Unpacks what ``pack`` packed, shape (n,). Raises InputError for anything else."""
    try:
        n, bits = packed["n"], base64.b64decode(packed["bits"], validate=True)
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise InputError("Packed outcomes must have n, a number, and bits in base64.") from error
    if type(n) is not int or n < 0 or len(bits) != math.ceil(n / 8):
        raise InputError(f"Packed outcomes say that n is {n!r}, but hold {len(bits)} bytes.")
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=n).astype(bool)


@dataclass(frozen=True)
class McNemar:
    """One seed's pairs: images that only the first arm answers right, that only the second does, and the exact p."""

    first: int
    second: int
    p: float


def mcnemar(first: int, second: int) -> McNemar:
    """McNemar's exact test, two-sided: could each of the images that the arms differ on go either way, one to one?"""
    n, fewer = first + second, min(first, second)
    tail = sum(
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        for k in range(fewer + 1)
    )
    return McNemar(first, second, min(1.0, 2 * tail))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much more often the first of two arms is right, as shares: 0.02 is two points.

    Args:
        mean: over seeds and images
        low, high: ends of the 95 % interval
        p: of no difference, two-sided
        by_seed: the difference of each seed
        seeds: McNemar's test of each seed
        images: how many each seed was measured on
        scattered: the seeds lie further apart than the images explain, so the interval and p come from the seeds alone
    """

    mean: float
    low: float
    high: float
    p: float
    by_seed: tuple[float, ...]
    seeds: tuple[McNemar, ...]
    images: int
    scattered: bool


def paired_difference(a: Outcomes, b: Outcomes, *, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """The difference of two arms, both (seeds, images): row i of both has the same seed, column j the same image.

    The interval comes from a two-way bootstrap: images and seeds are drawn with replacement, independently of one
    another, and the difference is taken over all drawn pairs; its ends are the 2.5 % and 97.5 % quantiles. p is twice
    the share of the resamples on the far side of zero, at least 2 / (resamples + 1). Where the difference of a pair is
    mostly chance of that image and that run, the interval is too wide, by a factor of up to the square root of three
    (Owen 2007, "The pigeonhole bootstrap").

    With few seeds: a bootstrap of two seeds has only three different samples, of three ten. It is right as long as
    other seeds would give about the same. So that is tested first: how far apart are the seeds' differences, against
    chance? Where they lie so far apart that chance does it in only one comparison of 20, each seed counts as one
    measurement, and interval and p are at least those of a t-test over the seeds, which with two seeds finds next to
    nothing. Among so few seeds this test sees only a large scatter. In simulations with two seeds and 4,000 images of
    which the arms differ on 15 %, false alarms stay at 5 % while the seeds scatter as much as the images (0.6 points),
    and reach 15 % at twice that. With one seed the result is about these two networks, not
    about the two recipes.

    Args:
        resamples: of the bootstrap
        seed: of the random numbers
    Raises:
        InputError: arrays of another shape or type
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != bool or b.dtype != bool or a.ndim != 2 or a.shape != b.shape or not a.size:
        raise InputError(
            "Two arms must be bool arrays (seeds, images) of one shape; got "
            f"{a.dtype} {a.shape} and {b.dtype} {b.shape}."
        )
    seeds, images = a.shape
    generator = np.random.default_rng(seed)
    pairs = a.astype(np.int8) - b.astype(np.int8)
    by_seed = pairs.mean(axis=1)
    drawn = _bootstrap(pairs, resamples, generator)
    low, high = np.quantile(drawn, [LEVEL / 2, 1 - LEVEL / 2])
    p = 2 * (1 + min((drawn <= 0).sum(), (drawn >= 0).sum())) / (resamples + 1)
    scattered = _scattered(pairs, generator)
    if scattered:
        error = by_seed.std(ddof=1) / math.sqrt(seeds)
        t = np.abs(generator.standard_t(seeds - 1, DRAWS))
        reach = error * np.quantile(t, 1 - LEVEL)
        low, high = min(low, by_seed.mean() - reach), max(high, by_seed.mean() + reach)
        p = max(p, (t >= abs(by_seed.mean()) / error).mean())
    tests = [mcnemar(int((row > 0).sum()), int((row < 0).sum())) for row in pairs]
    return Difference(
        mean=float(by_seed.mean()),
        low=float(low),
        high=float(high),
        p=min(1.0, float(p)),
        by_seed=tuple(by_seed.tolist()),
        seeds=tuple(tests),
        images=images,
        scattered=scattered,
    )


def _bootstrap(pairs: NDArray[np.int8], resamples: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """The mean of (seeds, images) in each resample.

    Images with the same values for all seeds are alike, so only how many of each kind are drawn is drawn.
    """
    seeds, images = pairs.shape
    code = 3 ** np.arange(seeds) @ pairs.astype(np.int64)
    _, first, counts = np.unique(code, return_index=True, return_counts=True)
    kinds = pairs[:, first]
    of_kinds = generator.multinomial(images, counts / images, size=resamples)
    of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    return (of_kinds @ kinds.T.astype(float) * of_seeds).sum(axis=1) / (seeds * images)


def _scattered(pairs: NDArray[np.int8], generator: np.random.Generator) -> bool:
    """Whether the seeds' means lie further apart than chance, by two-way analysis of variance without replication."""
    seeds, images = pairs.shape
    if seeds == 1:
        return False
    by_seed, by_image = pairs.mean(axis=1, keepdims=True), pairs.mean(axis=0, keepdims=True)
    rest = ((pairs - by_seed - by_image + pairs.mean()) ** 2).sum() / max(1, (seeds - 1) * (images - 1))
    between = images * seeds * by_seed.var()
    return bool(between > 0 and (generator.chisquare(seeds - 1, DRAWS) * rest >= between).mean() < LEVEL)


def holm(p: Sequence[float]) -> list[float]:
    """P-values corrected for their number, in the same order (Holm 1979).

    The smallest of m counts m times, the next m - 1 times and so on, none less than the one before: among those below
    0.05 afterwards, the chance that any is a false alarm is at most 5 %.
    """
    corrected, largest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        corrected[place] = largest
    return corrected


def cochran(seeds: Sequence[NDArray[np.bool_]]) -> float:
    """Cochran's Q test: p of several networks being right equally often on the same images, seeds together.

    Args:
        seeds: one array for each seed, (networks, images), True where a network is right
    """
    q = freedom = 0.0
    for right in seeds:
        networks, hits = len(right), right.sum(0)  # (images,): how many networks are right
        disagreement = (hits * (networks - hits)).sum()
        if disagreement:
            each = right.sum(1)
            q += networks * (networks - 1) * ((each - each.mean()) ** 2).sum() / disagreement
            freedom += networks - 1
    return torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(q / 2)).item() if freedom else 1.0


@dataclass(frozen=True)
class Contrast:
    """Two arms, their difference, and its p among all contrasts of the comparison."""

    first: str
    second: str
    difference: Difference
    p: float

    @property
    def found(self) -> bool:
        return self.p <= LEVEL

    @property
    def noise(self) -> str:
        """What a difference that was not found lies inside: with many contrasts, some intervals miss 0 by chance."""
        alone = self.difference.low <= 0 <= self.difference.high
        return "inside noise" if alone else "inside the noise of so many contrasts"

    def __str__(self) -> str:
        """The verdict in words: "A is better than B by 1.3 points [0.4, 2.2]", for example."""
        found = self.difference
        sign, better, worse = (1, self.first, self.second) if found.mean >= 0 else (-1, self.second, self.first)
        low, high = sorted(100 * sign * end + 0.0 for end in (found.low, found.high))
        points = f"{100 * abs(found.mean):.1f} points [{low:.1f}, {high:.1f}]"
        if self.found:
            text = f"{better} is better than {worse} by {points}"
        else:
            text = f"no difference found between {self.first} and {self.second} ({better} +{points}, {self.noise})"
        if len(found.seeds) == 1:
            return f"{text}; one seed, so another may say otherwise"
        return f"{text}; the seeds differ by more than chance, run more of them" if found.scattered else text


def contrasts(differences: Mapping[tuple[str, str], Difference], among: int = 0) -> list[Contrast]:
    """A verdict on each pair of arms, corrected for the number of contrasts.

    Args:
        among: how many were fixed beforehand, if some have no difference yet; these count as p = 1, so that a
            difference that was found stays found when they are answered
    """
    waiting = [1.0] * (among - len(differences))
    corrected = holm([difference.p for difference in differences.values()] + waiting)
    return [Contrast(*arms, found, p) for (arms, found), p in zip(differences.items(), corrected, strict=False)]


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation, the mean over seeds, and p: how often shuffled layers correlate as much."""

    mean: float
    p: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.2f} (p {self.p:.2g})" if self.seeds else "not measured"


def rank_correlation(
    pairs: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], *, shuffles: int = RESAMPLES, seed: int = 0
) -> RankCorrelation:
    """How much two measures of the same layers agree on their order.

    All seeds are shuffled alike, because a layer that differs from others does so with every seed.

    Args:
        pairs: for each seed two arrays (layers,), of the same layers in the same order for every seed
    Raises:
        InputError: arrays of different lengths
    """
    if not pairs:
        return RankCorrelation(math.nan, math.nan, 0)
    if len({len(values) for pair in pairs for values in pair}) > 1:
        raise InputError("A rank correlation needs the same layers in both measures and with every seed.")
    first, second = (np.stack([_standard_ranks(pair[side]) for pair in pairs]) for side in (0, 1))
    found = float((first * second).sum(1).mean())
    generator = np.random.default_rng(seed)
    orders = (generator.permutation(first.shape[1]) for _ in range(shuffles))
    beyond = sum(abs((first * second[:, order]).sum(1).mean()) >= abs(found) - 1e-12 for order in orders)
    return RankCorrelation(found, (beyond + 1) / (shuffles + 1), len(pairs))


def _standard_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks, of equal values their mean, moved and scaled so that the product of two is their correlation."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    ranks = ranks - ranks.mean()
    return ranks / max(float(np.linalg.norm(ranks)), 1e-12)


def power(
    difference: float,
    images: int,
    seeds: int,
    disagreement: float,
    *,
    scatter: float = 0.0,
    shared: float = 0.5,
    contrasts: int = 1,
    repeats: int = 200,
    seed: int = 0,
) -> float:
    """The chance that a true difference is found, by simulating the comparison.

    Args:
        difference: by how much the first arm is right more often, as a share of the images; 0 gives the false alarms
        images, seeds: of each arm
        disagreement: share of the images on which the arms differ, one seed each
        scatter: standard deviation of the true difference from seed to seed
        shared: share of the images whose outcome is the same for every seed, so that more seeds say no more about it
        contrasts: how many there are in the comparison; a difference must then be found at 0.05 / contrasts
        repeats: simulated comparisons; the standard error of the result is at most 0.5 / sqrt(repeats)
        seed: of the random numbers
    Raises:
        InputError: a difference larger than the disagreement, or shares outside 0 to 1
    """
    if not (abs(difference) <= disagreement <= 1 and 0 <= shared <= 1):
        raise InputError(
            f"The arms cannot differ by {difference} where they disagree on {disagreement} of the images; both, and "
            "shared, are shares between 0 and 1."
        )
    generator = np.random.default_rng(seed)
    found = 0
    for repeat in range(repeats):
        a, b = simulated(difference, images, seeds, disagreement, generator, scatter=scatter, shared=shared)
        result = paired_difference(a, b, resamples=1_000, seed=repeat)
        found += result.p <= LEVEL / contrasts and result.mean * difference >= 0
    return found / repeats


def simulated(
    difference: float,
    images: int,
    seeds: int,
    disagreement: float,
    generator: np.random.Generator,
    *,
    scatter: float = 0.0,
    shared: float = 0.5,
) -> tuple[Outcomes, Outcomes]:
    """Outcomes of two arms as ``power`` describes them, both (seeds, images)."""
    true = generator.normal(difference, scatter, (seeds, 1)).clip(-disagreement, disagreement)
    place = generator.random((seeds, images))
    place = np.where(generator.random(images) < shared, place[:1], place)
    first = place < (disagreement + true) / 2
    second = ~first & (place < disagreement)
    both = (place >= disagreement) & (place < (1 + disagreement) / 2)
    return first | both, second | both
