"""Accuracy on clean and on attacked images, with counts and confidence intervals."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clat.attacks import Attack, pgd_threat, restarts
from clat.compute import Precision, autocast, placed, seeded
from clat.data.arrays import as_dataset
from clat.data.dataset import Dataset, to_unit
from clat.errors import InputError
from clat.evaluation.accuracy import Result
from clat.evaluation.fits import check_fits, warn_of_zero_gradients
from clat.evaluation.measured import Measured
from clat.evaluation.record import _State
from clat.inputs import check_least, check_seed, shown
from clat.network import Images, Labels, held, predict
from clat.threat import Threat


@dataclass(frozen=True)
class Progress:
    """How far an evaluation is: attack ``number`` of ``attacks``, ``done`` of its ``total`` images."""

    name: str
    number: int
    attacks: int
    done: int
    total: int
    broken: int


def evaluate(
    model: nn.Module,
    data: Any,
    attacks: Threat | Attack | Sequence[Attack] | None = None,
    *,
    seed: int = 0,
    batch_size: int = 250,
    workers: int = 2,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    record: Path | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Result:
    """Clean accuracy, and robust accuracy as the worst case of each image over all attacks and their random starts.

    An image counts as robust if it is classified correctly clean and after every attack. The attacks run one after the
    other, each on the images that are still correct, so that the order matters for the time and not for the result.

    Args:
        model: takes pixels in [0, 1], returns class scores (batch, classes)
        data: a ``Dataset``, or anything that ``as_dataset`` takes; ``Dataset.sample`` draws some of its images
        attacks: one, or several on one ball; a threat stands for one run of PGD, by default of 20 steps of eps/4 at
            eps 8/255
        seed: of PGD's random start, where ``attacks`` is a threat; other attacks have seeds of their own
        workers: processes that decode images which are not kept in memory
        device: where the network is moved for the call, and then back; default where it is
        record: a folder that keeps a JSON file of each evaluation, written after each batch; one of the same network,
            images and attacks that was interrupted continues from it, and a complete one is read from it:
            ``Result.from_record`` says so. A record has a digest of its content, which finds damage and careless
            edits; it is not a signature: a forged record can have a valid digest. Of several processes that
            a launcher started, only the first keeps records
        progress: is told after each batch
    Raises:
        InputError: images or labels that do not fit the network, attacks on different balls, class scores that are not
            finite or have no gradient, or a record that is damaged or not of this evaluation
    """
    data = as_dataset(data)
    check_seed("seed", seed)
    attacks = _attacks(attacks, seed)
    check_least(1, batch_size=batch_size)
    with placed([model], device) as place:
        check_fits(model, data, place)
        measured = Measured.of(
            [model], data, seed=attacks[0].seed, precision=precision, batch_size=batch_size, device=place
        )
        state = _State.begin(record, measured, attacks, data.labels.tolist())
        data = data.to(place)
        if not state.outcomes:
            state.outcomes = _clean(model, data, batch_size, workers, place, precision)
            state.write()
        for number, attack in enumerate(attacks, 1):
            places = [i for i, outcome in enumerate(state.outcomes) if outcome in (0, number)]
            rest = torch.tensor(places[state.done[number - 1] :], dtype=torch.long)
            batches = data.batches(batch_size, order=rest, workers=workers) if len(rest) else iter(())
            start = time.perf_counter()
            for images, (pixels, y) in zip(rest.split(batch_size) if len(rest) else (), batches, strict=True):
                if not any(state.done):
                    warn_of_zero_gradients(model, to_unit(pixels))
                survived = _survivors(attack, model, to_unit(pixels), y, place, precision)
                for image, right in zip(images.tolist(), survived, strict=True):
                    state.outcomes[image] = 0 if right else number
                state.done[number - 1] += len(images)
                state.seconds[number - 1] += time.perf_counter() - start
                state.write()
                broken = state.outcomes.count(number)
                progress(Progress(attack.name, number, len(attacks), state.done[number - 1], len(places), broken))
                start = time.perf_counter()
    return state.result()


def _attacks(attacks: Threat | Attack | Sequence[Attack] | None, seed: int) -> Sequence[Attack]:
    if attacks is None or isinstance(attacks, Threat):
        return restarts(attacks or pgd_threat("8/255", 20), seed=seed)
    if isinstance(attacks, Attack):
        return (attacks,)
    if not isinstance(attacks, Sequence) or not all(isinstance(each, Attack) for each in attacks):
        raise InputError(
            f"{shown(attacks)} is no attack; give a clat.Threat, or attacks such as clat.attacks.tier makes."
        )
    if not attacks:
        raise InputError("There is no attack to evaluate with.")
    check_one_ball(attacks)
    return attacks


def check_one_ball(attacks: Sequence[Attack]) -> None:
    """Raises InputError unless the attacks share norm and eps."""
    balls = {(attack.threat.radius, attack.threat.norm) for attack in attacks}
    if len(balls) > 1:
        raise InputError(f"The attacks are on different balls ({balls}); evaluate each ball by itself.")


def _clean(
    model: nn.Module, data: Dataset, size: int, workers: int, device: torch.device, precision: Precision
) -> list[int]:
    """-1 for each image that is misclassified, 0 for the others."""
    outcomes: list[int] = []
    for pixels, y in data.batches(size, workers=workers):
        with autocast(device, precision):
            outcomes += (predict(model, to_unit(pixels)) == y).int().sub(1).tolist()
    return outcomes


def _survivors(
    attack: Attack, model: nn.Module, x: Images, y: Labels, device: torch.device, precision: Precision
) -> list[bool]:
    """Which of the images are still classified correctly after the attack."""
    with autocast(device, precision), seeded(attack.seed, device):
        return (predict(model, attacked(attack, model, x, y)) == y).tolist()


def attacked(attack: Attack, model: nn.Module, x: Images, y: Labels) -> Images:
    """The images that an attack makes of x, inside ball and box; the network's state is restored afterwards."""
    with held(model):
        return attack.threat.project(attack.perturb(model, x, y).detach(), x)
