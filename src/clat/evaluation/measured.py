"""How a figure was measured: part of every result and of a record's identity, printed the same way everywhere."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from clat.compute import Precision, layout_of
from clat.data.dataset import Dataset
from clat.network import weights_digest
from clat.structure import structure_digest


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which network it was.

    Args:
        model: what ``build_model`` made it from, or else its class
        structure: digest that tells networks with the same weights apart
        weights: digest of its parameters and buffers
        layout: of its kernels
    """

    model: str
    structure: str
    weights: str
    layout: str

    @classmethod
    def of(cls, model: nn.Module) -> "Identity":
        spec = getattr(model, "spec", None)
        return cls(
            model=json.dumps(spec, sort_keys=True, default=str) if spec else type(model).__qualname__,
            structure=structure_digest(model),
            weights=weights_digest(model),
            layout=layout_of(model),
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Everything that determines a figure, apart from the attacks: images, networks, arithmetic and versions.

    Args:
        images: how many
        data: their source and digest
        split: of the data
        networks: those that were attacked or measured
        seed: of the random numbers
        precision: fp32 or bf16 autocast
        batch_size: images that ran together
        device: its kind, e.g. cpu or cuda
        versions: of clat and torch
    """

    images: int
    data: str
    split: str
    networks: tuple[Identity, ...]
    seed: int
    precision: str
    batch_size: int
    device: str
    versions: dict[str, str]

    @classmethod
    def of(
        cls,
        models: Sequence[nn.Module],
        data: Dataset,
        *,
        seed: int,
        batch_size: int,
        device: torch.device | str,
        precision: Precision = "fp32",
    ) -> "Measured":
        """A measurement on exactly these images, of the networks as they are now."""
        return cls(
            images=len(data),
            data=f"{data.source} sha256:{data.digest()[:16]}",
            split=data.split,
            networks=tuple(map(Identity.of, models)),
            seed=seed,
            precision=precision,
            batch_size=batch_size,
            device=torch.device(device).type,
            versions={"clat": version("torch-clat"), "torch": torch.__version__},
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Measured":
        """The reverse of ``to_json``, after a file. Raises TypeError or ValueError if it says something else."""
        found = cls(**{**content, "networks": tuple(Identity(**network) for network in content["networks"])})
        words = (found.data, found.split, found.precision, found.device, *(n.weights for n in found.networks))
        counts = (found.images, found.seed, found.batch_size)
        if not all(isinstance(word, str) for word in words) or not all(type(count) is int for count in counts):
            raise ValueError("words and counts are of another type")
        return replace(found, versions={str(name): str(number) for name, number in found.versions.items()})

    def __str__(self) -> str:
        layouts = ", ".join(dict.fromkeys(network.layout for network in self.networks))
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return (
            f"Device {self.device}, precision {self.precision}, split {self.split}, layout {layouts}, batches of "
            f"{self.batch_size}, seed {self.seed}, {versions}; {self.images:,} images of {self.data}"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
