"""A decomposed decoder on disk: one file per block, with every layer's energies and factors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from rankship_pipeline.foundation.files import publish_file
from rankship_pipeline.models.decoder import Decoder
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.models.weights import open_tensors
from rankship_pipeline.stream.choice import StreamChoice


@dataclass(frozen=True)
class StreamAnalysis:
    """A decomposed decoder on disk: `folder` holds one file per block with every layer's energies and factors.

    `samples` are those that inputs were weighed by, None for a plain SVD.
    """

    folder: Path
    decoder: Decoder
    layers: tuple[Layer, ...]
    samples: int | None

    def locate(self, index: int) -> Path:
        """The file of one block."""
        return self.folder / f"block-{index:04d}.safetensors"

    @property
    def missing(self) -> list[int]:
        """The blocks that have no file yet."""
        return [index for index in range(self.decoder.count) if not self.locate(index).exists()]

    def list_layers(self, index: int) -> list[Layer]:
        """The layers of one block."""
        return [one for one in self.layers if self.decoder.find_block(one.name) == index]

    def name_within(self, layer: Layer) -> str:
        """A layer's name inside its block."""
        return layer.name.removeprefix(f"{self.decoder.prefix}.{self.decoder.find_block(layer.name)}.")

    def read_energy(self, layer: str) -> NDArray[np.float64]:
        """A layer's σ², descending."""
        with self._open(layer) as file:
            return np.asarray(file.get_tensor(f"{layer}.energy"))

    def read_shrinkage(self, layer: str) -> float | None:
        """The share of the inputs' correlations that the samples do not bear out; None where they are not asked."""
        return self._read_number(layer, "shrinkage")

    def read_nats(self, layer: str) -> float | None:
        """The divergence predicted from losing the layer, in nats a sample; None without curvature."""
        return self._read_number(layer, "nats")

    def read_factors(self, layer: str, rank: int) -> tuple[Tensor, Tensor]:
        """B (rank, columns) and A (rows, rank), balanced; reads only these parts of the file."""
        with self._open(layer) as file:
            B, A = file.get_slice(f"{layer}.0.weight")[:rank], file.get_slice(f"{layer}.1.weight")[:, :rank]
        return B.contiguous(), A.contiguous()

    def _read_number(self, layer: str, what: str) -> float | None:
        with self._open(layer) as file:
            name = f"{layer}.{what}"
            return float(file.get_tensor(name)) if name in file.keys() else None  # noqa: SIM118 - safetensors has no in

    def _open(self, layer: str) -> Any:  # noqa: ANN401 - safetensors has no types
        return open_tensors(self.locate(self.decoder.find_block(layer) or 0), f"layer {layer}")


def gather_parts(analysis: StreamAnalysis, choice: StreamChoice, pending: Mapping[str, Any]) -> dict[str, Tensor]:
    """A block's tensors by their names in its file, from its layers' decompositions as they end."""
    tensors: dict[str, Tensor] = {}
    for name, future in pending.items():
        parts = future.result()
        stored = analysis.decoder.checkpoint.read(f"{name}.weight").dtype
        dtype = stored if choice.dtype is None else torch.float32
        tensors |= {
            f"{name}.energy": torch.tensor(parts.energy),
            f"{name}.0.weight": torch.tensor(parts.B, dtype=dtype),
        }
        tensors[f"{name}.1.weight"] = torch.tensor(parts.A, dtype=dtype)
        for what, number in (("nats", parts.nats), ("shrinkage", parts.shrinkage)):
            if number is not None:
                tensors[f"{name}.{what}"] = torch.tensor(number, dtype=torch.float64)
    return tensors


def write_block(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a block's file in one step."""
    with publish_file(path) as temporary:
        save_file(dict(tensors), temporary, metadata={"format": "pt"})


def find_keep(weight: Tensor) -> int:
    """The ranks worth storing: beyond the break-even rank the factors are not smaller than the weight."""
    return max(1, (weight.numel() - 1) // sum(weight.shape))
