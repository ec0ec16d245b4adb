"""The hash of a module that a Python session holds: its tensors and its code, as they are in memory.

Files say too little: a class may be typed into a notebook, and a file may have been edited since it was imported.
"""

import dis
import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from enum import Enum
from itertools import chain
from pathlib import Path, PurePath
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_LIBRARIES = {"torch", "transformers", *sys.stdlib_module_names}  # their classes are known by name
_INSTALLED = {"site-packages", "dist-packages"}
_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, type(...), range, slice),
    *(Enum, PurePath, torch.dtype, torch.device),
)
_NOT_CODE = {
    *("__dict__", "__weakref__", "__module__", "__doc__", "__annotations__", "__firstlineno__"),
    *("__abstractmethods__", "_abc_impl", "__slotnames__"),  # the last is written by copying
}
_NOT_SET = set(vars(nn.Module()))  # what torch itself keeps in every module
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_WHERE_FROM = {"_name_or_path", "_commit_hash"}  # of a transformers configuration


def hash_module(module: nn.Module) -> str:
    """SHA-256 over everything that decides what the module computes: tensors, plain attributes and code."""
    state = hashlib.sha256()
    for line in _Description().describe(module):
        state.update(f"{line}\n".encode(errors="surrogatepass"))
    return state.hexdigest()


class _Description:
    """Describes a value and what it reaches in lines without addresses; what comes again is named by its number."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, object]] = {}  # with the value, so that no other takes its place in memory
        self._classes: set[type] = set()

    def describe(self, value: Any) -> Iterator[str]:  # noqa: ANN401 - whatever an attribute holds
        """The value's lines."""
        if isinstance(value, _PLAIN):
            yield repr(value)
            return
        if id(value) in self._seen:
            yield f"again {self._seen[id(value)][0]}"
            return
        if not isinstance(value, tuple):  # Python may share equal ones, or not
            self._seen[id(value)] = len(self._seen), value
        yield f"{type(value).__module__}.{type(value).__qualname__}"
        yield from self._open(value)

    def _open(self, value: Any) -> Iterator[str]:  # noqa: ANN401 - as above
        if isinstance(value, nn.Module):
            yield from self._describe_module(value)
        elif isinstance(value, type):
            for kind in value.__mro__:
                yield from self._describe_class(kind, needed=_is_own(kind.__module__))
        elif isinstance(value, FunctionType) and _is_own(value.__module__):
            yield from self._describe_function(value)
        elif (parts := _take_apart(value)) is not None:
            for one in parts:
                yield from self.describe(one)
        else:
            yield _write(value)

    def _describe_module(self, module: nn.Module) -> Iterator[str]:
        """A module and those inside it: classes, tensors that are saved and that are not, attributes, hooks."""
        for name, one in module.named_modules(remove_duplicate=False):
            yield f"{name}: {type(one).__module__}.{type(one).__qualname__} {one.extra_repr()}"
            for kind in type(one).__mro__:
                yield from self._describe_class(kind, needed=kind.__module__.partition(".")[0] not in _LIBRARIES)
            for what, tensor in (*one.named_parameters(recurse=False), *one.named_buffers(recurse=False)):
                yield f"{what} {_hash_tensor(tensor)}"
            yield from self.describe({what: value for what, value in vars(one).items() if what not in _NOT_SET})
            for hooks in _HOOKS:
                yield from self.describe(list(getattr(one, hooks, {}).values()))

    def _describe_class(self, kind: type, *, needed: bool) -> Iterator[str]:
        """A class's name; where its code is `needed`, what it defines too."""
        yield f"class {kind.__module__}.{kind.__qualname__}"
        if not needed or kind in self._classes:
            return
        self._classes.add(kind)
        for name, value in vars(kind).items():
            if name not in _NOT_CODE:
                yield name
                yield from self.describe(value)

    def _describe_function(self, function: FunctionType) -> Iterator[str]:
        """A function's code, its defaults, what it encloses, and the globals that it reads."""
        yield from self.describe(function.__code__)
        yield from self.describe((function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # an empty cell
                yield from self.describe(cell.cell_contents)
        for name in _list_globals(function.__code__):
            if name in function.__globals__:
                value = function.__globals__[name]
                yield name
                yield from self.describe(value)
                if isinstance(value, ModuleType):
                    yield from self._describe_used(value, _list_names(function.__code__), ())

    def _describe_used(self, module: ModuleType, names: list[str], above: tuple[ModuleType, ...]) -> Iterator[str]:
        """What these names stand for in a module of the user's own, and in those inside it."""
        if module in above or not _is_own(module.__name__):
            return
        for name in names:
            value = vars(module).get(name)
            yield from self.describe(value)
            if isinstance(value, ModuleType):
                yield from self._describe_used(value, names, (*above, module))


_PARTS: tuple[tuple[type, Callable[[Any], Iterable[object]]], ...] = (
    (Mapping, lambda one: chain.from_iterable(one.items())),
    (tuple, list),
    (list, list),
    (CodeType, lambda one: (one.co_code, one.co_names, one.co_consts)),
    (staticmethod, lambda one: (one.__func__,)),
    (classmethod, lambda one: (one.__func__,)),
    (property, lambda one: (one.fget, one.fset)),
    (functools.cached_property, lambda one: (one.func,)),
    (functools.partial, lambda one: (one.func, one.args, one.keywords)),
    (MethodType, lambda one: (one.__func__, one.__self__)),
)


def _take_apart(value: Any) -> Iterable[object] | None:  # noqa: ANN401 - whatever an attribute holds
    """What a container, a wrapper around functions or an object of the user's holds; None for anything else."""
    for kind, take in _PARTS:
        if isinstance(value, kind):
            return take(value)
    if isinstance(value, FunctionType | ModuleType | Tensor) or hasattr(value, "__qualname__"):
        wrapped = None if isinstance(value, FunctionType) else getattr(value, "__wrapped__", None)  # functools.cache
        return None if wrapped is None else (wrapped,)
    if hasattr(value, "__dict__") and (_is_own(type(value).__module__) or hasattr(value, "to_dict")):
        return type(value), {name: one for name, one in vars(value).items() if name not in _WHERE_FROM}
    return None


def _write(value: Any) -> str:  # noqa: ANN401 - whatever an attribute holds
    """A value in one line: tensors by their numbers, functions and modules of libraries by their names."""
    if isinstance(value, Tensor):
        return _hash_tensor(value)
    if isinstance(value, set | frozenset):
        return f"{len(value)} {sorted(repr(one) for one in value if _is_plain(one))}"
    if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        return repr(value.tolist())
    name = getattr(value, "__qualname__", getattr(value, "__name__", ""))
    return f"{getattr(value, '__module__', None)}.{name}"


def _list_codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of the functions inside it."""
    yield code
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from _list_codes(one)


def _list_globals(code: CodeType) -> list[str]:
    """The names that it looks up outside itself."""
    read = (one for part in _list_codes(code) for one in dis.get_instructions(part))
    return sorted({str(one.argval) for one in read if one.opname in {"LOAD_GLOBAL", "LOAD_NAME"}})


def _list_names(code: CodeType) -> list[str]:
    """Every name in it, those of attributes among them."""
    return sorted({name for part in _list_codes(code) for name in part.co_names})


def _is_plain(value: object) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, _PLAIN)


def _is_own(module: str | None) -> bool:
    """Tell whether this module is the user's: neither Python's own nor installed."""
    if module is None or module == "__main__":
        return True
    if module.partition(".")[0] in _LIBRARIES:
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is None or not _INSTALLED & set(Path(file).parts)


def _hash_tensor(tensor: Tensor) -> str:
    """A tensor's type and shape, and the SHA-256 of its numbers."""
    title = f"{tensor.dtype} {tuple(tensor.shape)}"
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return f"{title} {tensor.layout}"
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
    return f"{title} {hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()}"
