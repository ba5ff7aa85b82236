"""The processes that train together: how they start, what only the first one does, and what they average."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn

from clat.compute import best_device, find_device
from clat.errors import InputError
from clat.network import tensors

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """All processes of a run, as one of them sees them. A run of one process is the plain case.

    Args:
        device: where this process computes
    """

    accelerator: Accelerator
    device: torch.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def count(self) -> int:
        return self.accelerator.num_processes

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.accelerator.is_main_process

    def by_first(self, action: Callable[[], Value]) -> Value:
        """Runs an action in the first process only and shares its result. If it fails, all raise the same error."""
        if self.count == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = action()
            except InputError as error:
                outcome[1] = str(error)
        value, failure = broadcast_object_list(outcome)
        if failure is not None:
            raise InputError(failure)
        return value

    def of_first(self, value: Value) -> Value:
        """The first process's value, in all of them."""
        return broadcast_object_list([value])[0]

    def totals(self, *counts: Any) -> list[int]:
        """The sum over all processes of each count."""
        return self.accelerator.reduce(torch.tensor(counts, device=self.device), "sum").tolist()

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, the same bits in each."""
        return self.accelerator.reduce(values, "mean") if self.count > 1 else values

    def mean_over_images(self, values: Tensor, images: int) -> Tensor:
        """The mean over the images of all processes, of which this one has ``images`` with these mean values."""
        weighted = torch.cat([values.double() * images, values.new_tensor([images]).double()])
        total = self.mean(weighted)
        return (total[:-1] / total[-1]).to(values.dtype)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Averages the gradients over the processes. Only what trains is sent, which under CLAT is little."""
        if self.count > 1:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            flat = self.mean(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def average_buffers(self, held: Mapping[str, Tensor], moving: set[str]) -> None:
        """Averages the tensors of these names over the processes, if they are decimal numbers."""
        for name in sorted(moving & held.keys()):
            if held[name].is_floating_point():
                held[name].copy_(self.mean(held[name]))

    @torch.no_grad()
    def copy_first(self, model: nn.Module) -> None:
        """Gives the network of every process the weights and buffers of the first one's, in its memory layout."""
        if self.count > 1:
            for tensor in tensors(model).values():
                tensor.copy_(broadcast(tensor.contiguous()))

    def wait(self) -> None:
        """Goes on once all processes have come here."""
        self.accelerator.wait_for_everyone()


def started(device: torch.device | str | None, tracker: str | None = None, folder: Path | None = None) -> Processes:
    """The processes that a launcher started, or this one alone.

    Args:
        device: of this process; default the fastest kind of device here, one for each process
        tracker: what Accelerate logs with, and the folder that it may write to
    Raises:
        InputError: the launcher was asked for more processes than it started, or there is no such device
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    alone = "RANK" not in os.environ and "LOCAL_RANK" not in os.environ
    if alone and (asked > 1 or {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys()):
        # accelerate launch --cpu sets an address to meet at for several processes, but starts one and gives no ranks.
        raise InputError(
            "The launcher was asked for several processes but started one (accelerate launch does so with --cpu); on "
            "CPUs, start them with accelerate launch --multi_gpu --num_processes N -m clat ... or torchrun "
            "--nproc_per_node N -m clat ..., or ask for one and unset MASTER_ADDR."
        )
    wanted = None if device is None else find_device(device, computing=True)
    # Without cpu=True, torchrun on CPUs is not noticed; one process needs it only where nothing else is here.
    on_cpu = best_device() == "cpu" or (not alone and wanted is not None and wanted.type == "cpu")
    accelerator = Accelerator(cpu=on_cpu, log_with=tracker, project_dir=folder)
    if accelerator.num_processes < asked:
        raise InputError(
            f"The launcher was asked for {asked} processes, but {accelerator.num_processes} train together; start "
            "them with torchrun --nproc_per_node N -m clat ..., or ask for one."
        )
    if wanted is None:
        return Processes(accelerator, accelerator.device)
    if accelerator.num_processes == 1:
        return Processes(accelerator, wanted)
    if wanted not in (accelerator.device, torch.device(accelerator.device.type)):
        raise InputError(
            f"The processes train on {accelerator.device.type}, one device each; leave --device out, or choose their "
            "devices with the launcher."
        )
    return Processes(accelerator, accelerator.device)


def seed_of(seed: int, epoch: int, rank: int = 0) -> int:
    """One seed for each run, epoch and process, so that a single epoch can be repeated."""
    return (seed * 1_000_003 + epoch) * 1_009 + rank
