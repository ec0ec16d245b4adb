"""Reads and writes a checkpoint in one or several safetensors files, with or without an index."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.pickled import describe_pickle
from rankship_pipeline.models.weights import (
    AGAIN,
    TensorHeader,
    is_finite,
    locate_tensors,
    open_tensors,
    read_header,
    refuse_infinite,
)

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # the names that transformers reads
_INDEX_ENDING, _STATED = ".safetensors.index.json", "transformers_weights"  # the latter names a file in config.json
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_SHOWN = 5
_SETTINGS = ("*.json", "*.jinja", "tokenizer*", "vocab*", "merges*", "LICENSE*")  # copied from beside the weights


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and safetensors, sharded or not; `places` maps each tensor to its file.

    `index` is the file that names the shards. `ignored` are the folder's other safetensors files.
    """

    folder: Path
    places: Mapping[str, Path]
    index: Path | None = None
    ignored: tuple[Path, ...] = ()

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

    def read_headers(self) -> dict[str, TensorHeader]:
        """Every tensor's shape and type, from the files' headers."""
        return {name: header for path in self.files for name, header in read_header(path).items()}

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


def open_checkpoint(given: Path) -> Checkpoint:
    """Find every tensor of a folder, an index or a single file, by the files' own headers.

    Of a folder's files those are read that transformers reads (`_choose_files`). InputError with a tensor and its file
    if a file is missing or damaged, or if two files hold one tensor.
    """
    files, index = _choose_files(given) if given.is_dir() else _follow(given)
    if index is not None:
        _check_index(index)
    places: dict[str, Path] = {}
    twice: dict[str, list[str]] = {}
    for path in files:
        for name in read_header(path):
            if name in places:
                twice.setdefault(name, [places[name].name]).append(path.name)
            places[name] = path
    if twice:
        name, holders = next(iter(twice.items()))
        raise InputError(
            f"{given}: {len(twice)} tensors are in more than one file, such as {name} in {' and '.join(holders)}",
            hint="move the files that do not belong to this model away",
        )
    folder = given if given.is_dir() else given.parent
    others = sorted(set(folder.glob("*.safetensors")) - set(files)) if given.is_dir() else []
    return Checkpoint(folder=folder, places=places, index=index, ignored=tuple(others))


def list_weight_files(given: Path) -> list[Path]:
    """The files of a checkpoint whose content is its weights: the index, if there is one, and what it names."""
    files, index = _choose_files(given) if given.is_dir() else _follow(given)
    return [*([] if index is None else [index]), *files]


def describe_ignored(checkpoint: Checkpoint) -> str | None:
    """A sentence on the safetensors files of a folder that are not read, None where all are."""
    names = [path.name for path in checkpoint.ignored]
    if not names:
        return None
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    read = checkpoint.index or checkpoint.files[0]
    return f"{checkpoint.folder}: {shown} not read: like transformers, Rankship goes by {read.name}"


def _choose_files(folder: Path) -> tuple[list[Path], Path | None]:
    """The sorted files that transformers loads from a folder, and their index.

    They are those that config.json states, model.safetensors, or what its index names (modeling_utils'
    _get_resolved_checkpoint_files). Where transformers would find none: those of the only other index, one whole set of
    shards, a single file, or all files.
    """
    stated = _read_stated(folder)
    for name in (stated, WHOLE, INDEX):
        if name is not None and (name == stated or (folder / name).is_file()):
            return _follow(folder / name)
    indices = sorted(folder.glob(f"*{_INDEX_ENDING}"))
    if len(indices) == 1:
        return _follow(indices[0])
    files = sorted(folder.glob("*.safetensors"))
    sets: dict[tuple[str, str], list[Path]] = {}
    for path in files:
        if (part := _SHARD.fullmatch(path.name)) is not None:
            sets.setdefault((part["stem"], part["count"]), []).append(path)
    whole = [paths for (_, count), paths in sets.items() if len(paths) == int(count)]
    if len(whole) == 1:
        return whole[0], None
    if sets and not whole:
        (stem, count), paths = next(iter(sets.items()))
        raise InputError(f"{folder} holds {len(paths)} of the {int(count)} shards of {stem}, and no index", hint=AGAIN)
    if not files:
        _refuse_none(folder)
    return files, None


def _read_stated(folder: Path) -> str | None:
    """The file of weights that a config.json states, None without one; InputError if it is outside the folder."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # who needs the configuration says what is wrong with it
    name = config.get(_STATED) if isinstance(config, dict) else None
    if name is not None and not (folder / str(name)).resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{folder / 'config.json'}: {_STATED} = {name!r} is outside the folder", hint=AGAIN)
    return None if name is None else str(name)


def _refuse_none(folder: Path) -> NoReturn:
    """Raise the InputError for a folder without safetensors, with what to do about pickles in it."""
    pickles = [path for ending in ("bin", "pt", "pth") for path in sorted(folder.glob(f"*.{ending}"))]
    hint = "save the model again with save_pretrained"
    if len(pickles) == 1:
        hint = describe_pickle(pickles[0], folder / WHOLE)[1]
    raise InputError(f"{folder} has no *.safetensors" + (", only pickles" if pickles else ""), hint=hint)


def _follow(path: Path) -> tuple[list[Path], Path | None]:
    """The files that an index names, and the index; or the file itself."""
    if not path.name.endswith(_INDEX_ENDING):
        return [path], None
    return sorted(set(read_index(path).values())), path


def _check_index(index: Path) -> None:
    """InputError for a tensor that is not where the index says."""
    places = read_index(index)
    for path in sorted(set(places.values())):
        names = [name for name, place in places.items() if place == path]
        lost = sorted(names - locate_tensors(path, f"tensor {names[0]}").keys())
        if lost:
            raise InputError(f"{path} lacks tensor {lost[0]}, which the index says it holds", hint=AGAIN)


def read_index(path: Path) -> dict[str, Path]:
    """The file of each tensor, from Hugging Face's index."""
    try:
        names: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {name: path.parent / file for name, file in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is not an index of safetensors files", hint=AGAIN) from None


def copy_settings(folder: Path, target: Path) -> None:
    """Copy what lies beside a checkpoint's weights: configuration, tokenizer, licence; nothing that names its files."""
    for path in {path for pattern in _SETTINGS for path in folder.glob(pattern)}:
        if path.is_file() and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
    if _read_stated(target) is not None:
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        del config[_STATED]
        (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def name_shards(count: int) -> list[str]:
    """The names by which transformers loads a checkpoint of so many files; several need an index beside them."""
    return [WHOLE] if count == 1 else [f"model-{one:05d}-of-{count:05d}.safetensors" for one in range(1, count + 1)]
