"""The loss and its terms over an epoch, as a mean over all processes."""

import torch
from torch import Tensor

from clat.training.health import check_finite
from clat.training.job import Job


class Losses:
    """Sums what each step reports, on the device, so that no step waits for the host."""

    def __init__(self, job: Job, epoch: int) -> None:
        self.job, self.epoch, self.count = job, epoch, 0
        self.totals: dict[str, Tensor] = {}

    def add(self, terms: dict[str, Tensor]) -> None:
        """One update's terms."""
        self.count += 1
        for name, term in {"loss": torch.stack(list(terms.values())).sum(), **terms}.items():
            self.totals[name] = self.totals.get(name, torch.zeros((), device=term.device)) + term

    def checked(self, step: int) -> float:
        """The mean loss up to this step, from 0. Raises HealthError if it is not finite."""
        loss = self.job.processes.mean(self.totals["loss"]).item() / self.count
        check_finite(loss, self.job.recipe, self.epoch, step)
        return loss

    def means(self) -> dict[str, float]:
        """The mean of the loss and of each of its terms."""
        means = self.job.processes.mean(torch.stack(list(self.totals.values()))).tolist()
        return {name: mean / self.count for name, mean in zip(self.totals, means, strict=True)}
