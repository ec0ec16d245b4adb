"""The wheel alone, in an environment of its own, far from the sources: a stranger's first minutes.

In the environment is what the wheel asks for and nothing else: each package is linked there from this one, since to
unpack and compile two gigabytes would take minutes. `make test-debian13` installs them.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from make.recipes import TINY_MODEL
from rankship_pipeline.cli import VERBS

ROOT = Path(__file__).parents[2]
EXTRAS = ("onnx", "demo")
RECIPE = """
name = "tiny"
data.loader = "model.py:load_one"
budget.kept_parameters = 0.5
ranks.step = 2
export.formats = ["onnx"]
parity.samples = 8
[[models]]
name = "a"
factory = "model.py:make"
train = "model.py:leave_untrained"
"""
pytestmark = [pytest.mark.system, pytest.mark.slow]


class Stranger:
    """A user with nothing but the wheel: an environment, a home and a working folder."""

    def __init__(self, folder: Path) -> None:
        self.programs = folder / "venv/bin"
        self.work = folder / "work"
        self.work.mkdir()
        home = folder / "home"
        home.mkdir()
        kept = {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "LANG", "LC_"))}
        self._environment = {**kept, "PATH": f"{self.programs}:/usr/bin:/bin", "HOME": str(home)}

    def run(self, *argv: str | Path) -> str:
        done = subprocess.run(
            argv,
            cwd=self.work,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def rankship(self, *argv: str) -> str:
        return self.run(self.programs / "rankship", *argv)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Stranger:
    folder = tmp_path_factory.mktemp("stranger")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, capture_output=True, check=True)
    (wheel,) = folder.glob("*.whl")
    made = Stranger(folder)
    made.run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--quiet", "--python", made.programs / "python", "install"]
    made.run(*pip, "--no-index", "--no-deps", "--no-compile", wheel)
    (packages,) = folder.glob("venv/lib/python*/site-packages")
    (installed,) = packages.glob("rankship-*.dist-info")
    link_requirements(PathDistribution(installed).requires or (), EXTRAS, packages, set())
    return made


def link_requirements(lines: Iterable[str], extras: Iterable[str], into: Path, linked: set[str]) -> None:
    """Link the packages that a wheel asks for with these extras, and those that they ask for in turn."""
    for wanted in map(Requirement, lines):
        if wanted.marker is not None and not any(wanted.marker.evaluate({"extra": one}) for one in ("", *extras)):
            continue
        found = distribution(wanted.name)
        assert wanted.specifier.contains(found.version, prereleases=True), f"{wanted}: {found.version} is here"
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (into / top).exists():
                (into / top).symlink_to(Path(str(found.locate_file(top))).resolve())
        named = f"{wanted.name}[{','.join(sorted(wanted.extras))}]"
        if named not in linked:
            linked.add(named)
            link_requirements(found.requires or (), wanted.extras, into, linked)


def test_it_explains_itself_and_comes_from_the_wheel(stranger: Stranger) -> None:
    assert all(verb in stranger.rankship("--help") for verb in VERBS)
    where = "import rankship_pipeline, rankship_targets, rankship_benchmarks as b; print(rankship_pipeline.__file__)"
    assert Path(stranger.run(stranger.programs / "python", "-c", where).strip()).is_relative_to(
        stranger.programs.parent
    )


def test_a_recipe_is_built_verified_and_shown(stranger: Stranger) -> None:
    (stranger.work / "model.py").write_text(TINY_MODEL)
    (stranger.work / "tiny.toml").write_text(RECIPE)
    stranger.rankship("build", "tiny.toml")
    assert "onnx" in stranger.rankship("verify", "tiny.toml")
    assert "tiny" in stranger.rankship("show", "tiny.toml")


def test_this_machine_measures_it(stranger: Stranger) -> None:
    (stranger.work / "suite.toml").write_text(
        'recipe = "tiny.toml"\nrounds = 2\nmin_samples = 5\nmin_duration_ms = 1\n'
    )
    assert "report" in stranger.rankship("bench", "suite.toml", "--on", "this-machine")
    assert list(stranger.work.glob("rankship-results/*/report.html"))


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb == "init"])
def test_what_it_starts_is_built(stranger: Stranger, verb: str) -> None:
    stranger.rankship(verb, "mine")
    stranger.rankship("build", "mine.toml")
    assert "mine" in stranger.rankship("show", "mine.toml")


def test_the_quickstart_runs_as_it_stands(stranger: Stranger) -> None:
    example = shutil.copy(ROOT / "examples/quickstart.py", stranger.work)
    said = stranger.run(stranger.programs / "python", example)
    assert "× fewer" in said
    assert "device this-machine" in said
    assert (stranger.work / "quickstart-out/compressed.onnx").is_file()
    assert [path.name for path in (ROOT / "examples").glob("*.py")] == ["quickstart.py"], "each is run here"
