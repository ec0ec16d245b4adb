"""Fits the names of a file's tensors to a module's: wrappers of training loops put a prefix before them."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.constants import is_constant
from rankship_pipeline.models.weights import TensorHeader, describe_state, list_differences

# What DataParallel, torch.compile, FSDP and activation checkpointing put between a module's name and its parent's.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_SHOWN = 3


@dataclass(frozen=True)
class Fit:
    """The file's name of each of a module's tensors, in the module's order, and what has to be said of it."""

    names: Mapping[str, str]
    remarks: tuple[str, ...] = ()


def fit_names(model: nn.Module, found: Mapping[str, TensorHeader], *, where: str) -> Fit:
    """Find every tensor of a module in a file, by its name or without wrappers' prefixes.

    Constants (constants.py) may be missing or extra. One InputError lists all that does not fit by any rule.
    """
    expected = describe_state(model)
    fit = match_names(expected, found, where=where)
    if fit is None:
        raise InputError(
            f"{where} does not fit its factory's model:\n  " + "\n  ".join(_complain(expected, found)),
            hint="point `factory` at the architecture that the checkpoint was saved from",
        )
    return fit


def match_names(expected: Mapping[str, TensorHeader], found: Mapping[str, TensorHeader], *, where: str) -> Fit | None:
    """The found name of every expected tensor; None if they do not fit by any rule."""
    for change, remark in _list_changes(list(expected), list(found)):
        renamed = {change(name): name for name in found}
        if len(renamed) == len(found) and not _complain(expected, {new: found[old] for new, old in renamed.items()}):
            names = {name: renamed[name] for name in expected if name in renamed}
            return Fit(names, tuple(f"{where}: {one}" for one in (remark, _describe_rest(expected, renamed)) if one))
    return None


def _complain(expected: Mapping[str, TensorHeader], found: Mapping[str, TensorHeader]) -> list[str]:
    """Every difference in names and shapes, but for constants that one side lacks."""
    shapes = [
        {name: header.shape for name, header in one.items() if name in other or not is_constant(name, header)}
        for one, other in ((expected, found), (found, expected))
    ]
    return list_differences(*shapes)


def _list_changes(expected: list[str], found: list[str]) -> Iterator[tuple[Callable[[str], str], str]]:
    """The ways to rename a file's tensors, the plainest first, each with what is said of it."""
    yield (lambda name: name), ""
    bare = {_unwrap(name): name for name in expected}

    def drop_wrappers(name: str) -> str:
        plain = _unwrap(name)
        return bare.get(plain, plain)

    dropped = sorted({part for name in found for part in name.split(".")} & _WRAPPERS)
    yield drop_wrappers, f"the wrappers' names {', '.join(dropped)} were left out of its tensors' names"
    for prefix in _list_prefixes([_unwrap(name) for name in found]):

        def remove(name: str, prefix: str = prefix) -> str:
            plain = _unwrap(name).removeprefix(prefix)
            return bare.get(plain, plain)

        yield remove, f"the prefix {prefix!r} was removed from its tensors' names"
    for prefix in _list_prefixes(list(bare)):

        def add(name: str, prefix: str = prefix) -> str:
            plain = prefix + _unwrap(name)
            return bare.get(plain, plain)

        yield add, f"the prefix {prefix!r} was put before its tensors' names"


def unwrap_names(names: Collection[str]) -> dict[str, str]:
    """The file's own name of each tensor of a checkpoint by its name without wrappers.

    `module` is left out only before all names, as it may be a part of a model.
    """
    certain = _WRAPPERS - {"module"}
    found = {".".join(part for part in name.split(".") if part not in certain): name for name in names}
    while found and all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): own for name, own in found.items()}
    return found if len(found) == len(names) else {name: name for name in names}


def _unwrap(name: str) -> str:
    """A name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _list_prefixes(names: list[str]) -> list[str]:
    """Every beginning "part.", "part.part.", … that all names share."""
    prefixes: list[str] = []
    first = min(names, default="").split(".")
    for count in range(1, len(first)):
        prefix = ".".join(first[:count]) + "."
        if not all(name.startswith(prefix) for name in names):
            break
        prefixes.append(prefix)
    return prefixes


def _describe_rest(expected: Mapping[str, TensorHeader], found: Mapping[str, str]) -> str:
    """A remark on the constants that only one side has; empty if there are none."""
    lacking, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    parts = [
        f"{', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''} {what}"
        for names, what in ((lacking, "missing: untrained values taken"), (extra, "not used"))
        if names
    ]
    return "; ".join(parts) and f"not trained, {'; '.join(parts)}"
