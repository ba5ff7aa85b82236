"""What the loss learns instead of plain labels: each label smoothed over the classes, or weighed by its class."""

import torch
from torch import Tensor

from clat.training.recipe import Recipe


def targets(recipe: Recipe, labels: Tensor, classes: int) -> Tensor | None:
    """One row for each label, (classes, classes): what the loss takes for y is ``targets[y]``. None for plain labels.

    Row c is w_c ((1 - s) onehot(c) + s / K), with s the smoothing, K the number of classes and w_c a weight. It is 1,
    or for balanced classes n / (m n_c), where n_c of the n images are of class c, and m classes have images: its mean
    over the images is 1.

    Args:
        labels: of all images that are trained on, (n,)
    """
    if not recipe.label_smoothing and recipe.class_weights == "equal":
        return None
    smoothed = (1 - recipe.label_smoothing) * torch.eye(classes) + recipe.label_smoothing / classes
    if recipe.class_weights == "balanced":
        count = labels.cpu().bincount(minlength=classes)
        weight = len(labels) / (int((count > 0).sum()) * count.clamp(min=1))  # no image looks up an empty class
        smoothed *= weight.unsqueeze(1)
    return smoothed.to(labels.device)
