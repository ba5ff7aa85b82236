"""Tables of images by name, from files, folders and the Hugging Face hub, and which part is for training or testing."""

import glob
import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from clat.data.labels import shortened
from clat.data.listed import fingerprinted, names_image, read_csv, size_of
from clat.errors import InputError
from clat.text import plain

EMBEDDED = "fashion-mnist-mini"
Holds = Literal["train", "test", "both"]

_HUB_NAME = re.compile(r"[\w-][\w.-]{0,95}(/[\w-][\w.-]{0,95})?", re.ASCII)
_SPLITS = {  # what a file, a folder or a data set may call its splits
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev"),
}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}
_IMAGE_COLUMNS = ("image", "img", "pixel_values", "jpg", "png", "path", "file", "filename", "file_name", "image_path")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "cls", "y")


@dataclass(frozen=True)
class Splits:
    """The tables at a source by the names of their splits.

    nature: ``named``: the source says which split each table is; ``unnamed``: it has one table and does not say which;
    ``to divide``: it has one table, as is usual for its kind, of which clat makes a training and a test split
    """

    source: str
    tables: Mapping[str, Any]
    nature: Literal["named", "unnamed", "to divide"]

    def choose(self, split: str, holds: Holds | None) -> tuple[Any, bool, str | None]:
        """The table to read for a split, whether a part of it is to be set aside for testing, and a note.

        Args:
            holds: which split a source with one table is
        Raises:
            InputError: no such split, or a source that does not say what it holds
        """
        only = next(iter(self.tables.values())) if len(self.tables) == 1 else None
        if only is not None and (holds or self.nature != "named"):
            if holds == split or (holds is None and self.nature == "unnamed" and split == "train"):
                return only, False, None
            if split in ("train", "test") and (holds == "both" or (holds is None and self.nature == "to divide")):
                return only, True, None
            raise InputError(self._refusal(split, holds))
        if split in self.tables:
            return self.tables[split], False, None
        name = next((name for name in _SPLITS["validation"] if name in self.tables), None)
        if split == "test" and name is not None:
            return self.tables[name], False, f"{self.source} has no split test; its split {name} is read in its place."
        raise InputError(
            f"{self.source} has no split {plain(split)!r}; it has {shortened(self.tables)}"
            + (f", which can serve for both: add {_BOTH}." if only is not None and split == "test" else ".")
        )

    def _refusal(self, split: str, holds: Holds | None) -> str:
        source = plain(self.source)
        if holds in ("train", "test"):
            return f"{source} holds {holds} images, as holds={holds} says, and {split} images are asked for."
        if self.nature == "to divide" or holds == "both":
            return f"{source} has no split {plain(split)!r}; it is divided into train and test."
        return (
            f"{source} does not say whether its images are for training or for testing; add holds=test if they are for "
            f"testing, or {_BOTH}."
        )


_BOTH = "holds=both, in training too, to set a fifth of it aside for testing"


def read_splits(source: str, config: str | None = None) -> Splits:
    """Whatever is at the source, as ``datasets`` tables.

    Raises:
        InputError: nothing there, or nothing that can be read
    """
    import datasets

    datasets.disable_progress_bars()
    path = Path(__file__).parents[1] / "embedded" if source == EMBEDDED else _located(source)
    if path is not None and path.is_dir() and not (path / "dataset_dict.json").is_file() and not _saved(path):
        if not any(path.iterdir()):
            raise InputError(f"The folder {plain(source)} is empty.")
        if source != EMBEDDED and (images := _image_files(path)) and not _has_tables(path):
            return _class_folders(source, path, images)
    if path is not None and path.suffix.lower() in (".csv", ".tsv"):
        return _listed(source, path)
    with _quiet("datasets", "huggingface_hub"):
        try:
            if path is None:
                found = datasets.load_dataset(source, config)
            elif path.is_file():
                split = _split_in(path.stem) or "train"
                found = datasets.load_dataset("parquet", data_files={split: glob.escape(str(path))})
            elif _saved(path) or (path / "dataset_dict.json").is_file():
                found = datasets.load_from_disk(str(path))
            else:
                found = datasets.load_dataset(str(path), config)
        except Exception as error:  # the readers raise anything from OSError to pyarrow's own
            raise InputError(
                f"No images could be read from {plain(source)}: give a folder of images, a parquet or CSV file, or the "
                f"name of a Hugging Face data set ({_reason(error)})."
            ) from error
    if isinstance(found, datasets.Dataset):
        return Splits(source, {"train": found}, "unnamed")
    if list(found) != ["train"]:
        return Splits(source, dict(found), "named")
    if path is None:
        return Splits(source, dict(found), "to divide")  # a hub's only split is called train even if it is all images
    says = [path.stem] if path.is_file() else [str(file.relative_to(path)) for file in path.rglob("*")]
    saved = (path / "dataset_dict.json").is_file()
    return Splits(source, dict(found), "named" if saved or any(map(_split_in, says)) else "unnamed")


def set_aside(groups: Tensor, split: str, source: str) -> tuple[Tensor, str]:
    """The places of the training or test part of a table, a fifth of each group being for testing, and a note.

    Args:
        groups: (n,) the images' classes
        split: train or test; the two parts are disjoint and always the same
    """
    generator = torch.Generator().manual_seed(0)
    test = torch.zeros(len(groups), dtype=torch.bool)
    for group in groups.unique():
        places = (groups == group).nonzero().flatten()
        test[places[torch.randperm(len(places), generator=generator)[: (len(places) + 2) // 5]]] = True
    kept = int(test.sum())
    if not 0 < kept < len(groups):
        raise InputError(
            f"{plain(source)} has no test split and, with {len(groups)} images, too few to set a fifth of each class "
            "aside; say what it holds with holds=train or holds=test."
        )
    said = (
        f"{plain(source)} has no test split: {kept:,} of its {len(groups):,} images, drawn by a fixed seed, are set "
        f"aside for testing, and {'these' if split == 'test' else 'the others'} are read here."
    )
    return (test if split == "test" else ~test).nonzero().flatten(), said


def find_columns(
    table: Any, source: str, image: str | None = None, label: str | None = None, labelled: bool = True
) -> tuple[str, str | None]:
    """The names of the image and the label column, given or found by type and name; no label if it is not wanted."""
    for column in filter(None, (image, label)):
        if column not in table.column_names:
            raise InputError(
                f"{plain(source)} has no column {plain(column)!r}; its columns are {shortened(table.column_names)}."
            )
    image = image or _find(table, "image", source)
    if not _holds_images(table.features[image]):
        raise InputError(
            f"The column {plain(image)} of {plain(source)} holds no image files; name one that does as image=COLUMN."
        )
    return image, (label or _find(table, "label", source)) if labelled else None


def _find(table: Any, kind: str, source: str) -> str:
    """The one column of the right type, by preference with a usual name."""
    import datasets

    def whole(feature: Any) -> bool:
        return isinstance(feature, datasets.ClassLabel) or _dtype(feature).startswith(("int", "uint"))

    features = {name: feature for name, feature in table.features.items() if not name.startswith("__")}  # pandas' index
    if kind == "image":
        usual: Sequence[str] = _IMAGE_COLUMNS
        preferred = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        others = [name for name, feature in features.items() if _holds_images(feature)]
    else:
        usual = _LABEL_COLUMNS
        preferred = [name for name, feature in features.items() if whole(feature)]
        others = [n for n, f in features.items() if _dtype(f) in ("string", "large_string", "float64", "bool")]
    for fitting in (preferred, others):
        if named := [name for name in usual if name in fitting]:
            return named[0]
    for fitting in (preferred, others if kind == "image" else []):
        if len(fitting) == 1:
            return fitting[0]
    raise InputError(
        f"{plain(source)} has {len(preferred) or 'no'} columns that could hold the {kind}; name one of "
        f"{shortened(table.column_names)} as {kind}=COLUMN"
        + (", or give each class a folder of its own." if kind == "label" else ".")
    )


def _dtype(feature: Any) -> str:
    return str(getattr(feature, "dtype", ""))


def _holds_images(feature: Any) -> bool:
    import datasets

    held = feature.get("bytes") if isinstance(feature, dict) else feature
    return isinstance(feature, datasets.Image) or _dtype(held) in ("binary", "large_binary")


def _located(source: str) -> Path | None:
    """The file or folder that a source names, or None if it names a data set on the hub."""
    if not source.strip():
        raise InputError(
            "No data is named; give a folder of images, a parquet or CSV file, or a Hugging Face data set."
        )
    try:
        path = Path(source).expanduser()
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        first = source.split("/")[0]
        if _HUB_NAME.fullmatch(source) and not ("/" in source and Path(first).exists()):
            return None
        raise InputError(f"There is no file or folder {_short(source)!r}.") from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"There is no file or folder {_short(source)!r} ({plain(reason)}).") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or not os.access(path, os.R_OK):
        raise InputError(f"{_short(source)} is no file or folder that can be read.")
    return path


def _short(text: str) -> str:
    return plain(text if len(text) <= 100 else f"{text[:60]}...{text[-30:]}")


def _reason(error: BaseException) -> str:
    """The first cause of an error, on one line; what it was raised ``from None`` instead of is no cause."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    return plain(" ".join(str(error).split()))[:200] or type(error).__name__


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Silences loggers; what they would print is in the error."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _saved(path: Path) -> bool:
    return (path / "state.json").is_file()


def _split_in(name: str) -> str | None:
    """The split that a word in a file's name or path means."""
    words = re.split(r"[-._ /\\0-9]+", name.lower())
    return next((_SPLIT_OF[word] for word in words if word in _SPLIT_OF), None)


def _has_tables(path: Path) -> bool:
    """Whether the folder describes its images in tables, which ``datasets`` reads."""
    kinds = ("metadata.csv", "metadata.jsonl", "*.parquet", "*.arrow", "*.tar")
    return any(next(path.glob(pattern), None) for kind in kinds for pattern in (kind, f"*/{kind}"))


def _image_files(folder: Path) -> list[Path]:
    """The images in the folder and below, sorted, without what is hidden."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in files:
            if not name.startswith((".", "__")) and names_image(name):
                found.append(Path(parent, name))
    return sorted(found, key=lambda path: path.as_posix())


def _listed(source: str, path: Path) -> Splits:
    """The images that a CSV file lists; a column ``split`` or the file's name may say which split they are."""
    table = read_csv(path)
    if "split" not in table.column_names:
        split = _split_in(path.stem)
        return Splits(source, {split or "train": table}, "named" if split else "to divide")
    says = [_SPLIT_OF.get(str(word).lower()) for word in table["split"][:]]
    if None in says:
        raise InputError(
            f"The column split of {plain(source)} has {plain(table['split'][says.index(None)])!r}; write train, "
            "validation or test, or give the column another name."
        )
    rows = {name: [row for row, each in enumerate(says) if each == name] for name in dict.fromkeys(says)}
    return Splits(source, {str(name): table.select(places) for name, places in rows.items()}, "named")


def _class_folders(source: str, folder: Path, files: Sequence[Path]) -> Splits:
    """Images in a subfolder for each class, these perhaps in a subfolder for each split; classes in sorted order."""
    inside = [(path.relative_to(folder).parts, path) for path in files]
    tops = {parts[0] for parts, _ in inside if len(parts) > 1}
    named = any(top.lower() in _SPLIT_OF for top in tops)
    if named:
        parts_of = {
            _SPLIT_OF.get(top.lower(), top): [(p[1:], path) for p, path in inside if p[0] == top and len(p) > 1]
            for top in sorted(tops, key=lambda top: (top.lower() not in _SPLITS["train"], top))
        }
    else:
        parts_of = {"train": inside}
    classes = sorted({parts[0] for members in parts_of.values() for parts, _ in members if len(parts) > 1})
    tables = {split: _table_of(folder, members, classes) for split, members in parts_of.items()}
    return Splits(source, tables, "named" if named else "to divide")


def _table_of(folder: Path, members: Sequence[tuple[tuple[str, ...], Path]], classes: Sequence[str]) -> Any:
    """A table of image files, with labels if all of them are in class folders."""
    import datasets

    columns: dict[str, Any] = {"image": [str(path) for _, path in members]}
    features: dict[str, Any] = {"image": datasets.Image(decode=False)}
    if all(len(parts) > 1 for parts, _ in members):
        number = {name: place for place, name in enumerate(classes)}
        columns["label"] = [number[parts[0]] for parts, _ in members]
        features["label"] = datasets.ClassLabel(names=list(classes))
    table = datasets.Dataset.from_dict(columns, datasets.Features(features))
    return fingerprinted(table, "".join(f"{path.relative_to(folder)} {size_of(path)}\n" for _, path in members))
