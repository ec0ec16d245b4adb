"""Computes a stage's result once and then reads it from the store, by the hash of everything it depends on."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankship_pipeline.foundation import profile
from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.spare import give_back_memory
from rankship_pipeline.foundation.store import Entry, Store
from rankship_pipeline.foundation.toolchain import hash_code, list_versions
from rankship_pipeline.models.weights import State

T = TypeVar("T")


@dataclass(frozen=True)
class Form(Generic[T]):
    """How a result is stored: `write` writes it to a folder, `read` reads it from the finished entry."""

    write: Callable[[T, Path], None]
    read: Callable[[Entry], T]


@dataclass(frozen=True)
class Kept(Generic[T]):
    """A finished result: the entry that holds it, and how it is read from there."""

    entry: Entry
    form: Form[T]

    @cached_property
    def value(self) -> T:
        """The result, read when it is first needed, and then kept in memory."""
        return self.read()

    def read(self) -> T:
        """Read the result without keeping it."""
        return self.form.read(self.entry)

    @property
    def content(self) -> str:
        """The hash that later stages depend on."""
        return self.entry.content


class Keep(Protocol):
    """How a stage's result comes to be: `cached_stage`, or another with its parameters."""

    def __call__(
        self,
        store: Store,
        kind: str,
        made_from: Mapping[str, object],
        form: Form[T],
        compute: Callable[[], T],
        /,
        *,
        steps: Steps | None = None,
        title: str = "",
    ) -> Kept[T]:
        """Return a stage's finished result."""
        ...


def stamp(made_from: Mapping[str, object]) -> dict[str, object]:
    """A stage's ingredients, with the hash of our code and the versions that affect a model."""
    return {**made_from, "code": hash_code(), "versions": list_versions()}


def cached_stage(
    store: Store,
    kind: str,
    made_from: Mapping[str, object],
    form: Form[T],
    compute: Callable[[], T],
    *,
    steps: Steps | None = None,
    title: str = "",
) -> Kept[T]:
    """Read the result of a stage, or compute and store it; with `steps` the computation is shown as `title`."""
    ingredients = stamp(made_from)
    entry = store.find(kind, ingredients)
    if entry is None:
        with profile.stage(kind) if steps is None else steps.step(title):
            value = compute()  # before a folder is made: one that nothing is written into for a day is swept away
            entry = store.produce(kind, ingredients, partial(form.write, value))
            del value
            give_back_memory()
    return Kept(entry, form)


class Unmade(Exception):
    """Says that a stage has no result in the store."""


def find_stage(
    store: Store,
    kind: str,
    made_from: Mapping[str, object],
    form: Form[T],
    _compute: Callable[[], T],
    *,
    steps: Steps | None = None,  # noqa: ARG001 - as cached_stage takes it
    title: str = "",
) -> Kept[T]:
    """Find the result of a stage as `cached_stage` does; Unmade where that would have to compute it."""
    entry = store.find(kind, stamp(made_from))
    if entry is None:
        raise Unmade(title)
    return Kept(entry, form)


def as_record(kind: type[T], file: str) -> Form[T]:
    """Store a record, or a mapping of numbers, as JSON."""

    def write(value: T, folder: Path) -> None:
        (folder / file).write_text(encode(value), encoding="utf-8")

    return Form(write, lambda entry: decode(kind, entry.read(file).read_bytes(), where=str(entry.folder)))


def as_tensors(file: str) -> Form[State]:
    """Store tensors by name as safetensors."""
    return Form(
        lambda value, folder: save_file(value, folder / file),
        lambda entry: load_file(entry.read(file)),
    )


class _Stored(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for, and no longer in memory than it is needed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, "pt") as file:
            self._names = dict.fromkeys(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        with safe_open(self._path, "pt") as file:
            found: Tensor = file.get_tensor(name)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def as_matrices(file: str) -> Form[Mapping[str, Tensor]]:
    """Store tensors by name as safetensors, of which few are needed at a time."""
    return Form(
        lambda value, folder: save_file(dict(value), folder / file),
        lambda entry: _Stored(entry.read(file)),
    )


@dataclass(frozen=True)
class Trained(Generic[T]):
    """A model's tensors, whether its batch-norm statistics were re-estimated, and the stage's other result."""

    state: State
    batchnorm_reestimated: bool
    found: T


@record
class _Norms:
    reestimated: bool


_STATE = as_tensors("state.safetensors")
_NORMS = as_record(_Norms, "batchnorm.json")


def as_model(found: Form[T]) -> Form[Trained[T]]:
    """Store a trained model and its stage's other result, in the form `found`."""

    def write(value: Trained[T], folder: Path) -> None:
        _STATE.write(value.state, folder)
        _NORMS.write(_Norms(reestimated=value.batchnorm_reestimated), folder)
        found.write(value.found, folder)

    return Form(write, lambda entry: Trained(_STATE.read(entry), _NORMS.read(entry).reestimated, found.read(entry)))
