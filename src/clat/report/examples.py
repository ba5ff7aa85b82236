"""What a page shows of images: adversarial examples, and the confusion that the attack causes. Measured on call."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clat.attacks import pgd_threat, restarts
from clat.compute import placed, seeded
from clat.criticality import layer_criticality
from clat.data.dataset import Dataset, to_unit
from clat.evaluation.accuracy import Accuracy
from clat.evaluation.evaluate import attacked
from clat.evaluation.fits import check_fits
from clat.network import Images, Labels, class_scores
from clat.report import pictures
from clat.report.blocks import Images as ImageRows
from clat.report.blocks import Pictures, Section, Shown, Table, number, share, table, words
from clat.report.svg import picture
from clat.report.words import attack_name
from clat.text import plain
from clat.threat import Lp, Threat, attack_output

SHOWN = 3  # examples that the attack breaks, and as many that withstand it
STEPS = 20  # of PGD
BATCH = 100  # images that run together
RANKED = 100  # images that the criticality is measured on
CLASSES = 20  # a network of more has no square picture of its confusions
PAIRS = 10  # rows of the table of confusions
LARGEST = 112  # pixels a side that an image is shown with at most


@dataclass(frozen=True)
class Example:
    """An image before and after the attack, pixels in [0, 1], with the class named first by the network."""

    x: Images
    x_adv: Images
    label: int
    before: tuple[int, float]  # class and its probability
    after: tuple[int, float]

    @property
    def broken(self) -> bool:
        return self.after[0] != self.label


@dataclass(frozen=True)
class Examined:
    """What was measured on images for a page.

    Args:
        threat: the attack
        data: in words: how many images, of what
        examples: the first images of the sample that the attack breaks, and the first that withstand it
        confusion: counts (true class, class under attack) of the images that are right without it
        right: of each class, how many images there are, are right, and stay right under attack
        before, after: criticality by layer, of the base and of the network, on the same images; empty without a base
        how: in words, how the criticality was measured
    """

    threat: Threat
    data: str
    classes: tuple[str, ...]
    examples: tuple[Example, ...]
    confusion: Tensor
    right: Tensor
    before: Mapping[str, float]
    after: Mapping[str, float]
    how: str


def examine(
    model: nn.Module,
    data: Dataset,
    eps: float,
    norm: Lp = "linf",
    *,
    base: nn.Module | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Examined:
    """Attacks all images of the data by PGD-20 from a random start.

    Args:
        eps: radius of the ball, in pixels of [0, 1]
        base: the network before training, for its criticality
    Raises:
        InputError: images that do not fit the network
    """
    threat = pgd_threat(eps, STEPS, norm)
    attack = restarts(threat, seed=seed)[0]
    classes = len(data.classes)
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    right = torch.zeros(classes, 3, dtype=torch.long)
    examples: list[Example] = []
    scores: list[Mapping[str, float]] = [{}, {}]
    with placed([model] if base is None else [model, base], device) as place:
        check_fits(model, data, place)
        for step, (pixels, y) in enumerate(data.to(place).batches(BATCH)):
            x = to_unit(pixels)
            with seeded(attack.seed + step, place):
                x_adv = attacked(attack, model, x, y)
            before, after = (class_scores(model, images).softmax(1) for images in (x, x_adv))
            correct = before.argmax(1) == y
            pairs = zip(y[correct].tolist(), after.argmax(1)[correct].tolist(), strict=True)
            for true, seen in pairs:
                confusion[true, seen] += 1
            for true, ok in zip(y.tolist(), correct.tolist(), strict=True):
                right[true] += torch.tensor([1, int(ok), 0])
            for broken in (True, False):
                left = SHOWN - sum(example.broken == broken for example in examples)
                of_kind = correct & ((after.argmax(1) != y) == broken)
                examples += [_example(x, x_adv, y, before, after, i) for i in of_kind.nonzero()[:left, 0].tolist()]
            if not step and base is not None:
                check_fits(base, data, place)
                scores = [_criticality(each, x[:RANKED], y[:RANKED], threat, seed) for each in (base, model)]
        right[:, 2] = confusion.diagonal()
    split = f"{len(data):,} {data.split} images of {data.source}"
    how = (
        f"Of both networks on the same {min(RANKED, len(data))} images, {attack_name(f'PGD-{STEPS}', threat)} on each."
    )
    return Examined(threat, split, data.classes, tuple(examples), confusion, right, scores[0], scores[1], how)


def _criticality(model: nn.Module, x: Images, y: Labels, threat: Threat, seed: int) -> Mapping[str, float]:
    with seeded(seed, x.device):
        x_adv = attack_output(model, x, y, threat)
    return {score.name: score.criticality for score in layer_criticality(model, x, x_adv)}


def _example(x: Images, x_adv: Images, y: Labels, before: Tensor, after: Tensor, i: int) -> Example:
    first, second = ((int(scores[i].argmax()), float(scores[i].max())) for scores in (before, after))
    return Example(x[i].cpu(), x_adv[i].cpu(), int(y[i]), first, second)


# On the page


def sections_of(examined: Examined, key: str) -> Sequence[Section]:
    """The examples, and the confusion that the attack causes."""
    attack = attack_name(f"PGD-{STEPS}", examined.threat)
    sections = []
    if examined.examples:
        said = (
            f"The first images of the sample that {attack} breaks, and the first that withstand it, all of them right "
            f"without attack: {examined.data}."
        )
        sections.append(Section("Adversarial examples", (said,), (_rows(examined),)))
    total = int(examined.confusion.sum())
    if total:
        lost = total - int(examined.confusion.diagonal().sum())
        said = f"Of {total:,} images that are right without attack, {attack} turns {lost:,} into another class."
        sections.append(Section("What the attack confuses", (said,), _confusions(examined, key)))
    return sections


def _rows(examined: Examined) -> ImageRows:
    rows = []
    for example in sorted(examined.examples, key=lambda example: not example.broken):
        (was, sure), (seen, then) = example.before, example.after
        name, other = (plain(examined.classes[place]) for place in (was, seen))
        change = example.x_adv - example.x
        most = examined.threat.radius if examined.threat.norm == "linf" else float(change.abs().max()) or 1.0
        images = (
            (_png(example.x), f"image of {name}"),
            (_png(change / (2 * most) + 0.5), "its perturbation, magnified"),
            (_png(example.x_adv), f"the image under attack, seen as {other}"),
        )
        rows.append(Shown(images, f"{name}, {sure:.0%} → {other}, {then:.0%}"))
    caption = (
        "From left to right: the image; the perturbation, stretched from its ball to all grey levels (mid-grey is no "
        "change); the attacked image. Below: the class that the network sees, and how sure it is."
    )
    return ImageRows(tuple(rows), caption)


def _png(pixels: Images) -> str:
    """The pixels as a PNG of our own making, whatever file they came from."""
    from PIL import Image

    array = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, -1).numpy()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] < 3 else array[:, :, :3])
    if max(image.size) > LARGEST:
        image.thumbnail((LARGEST, LARGEST))
    held = io.BytesIO()
    image.save(held, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode("ascii")


def _confusions(examined: Examined, key: str) -> tuple[Pictures | Table, ...]:
    names, counts = examined.classes, examined.confusion
    by_class = [
        (words(name), number(int(n)), share(Accuracy(int(ok), int(n))), share(Accuracy(int(kept), int(n))))
        for name, (n, ok, kept) in zip(names, examined.right.tolist(), strict=True)
        if n
    ]
    accuracies = table("Accuracy by class, 95 % Wilson intervals", "class | images | clean % | robust %", by_class)
    changed = counts.clone()
    changed.fill_diagonal_(0)
    order = changed.flatten().argsort(descending=True, stable=True)[:PAIRS].tolist()
    pairs = [divmod(place, len(names)) for place in order if int(changed.flatten()[place])]
    rows = [(words(names[a]), words(names[b]), number(int(changed[a, b]))) for a, b in pairs]
    if len(names) > CLASSES:
        return table("The most frequent confusions", "class | becomes | images", rows), accuracies
    square = Table(
        "Images by class, and by what the network sees under attack",
        ("class", *names),
        tuple(
            (words(name), *(number(int(value)) for value in line))
            for name, line in zip(names, counts.tolist(), strict=True)
        ),
    )
    draw = pictures.heat_panel(names, names, changed.tolist(), set(), "seen under attack")
    worst = ", ".join(f"{names[a]} becomes {names[b]} {int(changed[a, b])} times" for a, b in pairs[:3])
    most = f"most often {plain(worst)}" if worst else "the attack changes none of them"
    alt = f"Heat map of {len(names)} classes under attack: {most}."
    height = 0.7 + 0.26 * len(names) + 0.07 * max(len(pictures.short(name)) for name in names)
    figure = pictures.figure_of(draw, height=height, turned=True)
    caption = "Rows: the true class; columns: what it becomes. Strong colour: many images; the others withstand."
    return Pictures((picture(figure, f"{key}-confusion", alt, caption, square),)), accuracies
