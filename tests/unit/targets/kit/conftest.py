"""The C++ program that runs ExecuTorch, built for this machine once."""

import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from rankship_targets.kit.compile import LIBRARIES, PROGRAM, build_runner


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from the installed package's files, packed as the wheel that they came in."""
    folder = tmp_path_factory.mktemp("runner")
    package = distribution("executorch")
    wheel = folder / f"executorch-{package.version}-cp311-cp311-any.whl"
    kept = ("executorch/include/", *(f"executorch/lib/lib{name}.so" for name in LIBRARIES))
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in package.files or ():
            if str(file).startswith(kept):
                archive.write(str(file.locate()), str(file))
    build_runner(wheel, "x86_64", folder / "built")
    return folder / "built" / PROGRAM
