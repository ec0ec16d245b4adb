"""The Python files beside a recipe: which of them a file imports, and their import as they are on disk now."""

import ast
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from rankship_pipeline.foundation.files import hash_file

_OURS = {"__main__", "rankship", "rankship_pipeline", "rankship_targets", "rankship_benchmarks"}
_INSTALLED = {"site-packages", "dist-packages", ".venv"}
_imported: dict[Path, dict[str, tuple[ModuleType, str]]] = {}  # by recipe folder and name; with its file's SHA-256
_lent: list[str] = []  # what was put on sys.path for the last recipe


@contextmanager
def import_beside(folder: Path) -> Iterator[None]:
    """Imports find the files in `folder` first, as they are now: not another recipe's, nor what an edit has replaced.

    Modules that the session imported itself from there stay its own, unless code run in here imports them anew.
    """
    folder = folder.absolute()
    for modules in _imported.values():
        _take_out({name: module for name, (module, _) in modules.items()})
    known = _imported.pop(folder, {})
    if any(_hash_source(module) != sha256 for module, sha256 in known.values()):
        known = {}
    foreign = _list_modules(folder)
    _take_out(foreign)
    sys.modules.update({name: module for name, (module, _) in known.items()})
    while _lent:
        if (path := _lent.pop()) in sys.path:
            sys.path.remove(path)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:  # last, for what a model imports when it runs
            sys.path.append(str(folder))
            _lent.append(str(folder))
        _imported[folder] = {
            name: known[name] if name in known and known[name][0] is module else (module, _hash_source(module))
            for name, module in _list_modules(folder).items()
        }
        for name, module in foreign.items():
            sys.modules.setdefault(name, module)


def list_imported(files: list[Path], folder: Path) -> list[Path]:
    """The files below `folder` that these import, inside functions too, and what those import in turn; sorted."""
    found: set[Path] = set()
    left = [path for path in files if path.is_file()]
    while left:
        path = left.pop()
        for name in _list_names(path, folder):
            new = {one for one in _find_files(name, folder) if one not in files} - found
            found |= new
            left += new
    return sorted(found)


def _take_out(modules: dict[str, ModuleType]) -> None:
    for name, module in modules.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]


def _hash_source(module: ModuleType) -> str:
    path = Path(str(module.__file__))
    return hash_file(path) if path.is_file() else ""


def _list_modules(folder: Path) -> dict[str, ModuleType]:
    """The imported modules whose Python files lie below this folder; installed packages left out."""
    starts = tuple(f"{one}{os.sep}" for one in (folder, folder.resolve()))
    return {
        name: module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] not in _OURS
        and str(file := getattr(module, "__file__", None)).startswith(starts)
        and str(file).endswith(".py")
        and not _INSTALLED & set(Path(str(file)).parts)
    }


def _list_names(path: Path, folder: Path) -> Iterator[str]:
    """The dotted names that a file imports, relative ones as from `folder`."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # told where it is imported
        return
    package = path.parent.relative_to(folder).parts if path.is_relative_to(folder) else ()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            start = (*above, *((node.module,) if node.module else ()))
            yield from (".".join((*start, one.name)) for one in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (
                one.value for one in node.args[:1] if isinstance(one, ast.Constant) and isinstance(one.value, str)
            )


def _find_files(name: str, folder: Path) -> Iterator[Path]:
    """The files below `folder` that importing a dotted name runs; what it ends in may be no module."""
    place = folder
    for part in name.split("."):
        place /= part
        yield from (one for one in (place / "__init__.py", place.with_name(f"{part}.py")) if one.is_file())
