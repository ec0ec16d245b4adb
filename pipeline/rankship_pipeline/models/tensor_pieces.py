"""Reads and writes safetensors piece by piece: a few rows of one tensor at a time, without mapping the file.

The safetensors library maps the file to read rows (the pages read count as this process's memory until it is closed) or
reads the whole tensor for every few rows; and it writes a file only from tensors that are all in memory. The format is
eight bytes of length, a JSON header, and the tensors' bytes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedWriter
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rankship_pipeline.models.weights import locate_tensors

# safetensors' names of types → torch's
TYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in TYPES.items()}
_LENGTH_BYTES = 8  # of the header's length, little-endian; the header is padded to a multiple of it


class Readable(Protocol):
    """A tensor that is read some rows at a time; `dtype` is its stored type, `type_name` safetensors' name of it."""

    @property
    def type_name(self) -> str: ...  # noqa: D102 - said above

    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102 - said above

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102 - its own

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Read some or all rows."""
        ...


def count_rows(tensor: Readable) -> int:
    """The size of the first dimension; 1 for a scalar."""
    return tensor.shape[0] if tensor.shape else 1


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in a file: `offset` in bytes, and safetensors' `type_name`."""

    path: Path
    type_name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> torch.dtype:
        """The torch type; KeyError if it is not in TYPES."""
        return TYPES[self.type_name]

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Read some or all rows as they are stored."""
        stop = count_rows(self) if stop is None else stop
        shape = self.shape and (stop - start, *self.shape[1:])
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        if prod(shape) == 0:
            return torch.empty(shape, dtype=self.dtype)
        raw = np.fromfile(self.path, np.uint8, (stop - start) * row_bytes, offset=self.offset + start * row_bytes)
        return torch.from_numpy(raw).view(self.dtype).reshape(shape)


def open_pieces(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file, in the order stored; InputError if the file is missing, pickled or damaged."""
    found = locate_tensors(path).items()
    return {name: StoredTensor(path, header.dtype, header.shape, offset) for name, (header, offset) in found}


def write_header(stream: BufferedWriter, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Write the header of a file whose tensors follow in this order, without gaps."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    stream.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)


def write_piece(stream: BufferedWriter, piece: Tensor) -> None:
    """Write the bytes of a tensor or of its next rows."""
    if piece.numel() == 0:
        return
    stream.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
