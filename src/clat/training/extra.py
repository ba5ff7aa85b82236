"""A second data set beside the training images, with its own labels or with pseudo-labels, at a share of each batch."""

from dataclasses import dataclass, replace

import torch

from clat.checkpoint import load_checkpoint
from clat.data.dataset import Dataset, to_unit, trained_on
from clat.data.loading import load_data
from clat.errors import InputError
from clat.evaluation.fits import check_fits
from clat.inputs import check_fields
from clat.network import predict


@dataclass(frozen=True, kw_only=True)
class Extra:
    """More images to train on. The number of steps stays the same; each batch has fewer training images.

    The authors' batches are half and half, and so is the default; training images come without replacement within an
    epoch, extra ones with.

    Args:
        source: a Hugging Face name, folder, parquet or CSV file; its training split is used
        share: share of each batch that comes from it
        labels: given (its own), or a checkpoint or run folder whose predictions on the clean images are the labels
        size: edge in pixels that every image is resized and centre-cropped to; needed if it is not the training images'

    Source: Carmon et al. 2019, "Unlabeled Data Improves Adversarial Robustness"; yaircarmon/semisup-adv.
    """

    source: str
    share: float = 0.5
    labels: str = "given"
    size: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, "extra.")
        if not 0 < self.share < 1:
            raise InputError(f"extra.share is {self.share}; it is a share of each batch, between 0 and 1.")

    def count(self, batch_size: int, processes: int = 1) -> int:
        """How many images of a batch are extra ones: the same number in each process."""
        count = round(batch_size * self.share / processes) * processes
        if not 0 < count < batch_size:
            raise InputError(
                f"extra.share {self.share} of a batch of {batch_size} leaves one of the two data sets without images; "
                "change it or raise batch_size."
            )
        return count

    def load(self, like: Dataset, device: torch.device) -> Dataset:
        """The images with labels of ``like``'s classes, on the device.

        Raises:
            InputError: nothing at the source, images of another size or other classes than ``like``'s, or a checkpoint
                that does not fit
        """
        labelled = self.labels == "given"
        data = load_data(self.source, "train", size=self.size, labelled=labelled, holds="train").to(device)
        if data.shape != like.shape:
            sizes = ["x".join(map(str, shape)) for shape in (data.shape, like.shape)]
            raise InputError(
                f"The images of {self.source} are {sizes[0]}, those of {like.source} {sizes[1]}; set extra.size "
                "to that edge, or choose images with as many channels."
            )
        if self.labels != "given":
            return self._pseudo_labelled(data, like, device)
        if len(data.classes) != len(like.classes):
            raise InputError(
                f"{self.source} has {len(data.classes)} classes and {like.source} has {len(like.classes)}; set "
                "extra.labels to a checkpoint that labels the extra images."
            )
        return data.with_classes(like.classes, like.source)

    def _pseudo_labelled(self, data: Dataset, like: Dataset, device: torch.device) -> Dataset:
        model, facts = load_checkpoint(self.labels)
        data = replace(data, classes=trained_on(facts).get("classes", like.classes))
        check_fits(model.to(device), data, device)
        labels = [predict(model, to_unit(pixels).to(device)) for pixels, _ in data.batches(250)]
        return replace(data, labels=torch.cat(labels)).with_classes(like.classes, like.source)
