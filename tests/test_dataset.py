"""A ``Dataset`` holds what it should: arrays and torch data that become one, its classes, images trained on before."""

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, TensorDataset

from clat.cli.shared import fitting
from clat.data import arrays
from clat.data.arrays import as_dataset
from clat.data.dataset import Dataset
from clat.errors import InputError

PIXELS = torch.arange(48, dtype=torch.uint8).view(3, 1, 4, 4)
LABELS = torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("pixels", "labels", "says"),
    [
        (PIXELS / 255, LABELS, r"pixels are float32.*clat\.as_dataset"),
        (PIXELS.numpy(), LABELS, "ndarray"),
        (PIXELS[:, 0], LABELS, "shape"),
        (PIXELS, LABELS.int(), "labels are int32"),
        (PIXELS, [0, 1, 1], "labels are list"),
        (PIXELS, LABELS[:2], "3 images and 2 labels"),
        (PIXELS, torch.tensor([0, 10, 20]), r"Labels are 0, 10, 20.*10 -> 1"),
        (PIXELS, -LABELS, r"Labels are -1, 0"),
        (PIXELS[:0], LABELS[:0], "no images"),
    ],
)
def test_a_dataset_holds_only_what_it_should(pixels, labels, says):
    with pytest.raises(InputError, match=says):
        Dataset(pixels, labels, ("a", "b"), "mine", "train")


COLOUR = torch.randint(2, 250, (6, 3, 5, 4), dtype=torch.uint8)
KINDS = torch.tensor([0, 1, 2, 0, 1, 2])


class Items(torch.utils.data.Dataset):
    """A data set of (image, label) as users write it."""

    classes = ("x", "y", "z")

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, place):
        item = self.items[place]
        return item() if callable(item) else item


@pytest.mark.parametrize(
    "source",
    [
        (COLOUR, KINDS),
        (COLOUR / 255, KINDS.int()),
        [COLOUR.permute(0, 2, 3, 1).numpy(), KINDS.tolist()],
        (COLOUR.long().numpy(), KINDS.double()),
        TensorDataset(COLOUR, KINDS),
        DataLoader(TensorDataset(COLOUR / 255, KINDS), batch_size=4, shuffle=True, drop_last=True),
        Items([(Image.fromarray(x.permute(1, 2, 0).numpy()), int(y)) for x, y in zip(COLOUR, KINDS, strict=True)]),
        Items([(x / 255, y) for x, y in zip(COLOUR, KINDS, strict=True)]),
    ],
)
def test_arrays_and_torch_data_become_the_same_dataset(source):
    before = torch.random.get_rng_state()
    data = as_dataset(source)
    assert torch.equal(data.pixels, COLOUR)
    assert torch.equal(data.labels, KINDS)
    assert data.classes == (("x", "y", "z") if isinstance(source, Items) else ("0", "1", "2"))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert as_dataset(data) is data


def test_a_loader_gives_only_the_images_it_chooses():
    table = TensorDataset(COLOUR, KINDS)
    for chosen in (
        DataLoader(table, batch_size=2, sampler=SubsetRandomSampler([4, 0, 2])),
        DataLoader(Subset(table, [0, 2, 4]), batch_size=2, shuffle=True),
        DataLoader(table, batch_sampler=[[4], [2, 0]]),
    ):
        assert torch.equal(as_dataset(chosen).pixels, COLOUR[[0, 2, 4]])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("targets", [True, False])
def test_a_large_torch_data_set_is_read_as_it_is_needed(monkeypatch, workers, targets):
    monkeypatch.setattr(arrays, "RESIDENT_BYTES", 0)
    items = Items([(Image.fromarray(x.permute(1, 2, 0).numpy()), int(y)) for x, y in zip(COLOUR, KINDS, strict=True)])
    if targets:
        items.targets = KINDS.tolist()
    for source in (items, TensorDataset(COLOUR / 255, KINDS), DataLoader(items, batch_size=4, shuffle=True)):
        data = as_dataset(source)
        assert not data.resident
        assert data.shape == COLOUR.shape[1:]
        assert torch.equal(data.labels, KINDS)
        some = data.subset(torch.tensor([4, 0, 2]))
        x, y = next(some.batches(3, workers=workers))
        assert torch.equal(x, COLOUR[[4, 0, 2]])
        assert torch.equal(y, KINDS[[4, 0, 2]])
        assert data.digest() == as_dataset(source).digest() != some.digest()


def test_what_a_large_torch_data_set_cannot_give_ends_in_one_sentence(monkeypatch):
    monkeypatch.setattr(arrays, "RESIDENT_BYTES", 0)
    first = [(COLOUR[0], 0)] * 32

    def broken():
        raise OSError("no such\nfile")

    for item, says in {
        broken: r"^An image, at place 32, cannot be read: OSError: no such",
        lambda: (COLOUR[0, :, :3], 0): "have several sizes .3x5x4 and 3x3x4",
    }.items():
        items = Items([*first, item])
        items.targets = [0, 1] * 16 + [0]
        data = as_dataset(items)
        for workers in (0, 1):
            with pytest.raises(InputError, match=says) as caught:
                list(data.batches(40, workers=workers))
            assert "\n" not in str(caught.value)


def test_floats_that_are_no_multiples_of_a_level_are_rounded_and_this_is_said():
    data = as_dataset((torch.full((2, 1, 4, 4), 0.5), [0, 1]))
    assert (data.pixels == 128).all()
    assert "rounded to multiples of 1/255, by 0.002 at most" in data.notes[0]
    assert not as_dataset((COLOUR / 255, KINDS)).notes


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (((COLOUR / 255 - 0.5) / 0.25, KINDS), "leave normalising transforms out"),
        ((COLOUR.float(), KINDS), "divide them by 255"),
        ((COLOUR / torch.nan, KINDS), "must lie in"),
        ((COLOUR.int() * 100, KINDS), "scale them"),
        ((COLOUR.clamp(max=1), KINDS), "0 or 1"),
        ((COLOUR.bool(), KINDS), "bool"),
        ((COLOUR[:, :2], KINDS), "1 or 3 channels"),
        ((COLOUR[0, 0], KINDS), "shape"),
        ((COLOUR[:0], KINDS[:0]), "shape"),
        ((COLOUR, KINDS[:3]), "6 images and 3 labels"),
        ((COLOUR, KINDS * 10), "10 -> 1"),
        ((COLOUR, torch.eye(6)), r"argmax"),
        ((COLOUR, [0, 1, 2, None, 1, 2]), "no label"),
        ((COLOUR, [0, 1, 2, "a", 1, 2]), "of type int, str"),
        ((COLOUR, KINDS / 4), "of type float, int"),
        ((COLOUR, None), "NoneType"),
        ((None, KINDS), "NoneType"),
        ("photos", r"clat\.load_data"),
        (None, "NoneType is no data"),
        (Items([]), "is empty"),
        (Items([COLOUR[0]]), "not pairs"),
        (Items([("a", 0)]), "images of type str"),
        (Items([(COLOUR[0], 0), (COLOUR[0, :, :3], 1)]), "several sizes"),
        (Items([lambda: (torch.rand(1, 4, 4), 0)]), "another image each time"),
    ],
)
def test_what_is_no_data_is_refused_with_what_to_do(source, says):
    with pytest.raises(InputError, match=says):
        as_dataset(source)


# Class names, and images that were trained on


def test_classes_are_matched_by_name():
    data = Dataset(PIXELS, LABELS, ("cat", "dog"), "photos", "test")
    assert data.with_classes(("cat", "dog"), "net") is data
    matched = data.with_classes(("dog", "cat"), "net")
    assert matched.labels.tolist() == [1, 0, 0]
    assert matched.classes == ("dog", "cat")
    assert "another order" in matched.notes[0]
    for names in (("dog", "emu"), ("cat", "dog", "emu"), ("cat", "cat")):
        with pytest.raises(InputError, match=r"The classes of photos are .*those of net"):
            data.with_classes(names, "net")


def test_classes_without_names_fit_as_many():
    nameless = Dataset(PIXELS, LABELS, ("0", "1"), "photos", "test")
    assert "have no names" in nameless.with_classes(("cat", "dog"), "net").notes[0]
    assert "net have no names" in nameless._with(classes=("cat", "dog")).with_classes(("0", "1"), "net").notes[0]
    with pytest.raises(InputError, match="are 0, 1, those of net"):
        nameless.with_classes(("a", "b", "c"), "net")


def noise(count: int, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return Dataset(pixels, torch.arange(count) % 2, ("a", "b"), "noise", "train")


@pytest.mark.parametrize("count", [100, 3000])
def test_images_of_the_training_set_are_known_again(count, capsys):
    data = noise(count, 0)
    facts = {"data": {**data.identity(), "classes": ["a", "b"]}}
    fitting(data, facts, "runs/[/x]")
    assert "Warning: These are images that runs/[/x] was trained on" in capsys.readouterr().err
    fitting(data, facts, "net", unseen=False)
    fitting(noise(count, 1), facts, "net")
    assert capsys.readouterr().err == ""
    mixed = Dataset(
        torch.cat([noise(count, 1).pixels[: count // 2], data.pixels[: count // 2]]), data.labels, ("a", "b"), "m", ""
    )
    assert 0.3 < mixed.share_seen(facts["data"]) < 0.7
    fitting(mixed, facts, "net")
    assert "% of these images are among those that net was trained on" in capsys.readouterr().err


@pytest.mark.parametrize("facts", [{}, {"data": None}, {"data": [1]}, {"data": {"sketch": [{}], "images": "x"}}])
def test_facts_of_any_form_do_no_harm(facts):
    data = noise(4, 0)
    assert fitting(data, facts, "net") is data
