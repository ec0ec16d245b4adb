"""Reads and writes a checkpoint in one or several safetensors files, with or without an index."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.weights import (
    AGAIN,
    is_finite,
    locate_tensors,
    open_tensors,
    read_header,
    refuse_infinite,
)

INDEX = "model.safetensors.index.json"
SETTINGS = ("*.json", "*.jinja", "tokenizer*", "vocab*", "merges*", "LICENSE*")  # copied from beside the weights


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and safetensors, sharded or not; `places` maps each tensor to its file."""

    folder: Path
    places: Mapping[str, Path]

    @property
    def files(self) -> list[Path]:
        """Every file that holds a tensor, sorted."""
        return sorted(set(self.places.values()))

    def read(self, name: str) -> Tensor:
        """Read one tensor as it is stored, and nothing else; InputError if it has NaN or infinity."""
        path = self.locate(name)
        with open_tensors(path, f"tensor {name}") as file:
            tensor: Tensor = file.get_tensor(name)
        refuse_infinite(path, [] if is_finite(tensor) else [name])
        return tensor

    def read_shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from its file's header."""
        with open_tensors(self.locate(name), f"tensor {name}") as file:
            return tuple(file.get_slice(name).get_shape())

    def locate(self, name: str) -> Path:
        """The file that holds a tensor."""
        if name not in self.places:
            files = ", ".join(path.name for path in self.files)
            raise InputError(f"tensor {name} is in none of {self.folder}'s files ({files})", hint=AGAIN)
        return self.places[name]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find every tensor, by the index or by the files' own headers.

    InputError with a tensor and its file if a file is missing or damaged, before any long work.
    """
    places = read_index(folder / INDEX) if (folder / INDEX).is_file() else {}
    for path in sorted(set(places.values())):
        names = [name for name, place in places.items() if place == path]
        lost = sorted(names - locate_tensors(path, f"tensor {names[0]}").keys())
        if lost:
            raise InputError(f"{path} lacks tensor {lost[0]}, which the index says it holds", hint=AGAIN)
    for path in [] if places else sorted(folder.glob("*.safetensors")):
        places |= dict.fromkeys(read_header(path), path)
    if not places:
        raise InputError(f"{folder} has no *.safetensors", hint="save the model again with save_pretrained")
    return Checkpoint(folder=folder, places=places)


def read_index(path: Path) -> dict[str, Path]:
    """The file of each tensor, from Hugging Face's index."""
    try:
        names: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {name: path.parent / file for name, file in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is not an index of safetensors files", hint=AGAIN) from None


def write_shards(folder: Path, groups: Sequence[Sequence[str]], convert: Callable[[str], Mapping[str, Tensor]]) -> None:
    """Write one safetensors file per group of names, with the tensors that `convert` returns, and an index."""
    places: dict[str, str] = {}
    size_bytes = 0
    for number, names in enumerate(groups, 1):
        tensors = {new: tensor for name in names for new, tensor in convert(name).items()}
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        size_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size_bytes}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")
