"""Merges whole checkpoints from disk to disk, one tensor at a time, or some rows at a time if the method allows.

Memory is bounded by the largest tensor times the number of models and the base, in float32. Methods that work by rows
(average, task arithmetic, DARE, DELLA) need some megabytes; TIES also needs one change of the largest tensor.
"""

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from rankship_pipeline.align.descent import describe_descent
from rankship_pipeline.align.differences import refuse_unlike
from rankship_pipeline.align.facts import gather_folder_facts
from rankship_pipeline.align.padding import PaddedTensor, find_padding
from rankship_pipeline.foundation.codec import digest, encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import flush_folder, publish_file
from rankship_pipeline.foundation.toolchain import hash_code, list_versions
from rankship_pipeline.merge import Method, choose_method
from rankship_pipeline.merge.tensors import MergeInput, seed_generators
from rankship_pipeline.models.constants import is_constant
from rankship_pipeline.models.decoder import refuse_quantised
from rankship_pipeline.models.fit_names import match_names, unwrap_names
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.models.lora import AdaptedTensor, Change, list_adapter_files, read_adapter
from rankship_pipeline.models.lora_config import CONFIG
from rankship_pipeline.models.model_config import read_json
from rankship_pipeline.models.sharded import (
    INDEX,
    Checkpoint,
    copy_settings,
    describe_ignored,
    name_shards,
    open_checkpoint,
)
from rankship_pipeline.models.skeleton import Skeleton, read_folder_skeleton
from rankship_pipeline.models.tensor_pieces import TYPES, Readable, count_rows, open_pieces, write_header, write_piece
from rankship_pipeline.models.ties import fit_ties
from rankship_pipeline.models.weights import TensorHeader
from rankship_pipeline.recipe.merge_file import MergeFile
from rankship_pipeline.recipe.merge_methods import fill_settings

RECORD = "rankship-merge.json"
PIECE = 1 << 20  # elements of one model that a method by rows works on at a time
_TABLES = ("*embed*", "*wte.*", "*wpe.*", "shared.*")  # names of embeddings, whose rows are tokens
_MATRIX, _KERNEL = 2, 4  # dimensions of a linear layer's weight and of a convolution's


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint and its tensors by name; `files` are all files that it is read from.

    The `checkpoint` of an adapter is its base's.
    """

    name: str
    checkpoint: Checkpoint
    tensors: Mapping[str, Readable]
    files: tuple[Path, ...]


def merge_checkpoints(asked: MergeFile, folder: Path, target: Path, steps: Steps) -> None:
    """Merge into the new folder `target`: the first model's shards and settings, with merged tensors.

    Shards are written one by one to a hidden folder beside it, named by a hash of everything that affects the result.
    After an interruption the same call resumes at the first missing shard. `target` appears whole, in one rename.
    """
    if target.exists():
        raise InputError(f"{target} exists already", hint="name a new folder with --to, or delete this one")
    base = None if asked.base is None else open_model(folder / asked.base, None, steps)
    models = [open_model(folder / name, base, steps) for name in asked.models]
    everything = _make_alike(models if base is None else [*models, base], steps)
    models, base = everything[: len(models)], None if base is None else everything[-1]
    work = target.parent / f".{target.name}.{_hash(asked, everything)[:20]}.part"
    work.mkdir(parents=True, exist_ok=True)
    merging = Merging(asked=asked, models=models, base=base)
    files = models[0].checkpoint.files
    names = {own: name for name, own in unwrap_names(models[0].checkpoint.places).items()}
    places: dict[str, str] = {}
    with steps.track(f"merge {len(models)} checkpoints by {asked.merge.method}", len(files)) as begin:
        for path, file in zip(files, name_shards(len(files)), strict=True):
            begin(file)
            tensors = {names[own]: one for own, one in open_pieces(path).items()}
            places |= dict.fromkeys(tensors, file)
            if not (work / file).exists():
                with publish_file(work / file) as temporary:
                    merging.write_shard(tensors, temporary)
    copy_settings(models[0].checkpoint.folder, work)
    if len(files) > 1:
        _write_index(work, places, models[0], merging)
    if asked.dtype is not None:
        _change_type(work / "config.json", asked.dtype)
    (work / RECORD).write_text(encode(asked), encoding="utf-8")
    flush_folder(work)
    work.rename(target)
    for leftover in target.parent.glob(f".{target.name}.*.part"):  # of other merges to the same target
        shutil.rmtree(leftover)


def open_model(folder: Path, base: OpenedModel | None, steps: Steps) -> OpenedModel:
    """Find every tensor of a checkpoint folder, or of an adapter and its base; InputError for a damaged file.

    A note says where an adapter seems to belong to another base.
    """
    if not (folder / CONFIG).is_file():
        return _open_checkpoint(folder)
    if base is None:
        raise InputError(f"{folder} is an adapter and needs its base model", hint="name that model in base")
    adapter = read_adapter(folder)
    origin = base.checkpoint.folder
    changes = adapter.fit({name: one.shape for name, one in base.tensors.items()}, read_folder_skeleton(origin))
    doubts = [
        adapter.doubt_base(base.name, str(origin.resolve()), read_json(origin / "config.json").get("_name_or_path"))
    ]
    doubts += [_doubt_tokens(folder, origin)]
    doubts += [_doubt_tensor(folder, name, base.tensors[name], change) for name, change in changes.items()]
    for doubt in filter(None, doubts):
        steps.note(doubt)
    tensors = {
        name: AdaptedTensor(one, changes[name]) if name in changes else one for name, one in base.tensors.items()
    }
    return OpenedModel(str(folder), base.checkpoint, tensors, (*base.files, *list_adapter_files(folder)))


def _doubt_tokens(folder: Path, origin: Path) -> str | None:
    """What to say where an adapter comes with a vocabulary that is not its base's."""
    own, theirs = (gather_folder_facts("", one, {}).tokens for one in (folder, origin))
    if not own or own == theirs:
        return None
    return (
        f"{folder} has its own tokenizer of {len(own)} tokens; the new folder gets that of {origin}: copy the right one"
    )


def _doubt_tensor(folder: Path, name: str, stored: Readable, change: Change) -> str | None:
    """What to say where an adapter comes with the weights that it changes, and those are not the base's."""
    if change.held is None or change.product is None:
        return None
    if all(torch.equal(change.held[a:b].to(stored.dtype), stored.read(a, b)) for a, b in list_pieces(stored)):
        return None
    return f"{folder} has its own {name}, which is not the base's: it was trained on another one, or on a changed one"


def _open_checkpoint(folder: Path) -> OpenedModel:
    """A folder's tensors and their places in the files, also tensors in these files that an index does not name.

    InputError for a quantised model.
    """
    refuse_quantised(folder)
    found = open_checkpoint(folder)
    pieces = {name: one for path in found.files for name, one in open_pieces(path).items()}
    checkpoint = replace(found, places={name: one.path for name, one in pieces.items()})
    stored = {name: pieces[own] for name, own in unwrap_names(pieces).items()}
    return OpenedModel(str(folder), checkpoint, stored, tuple(found.files))


def _make_alike(models: list[OpenedModel], steps: Steps) -> list[OpenedModel]:
    """The models with the first one's names and rows; refuse what cannot be merged, and print notes on the rest."""
    models = [_fit_ties(_rename(model, models[0], steps), models[0]) for model in models]
    for model in models:
        for name, stored in model.tensors.items():
            if stored.type_name not in TYPES:
                raise InputError(
                    f"tensor {name} of {model.name} is stored as {stored.type_name}, which cannot be merged",
                    hint=f"store the model as one of {', '.join(TYPES)}",
                )
    facts = []
    for model in models:
        ignored = describe_ignored(model.checkpoint)
        if ignored is not None:
            steps.note(ignored)
        facts.append(gather_folder_facts(model.name, model.checkpoint.folder, _read_headers(model)))
    for note in refuse_unlike(facts):
        steps.note(note)
    for model in models[1:]:
        remedy = "take models fine-tuned from one, or a recipe with merge.align"
        said = describe_descent(model.name, model.tensors, models[0].name, models[0].tensors, remedy)
        if said is not None:
            steps.note(said)
    return [_pad(model, find_padding(facts[0], one), models[0]) for model, one in zip(models, facts, strict=True)]


def _rename(model: OpenedModel, first: OpenedModel, steps: Steps) -> OpenedModel:
    """The model with the first one's names, where only a wrapper's prefix sets them apart."""
    headers = [
        {name: TensorHeader(one.shape, one.type_name) for name, one in each.tensors.items()} for each in (first, model)
    ]
    fit = match_names(headers[0], headers[1], where=model.name)
    if fit is None:
        return model
    for remark in fit.remarks:
        steps.note(remark)
    renamed = {mine: model.tensors[own] for mine, own in fit.names.items()}
    return replace(model, tensors=renamed)


def _fit_ties(model: OpenedModel, first: OpenedModel) -> OpenedModel:
    """The model with the first one's names of tied tensors, of which a checkpoint may store copies."""
    if model.tensors.keys() == first.tensors.keys():
        return model
    skeletons = [read_folder_skeleton(one.checkpoint.folder) or Skeleton() for one in (model, first)]
    tensors = fit_ties(
        model.tensors, first.tensors, (skeletons[0], skeletons[1]), where=f"{model.name} and {first.name}"
    )
    return replace(model, tensors=tensors)


def _read_headers(model: OpenedModel) -> dict[str, TensorHeader]:
    return {name: TensorHeader(one.shape, one.type_name) for name, one in model.tensors.items()}


def _pad(model: OpenedModel, names: Collection[str], first: OpenedModel) -> OpenedModel:
    """The model with as many rows for padding as the first."""
    padded = {name: PaddedTensor(model.tensors[name], first.tensors[name]) for name in names}
    return replace(model, tensors={**model.tensors, **padded})


@dataclass(frozen=True)
class Merging:
    """One running merge."""

    asked: MergeFile
    models: list[OpenedModel]
    base: OpenedModel | None

    def choose_type(self, first: Readable) -> torch.dtype:
        """The type in which the merged tensor is stored."""
        if self.asked.dtype is None or not first.dtype.is_floating_point:
            return first.dtype
        found: torch.dtype = getattr(torch, self.asked.dtype)
        return found

    def write_shard(self, tensors: Mapping[str, Readable], path: Path) -> None:
        """Write one file with these tensors merged, in their order."""
        with path.open("wb") as stream:
            write_header(stream, {name: (self.choose_type(one), one.shape) for name, one in tensors.items()})
            for name, first in tensors.items():
                for piece in self.merge_tensor(name, first):
                    stored = piece.to(self.choose_type(first))
                    if stored.is_floating_point() and not bool(stored.isfinite().all()):
                        self._refuse_infinite(name, piece, stored.dtype)
                    write_piece(stream, stored)

    def _refuse_infinite(self, name: str, piece: Tensor, dtype: torch.dtype) -> NoReturn:
        """Raise the InputError for a tensor that is not finite, or too large for the type in which it is stored."""
        if not bool(piece.isfinite().all()):
            raise InputError(f"the merged tensor {name} has NaN or infinity", hint=f"check it in {self._list_models()}")
        raise InputError(
            f"the merged tensor {name} reaches {float(piece.abs().max()):.4g}, more than"
            f" {str(dtype).removeprefix('torch.')} can hold ({torch.finfo(dtype).max:.5g}): it would overflow",
            hint='write dtype = "bfloat16" or "float32" into the merge file',
        )

    def merge_tensor(self, name: str, first: Readable) -> Iterator[Tensor]:
        """The merged tensor before rounding, in pieces of some rows; what is not trained comes from the first model."""
        if not first.dtype.is_floating_point or is_constant(name, TensorHeader(first.shape, first.type_name)):
            yield first.read()
            return
        method = choose_method(self.asked.merge.method, name)
        stored = [model.tensors[name] for model in self.models]
        base = None if self.base is None else self.base.tensors[name]
        marks = self._survey(method, stored, base)
        generators = seed_generators(self.asked.seed, name, len(stored))
        for start, stop in list_pieces(first) if method.by_rows else [(0, count_rows(first))]:
            given = MergeInput(
                values=tuple(_widen(one.read(start, stop)) for one in stored),
                settings=self._settings,
                base=None if base is None else _widen(base.read(start, stop)),
                layer=guess_layer(name, first.shape),
                marks=marks,
                generators=generators,
            )
            yield method.merge(given)

    @property
    def _settings(self) -> dict[str, float]:
        return fill_settings(self.asked.merge.method, self.asked.merge.given)

    def _survey(self, method: Method, stored: list[Readable], base: Readable | None) -> tuple[float, ...]:
        """The survey of each model's whole change, one model after the other."""
        if method.survey is None or base is None:
            return ()
        marks = []
        for one in stored:
            magnitudes = torch.empty(prod(one.shape), dtype=torch.promote_types(one.dtype, torch.float32))
            row = prod(one.shape[1:])
            for start, stop in list_pieces(one):
                change = _widen(one.read(start, stop)) - _widen(base.read(start, stop))
                magnitudes[start * row : stop * row] = change.abs_().flatten()
            marks.append(method.survey(magnitudes, self._settings))
        return tuple(marks)

    def _list_models(self) -> str:
        return ", ".join(model.name for model in self.models)


def list_pieces(tensor: Readable) -> list[tuple[int, int]]:
    """First row and row after the last of every piece; a vector is one piece, as some methods treat it as a row."""
    rows, row = count_rows(tensor), prod(tensor.shape[1:])
    step = max(1, PIECE // max(1, row)) if len(tensor.shape) > 1 else max(1, rows)
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]


def guess_layer(name: str, shape: tuple[int, ...]) -> Layer | None:
    """How a tensor is seen as a matrix, guessed from its name and shape, as there is no module."""
    if not name.endswith(".weight") or len(shape) not in {_MATRIX, _KERNEL}:
        return None
    layer, columns = name.removesuffix(".weight"), prod(shape[1:])
    if any(fnmatchcase(name, pattern) for pattern in _TABLES):
        return Layer(name=layer, rows=columns, columns=shape[0], kind="embedding")
    if len(shape) == _MATRIX:
        return Layer(name=layer, rows=shape[0], columns=columns)
    return Layer(name=layer, rows=shape[0], columns=columns, kind="convolution", kernel=(shape[2], shape[3]))


def _widen(tensor: Tensor) -> Tensor:
    """The tensor in the type for computing: float64 unchanged, all others as float32."""
    return tensor if tensor.dtype in {torch.float64, torch.float32} else tensor.to(torch.float32)


def _write_index(folder: Path, places: Mapping[str, str], first: OpenedModel, merging: Merging) -> None:
    size_bytes = sum(prod(one.shape) * merging.choose_type(one).itemsize for one in first.tensors.values())
    index = {"metadata": {"total_size": size_bytes}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")


def _change_type(path: Path, dtype: str) -> None:
    """Set the type of the weights in a config.json, if there is one."""
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _hash(asked: MergeFile, models: list[OpenedModel]) -> str:
    """Hash everything that affects the result; of checkpoint files name, size and time, as hashing is slow."""
    files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for model in models for path in model.files]
    return digest({"asked": encode(asked), "files": files, "code": hash_code(), "versions": list_versions()})
