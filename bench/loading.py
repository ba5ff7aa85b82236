"""How long a training step waits for its images, where they are decoded as they are needed."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import PIL.Image
import torch
from steps import Training, network
from torch import Tensor

from clat.data.loading import load_data
from clat.training.batches import run_images
from clat.training.optimizer import make_optimizer
from clat.training.own_loop import OwnLoop
from clat.training.processes import started
from clat.training.recipe import Recipe

PHOTO = (375, 500)  # height and width of a usual photograph of ImageNet; one has about 100 kB


def waiting(
    name: str, training: Training, device: str, batch: int, steps: int, workers: int, *, size: int = 224
) -> dict[str, Any]:
    """Seconds of each step of an epoch and those that it waited: from asking for a batch until it is on the device.

    ``share`` is that of all steps but the first, which waits for the workers to start: that is once an epoch.
    """
    with TemporaryDirectory() as folder:
        photographs(Path(folder), (steps + 1) * batch)
        data = load_data(folder, size=size, stream=True)
        recipe = Recipe(batch_size=batch, holdout=batch, augment="resized-crop")
        images = run_images(recipe, data, started(device), workers)
        method = OwnLoop(network(name, device), training.objective, training.tuner, training.threat)
        method.select(*images.for_selection(1, training.tuner.batch)[0])
        optimizer = make_optimizer(recipe, method.model)
        waited, seconds, batches, start = [], [], images.batches(1), time.perf_counter()
        while (got := next(batches, None)) is not None:
            synchronise()
            waited.append(round(time.perf_counter() - start, 4))
            method.update(optimizer, got.x, method.attack(got.x, got.y), got.y)
            synchronise()
            seconds.append(round(time.perf_counter() - start, 4))
            start = time.perf_counter()
    share = round(sum(waited[1:]) / sum(seconds[1:]), 4)
    facts = {"network": name, "size": size, "batch": batch, "workers": workers, "attack_steps": training.threat.steps}
    return {**facts, "seconds": seconds, "waited": waited, "share": share}


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def photographs(folder: Path, count: int) -> None:
    """JPEG files of two classes with detail at every scale, like photographs, so that decoding takes as long."""
    generator = torch.Generator().manual_seed(0)
    for place in range(count):
        target = folder / "train" / f"class{place % 2}"
        target.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(photograph(generator).numpy()).save(target / f"{place}.jpg", quality=90)


def photograph(generator: torch.Generator) -> Tensor:
    """uint8 (height, width, 3): noise of every scale, the coarser the stronger."""
    found = torch.zeros(1, 3, *PHOTO)
    for edge in (3, 6, 12, 24, 48, 96, 192, 384):
        noise = torch.randn(1, 3, edge, edge, generator=generator)
        found += torch.nn.functional.interpolate(noise, size=PHOTO, mode="bilinear") / edge**0.25
    return (255 * torch.sigmoid(2 * found[0])).to(torch.uint8).permute(1, 2, 0)
