"""Black-box robustness: images attacked on one network, measured on others (Table 2 of the paper)."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from clat.attacks import Attack, pgd_threat, restarts
from clat.compute import Precision, autocast, placed, seeded
from clat.data.arrays import as_dataset
from clat.data.dataset import to_unit
from clat.errors import InputError
from clat.evaluation.accuracy import TOLERATED, Accuracy
from clat.evaluation.evaluate import Progress, attacked, check_one_ball
from clat.evaluation.fits import check_all_fit, warn_of_zero_gradients
from clat.evaluation.measured import Measured
from clat.inputs import check_least
from clat.network import predict
from clat.threat import Threat


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """The result of ``transfer``, and all that is needed to reproduce it.

    Accuracies are over all images, as in Table 2: also those that a network misclassifies clean are attacked and count.
    ``clean`` has one for each network; ``attacked[i][j]`` is network j's on the images made on network i, so that the
    diagonal is white-box.
    """

    networks: tuple[str, ...]
    clean: tuple[Accuracy, ...]
    attacked: tuple[tuple[Accuracy, ...], ...]
    attack: str
    settings: tuple[dict[str, Any], ...]  # of the attack on each network
    eps: float
    norm: str
    seeds: tuple[int, ...]  # of the attack on each network
    measured: Measured
    seconds: float

    @property
    def stronger(self) -> list[tuple[str, str]]:
        """(source, target) where the source's images fool the target clearly more than the target's own do.

        Attacks on the network itself should be the strongest: where they are not, they failed, as under gradient
        masking.
        """
        places = range(len(self.networks))
        return [
            (self.networks[i], self.networks[j])
            for i in places
            for j in places
            if self.attacked[j][j].value - self.attacked[i][j].value > TOLERATED
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "clean": [accuracy.to_json() for accuracy in self.clean],
            "attacked": [[accuracy.to_json() for accuracy in row] for row in self.attacked],
            "stronger": self.stronger,
        }


def transfer(
    models: Mapping[str, nn.Module],
    data: Any,
    attacks: Threat | Attack | Sequence[Attack] | None = None,
    *,
    batch_size: int = 250,
    workers: int = 2,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    progress: Callable[[Progress], None] = lambda _: None,
) -> Transfer:
    """The accuracy of every network on the images attacked on every network.

    Args:
        models: at least two by name; each takes pixels in [0, 1] and returns class scores (batch, classes)
        data: a ``Dataset``, or anything that ``as_dataset`` takes; ``Dataset.sample`` draws some of its images
        attacks: one for all networks, by default PGD-20 with a random start at eps 8/255, or one for each; a threat
            stands for PGD from a random start
        workers: processes that decode images which are not kept in memory
        device: where the networks are moved for the call, and then back; default where the first one is
        progress: is told after each batch
    Raises:
        InputError: fewer than two networks, one that does not take the images or tells other classes apart, or not one
            attack a network, all on one ball

    Source: Table 2 and "Black-box robustness" in Section 4.2 of the paper.
    """
    data = as_dataset(data)
    if not isinstance(models, Mapping) or len(models) < 2:
        raise InputError("Give at least two networks by name, {'base': model, ...}; images of one are measured on all.")
    if attacks is None or isinstance(attacks, Threat):
        attacks = restarts(attacks or pgd_threat("8/255", 20))[0]
    each = [attacks] * len(models) if isinstance(attacks, Attack) else attacks
    if len(each) != len(models):
        raise InputError(f"There are {len(models)} networks and {len(each)} attacks; give one attack a network.")
    check_one_ball(each)
    check_least(1, batch_size=batch_size)
    start = time.perf_counter()
    clean = [0] * len(models)
    right = [[0] * len(models) for _ in models]
    with placed(list(models.values()), device) as place:
        check_all_fit(models, data, place)
        measured = Measured.of(
            list(models.values()),
            data,
            seed=each[0].seed,
            precision=precision,
            batch_size=batch_size,
            device=place,
        )
        on_device = data.to(place)
        for i, ((name, model), attack) in enumerate(zip(models.items(), each, strict=True)):
            done = 0
            for pixels, y in on_device.batches(batch_size, workers=workers):
                x = to_unit(pixels)
                if not done:
                    warn_of_zero_gradients(model, x)
                with autocast(place, precision), seeded(attack.seed, place):
                    clean[i] += int((predict(model, x) == y).sum())
                    x_adv = attacked(attack, model, x, y)
                    for j, target in enumerate(models.values()):
                        right[i][j] += int((predict(target, x_adv) == y).sum())
                done += len(y)
                progress(Progress(name, i + 1, len(models), done, len(data), done - right[i][i]))
    return Transfer(
        networks=tuple(models),
        clean=tuple(Accuracy(correct, len(data)) for correct in clean),
        attacked=tuple(tuple(Accuracy(correct, len(data)) for correct in row) for row in right),
        attack=each[0].name,
        settings=tuple(dict(attack.settings) for attack in each),
        eps=each[0].threat.radius,
        norm=each[0].threat.norm,
        seeds=tuple(attack.seed for attack in each),
        measured=measured,
        seconds=round(time.perf_counter() - start, 2),
    )
