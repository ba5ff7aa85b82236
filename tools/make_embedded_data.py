"""Makes src/clat/embedded: a class-balanced part of Fashion-MNIST, from the originals of Debian's package.

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb debian
    python tools/make_embedded_data.py debian/usr/share/datasets/fashion-mnist

Writes train.parquet (5,000 images), test.parquet (1,000) and SHA256SUMS.
"""

import gzip
import hashlib
import io
import sys
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
FILES = {"train": ("train", 500), "test": ("t10k", 100)}  # the originals' prefix, images a class
TARGET = Path(__file__).parents[1] / "src/clat/embedded"


def read(path: Path, header: int) -> np.ndarray:
    """The bytes of an IDX file after its header."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main(originals: Path) -> None:
    TARGET.mkdir(exist_ok=True)
    for split, (prefix, each) in FILES.items():
        images = read(originals / f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = read(originals / f"{prefix}-labels-idx1-ubyte.gz", 8)
        first = [np.flatnonzero(labels == label)[:each] for label in range(len(CLASSES))]
        chosen = np.sort(np.concatenate(first))  # in the originals' order, which is shuffled
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
        rows = {"image": [{"bytes": png(images[i]), "path": None} for i in chosen], "label": labels[chosen].tolist()}
        datasets.Dataset.from_dict(rows, features).to_parquet(TARGET / f"{split}.parquet")
    sums = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in sorted(TARGET.glob("*.parquet"))]
    (TARGET / "SHA256SUMS").write_text("".join(sums))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
