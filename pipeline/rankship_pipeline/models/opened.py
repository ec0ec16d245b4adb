"""The models of a recipe, each opened once: its files and their hash, its headers, its untrained module, its adapter.

A model comes from a factory beside the recipe, from a Hugging Face folder, or from a Python session.
"""

import copy
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from rankship_pipeline.foundation.errors import BuildError, InputError
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.models.fit_names import Fit, fit_names
from rankship_pipeline.models.huggingface import (
    PREFIX,
    find_snapshot,
    list_snapshot_files,
    load_wrapped_state,
    make_wrapped,
)
from rankship_pipeline.models.lora import Adapter, list_adapter_files, read_adapter
from rankship_pipeline.models.module_hash import hash_module
from rankship_pipeline.models.plain_modules import copy_module, is_plain, make_plain
from rankship_pipeline.models.sharded import Checkpoint, describe_ignored, open_checkpoint
from rankship_pipeline.models.skeleton import Skeleton, read_skeleton
from rankship_pipeline.models.source import find_weights, list_factory_files, load_function, make_module, widen
from rankship_pipeline.models.weights import (
    State,
    TensorHeader,
    copy_state,
    describe_state,
    load_into,
    read_state,
    refuse_broken,
)
from rankship_pipeline.recipe.choices import Source


@dataclass(frozen=True)
class OpenedSource:
    """One model; each of its parts is read at its first use, and then kept.

    `module` is the trained module of a Python session, None for a model in files.
    """

    source: Source
    folder: Path
    seed: int
    module: nn.Module | None = None

    @property
    def name(self) -> str:
        """Its name in the recipe."""
        return self.source.name

    @property
    def prefix(self) -> str:
        """The prefix of the model's own tensor names in its module."""
        return "" if self.source.huggingface is None else PREFIX

    @cached_property
    def snapshot(self) -> Path:
        """The local folder of a Hugging Face model."""
        return find_snapshot(self.source, self.folder)

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """Where its tensors lie, without an adapter's; None for a model without files."""
        if self.source.huggingface is not None:
            return open_checkpoint(self.snapshot)
        return None if self.source.weights is None else open_checkpoint(find_weights(self.source, self.folder))

    @property
    def weights(self) -> tuple[Path, ...]:
        """The safetensors files with its tensors, without an adapter's; empty for a model without files."""
        return () if self.checkpoint is None else tuple(self.checkpoint.files)

    @cached_property
    def fit(self) -> Fit:
        """The names that a factory's module has for the tensors of its files; InputError if they do not fit it."""
        found = {} if self.checkpoint is None else self.checkpoint.read_headers()
        return fit_names(self.given, found, where=str(find_weights(self.source, self.folder)))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know of how its files are read."""
        ignored = None if self.checkpoint is None else describe_ignored(self.checkpoint)
        fit = () if self.source.weights is None else self.fit.remarks
        return (*fit, *(() if ignored is None else (ignored,)))

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """Every file that defines it: code, weights, configuration, adapter; none for a module in a session."""
        if self.module is not None:
            return ()
        if self.source.huggingface is not None:
            files = list_snapshot_files(self.snapshot)
        else:
            files = list_factory_files(self.source, self.folder)
        return (*files, *(() if self.adapter_folder is None else list_adapter_files(self.adapter_folder)))

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over all files; of a module in a session, over its tensors, attributes and code."""
        if self.module is not None:
            return hash_module(self.module)
        state = hashlib.sha256()
        for path in self.files:
            state.update(f"{path.name} {hash_file(path)}\n".encode())
        return state.hexdigest()

    @property
    def adapter_folder(self) -> Path | None:
        """The folder of its LoRA adapter, None without one."""
        return None if self.source.adapter is None else self.folder / self.source.adapter

    @cached_property
    def adapter(self) -> Adapter | None:
        """Its LoRA adapter, None without one."""
        return None if self.adapter_folder is None else read_adapter(self.adapter_folder)

    @cached_property
    def headers(self) -> Mapping[str, TensorHeader]:
        """Shape and type of every tensor, from its files' headers, or from its untrained module without files."""
        if self.checkpoint is None:
            return describe_state(self.given)
        return self.checkpoint.read_headers()

    @cached_property
    def given(self) -> nn.Module:
        """The architecture as its owner wrote it, in evaluation mode; do not change it.

        The seed gives all sources the same initialisation.
        """
        if self.module is not None:
            return widen(copy_module(self.module)).eval()
        torch.manual_seed(self.seed)
        if self.source.huggingface is not None:
            return make_wrapped(self.source, self.snapshot)
        return make_module(self.source, self.folder)

    @cached_property
    def untrained(self) -> nn.Module:
        """The architecture of plain layers (see plain_modules), with which every stage works; do not change it."""
        return self.given if is_plain(self.given) else make_plain(copy_module(self.given))

    def make(self) -> nn.Module:
        """A copy of the untrained module, to fill or change."""
        return copy.deepcopy(self.untrained)

    def check(self) -> None:
        """InputError if the weights or the adapter do not fit the module, or weights are not finite."""
        if self.source.weights is not None:
            _ = self.fit
            for path in self.weights:
                refuse_broken(path)
        if self.adapter is not None:
            state = self.given.state_dict()
            self.adapter.fit({self._bare(name): tuple(one.shape) for name, one in state.items()}, self._skeleton)

    def doubt_base(self) -> str | None:
        """What to say where its adapter names another model than this one; None if nothing."""
        if self.adapter is None or self.source.huggingface is None:
            return None
        return self.adapter.doubt_base(self.source.huggingface, str(self.snapshot.resolve()))

    def load_state(self) -> State:
        """The trained tensors by the names in `untrained`, float32 on the CPU, from files, the session, or training.

        An adapter is added to them. Raises BuildError if training diverges, InputError for files that do not fit.
        """
        state = self._load_given()
        if is_plain(self.given):
            return state
        return copy_state(make_plain(load_into(copy_module(self.given), state, where=self.name)))

    def _load_given(self) -> State:
        """The trained tensors by their own names."""
        if self.adapter is None:
            return self._load_bare(())
        skeleton = self._skeleton
        names = [self._bare(name) for name in self.given.state_dict()]
        supplied = [self.prefix + skeleton.find_name(name, names) for name in self.adapter.held]
        bare = {self._bare(name): tensor for name, tensor in self._load_bare(supplied).items()}
        return {self.prefix + name: tensor for name, tensor in self.adapter.add_to(bare, skeleton).items()}

    def _bare(self, name: str) -> str:
        return name.removeprefix(self.prefix)

    @property
    def _skeleton(self) -> Skeleton:
        """Of the model itself, by its own names."""
        return read_skeleton(self.given if not self.prefix else self.given.get_submodule(PREFIX.rstrip(".")))

    def _load_bare(self, supplied: Iterable[str]) -> State:
        if self.module is not None:
            return copy_state(self.given)
        if self.source.huggingface is not None:
            return load_wrapped_state(self.source, self.snapshot, set(supplied))
        if self.source.train is not None:
            return self._train()
        stored = {name: tensor for path in self.weights for name, tensor in read_state(path).items()}
        module = copy_module(self.given)
        found = {mine: stored[own] for mine, own in self.fit.names.items()}
        return copy_state(load_into(module, {**module.state_dict(), **found}, where=self.name))

    def _train(self) -> State:
        module = copy_module(self.given)
        torch.manual_seed(self.seed)
        load_function(str(self.source.train), self.folder)(module, self.seed)
        broken = [name for name, value in module.state_dict().items() if not value.isfinite().all()]
        if broken:
            raise BuildError(f"training {self.name!r} diverged: {broken[0]} is not finite", hint="lower its step size")
        return copy_state(module)


def open_source(source: Source, folder: Path, seed: int) -> OpenedSource:
    """Open one model of a recipe; InputError at once if a function that it names does not exist."""
    for reference in (source.factory, source.train):
        if reference is not None:
            load_function(reference, folder)
    return OpenedSource(source, folder, seed)


def open_sources(
    sources: Iterable[Source], folder: Path, seed: int, held: Mapping[str, nn.Module] | None = None
) -> dict[str, OpenedSource]:
    """Open every model by its name; InputError if the recipe expects one from the session that it does not have."""
    opened = {}
    for source in sources:
        if not source.held:
            opened[source.name] = open_source(source, folder, seed)
        elif source.name in (held or {}):
            opened[source.name] = OpenedSource(source, folder, seed, _unwrap((held or {})[source.name]))
        else:
            message = f"model {source.name!r} is a module of a Python session (`held`), and none was given"
            raise InputError(message, hint="name its files: factory and weights, or huggingface")
    return opened


def _unwrap(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's, DataParallel's or DistributedDataParallel's wrapper, or the module itself."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inside: object = module.module
    else:
        inside = getattr(module, "_orig_mod", None)
    return _unwrap(inside) if isinstance(inside, nn.Module) else module
