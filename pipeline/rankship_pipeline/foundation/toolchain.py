"""The versions and the code that make an artifact: part of every store key and of every artifact's record."""

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from rankship_pipeline import __version__
from rankship_pipeline.foundation.formats import FACTS, Format

_PACKAGE = Path(__file__).parents[1]


def find_version(distribution: str) -> str | None:
    """An installed distribution's version, None if it is not installed; imports nothing."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def list_versions(format_name: Format | None = None) -> dict[str, str]:
    """The versions that shape a model (torch, numpy, rankship), and those of a format's exporter if it is given."""
    exporter = () if format_name is None else FACTS[format_name].exporter_distributions
    names = ("torch", "numpy", "scipy", "safetensors", "transformers", *exporter)
    found = {name: find_version(name) for name in names}
    return {"rankship": __version__, **{name: value for name, value in found.items() if value is not None}}


@cache
def hash_code() -> str:
    """SHA-256 over the package's source, so that changed code never reads a result of the old code."""
    state = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        state.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return state.hexdigest()


def can_export(format_name: Format) -> bool:
    """Whether a format's exporter and the runtime that proves its files are installed; imports nothing."""
    facts = FACTS[format_name]
    return find_spec(facts.exporter_import) is not None and find_version(facts.runtime_distribution) is not None
