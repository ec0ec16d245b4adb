"""The house rules that a machine can hold."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rankship_pipeline.cli import VERBS

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "pipeline/rankship",
    "pipeline/rankship_pipeline",
    "targets/rankship_targets",
    "benchmarks/rankship_benchmarks",
)
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
CEILING = 400
HEAVY = {"torch", "numpy", "scipy", "pydantic", "rich", "matplotlib", "jinja2", "paramiko", "onnxruntime"}
NAMELESS = {"utils", "util", "helpers", "common", "manager", "base", "core", "misc"}


def test_no_file_exceeds_the_ceiling() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in (*SOURCES, *TESTS)}
    assert {name: length for name, length in lengths.items() if length > CEILING} == {}


def test_modules_are_named_for_what_they_hold() -> None:
    assert {path.stem for path in (*SOURCES, *TESTS)} & NAMELESS == set()


def test_imports_run_against_the_data() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def _modules_loaded_by(*arguments: str) -> set[str]:
    code = (
        "import sys, contextlib\nfrom rankship_pipeline import cli\n"
        f"with contextlib.suppress(SystemExit):\n    cli.main({list(arguments)!r})\n"
        "print('MODULES', *{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("MODULES ")[2].split())


def test_help_loads_nothing_heavy() -> None:
    assert _modules_loaded_by("--help") & HEAVY == set()


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_each_verb_explains_itself_without_torch(verb: str) -> None:
    assert _modules_loaded_by(verb, "--help") & {"torch", "scipy", "matplotlib"} == set()


def test_the_agent_imports_nothing_of_ours() -> None:
    rooms = list((ROOT / "targets/rankship_targets/agent").glob("*.py"))
    assert rooms
    for room in rooms:
        assert re.findall(r"^\s*(?:import|from) rankship\w*", room.read_text(), re.MULTILINE) == []


def test_the_wheel_holds_the_four_packages_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {Path(package).name for package in PACKAGES}
    assert "rankship_benchmarks/report/page.html.j2" in names
    assert {f"{top}/py.typed" for top in tops} <= names
    assert "rankship_targets/agent/main.py" in names
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]


def test_torch_is_pinned_exactly_and_alike_everywhere() -> None:
    pins = {
        name: set(re.findall(r"(?<![-\w])torch==([\d.]+)", (ROOT / name).read_text()))
        for name in ("pyproject.toml", "constraints.txt", "Makefile")
    }
    assert {name: found for name, found in pins.items() if found != {"2.13.0"}} == {}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_dangerous_is_called(path: Path) -> None:
    text = path.read_text()
    for pattern in (r"shell=True", r"AutoAddPolicy", r"import pickle", r"weights_only=False", r"(?<!\.)\beval\("):
        assert not re.search(pattern, text), f"{pattern} in {path.name}"
