"""A test that is skipped for want of something that can be installed is a hole, and a run with holes fails in CI."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from make.skips import find_holes, read_allowed

TESTS = Path(__file__).parents[1]
CONFTEST = "from make.skips import pytest_addoption, pytest_sessionfinish, pytest_terminal_summary\n"


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(
    ("reason", "option", "status"),
    [
        ("no frobnicator: apt-get install frobnicator", ["--no-holes"], 1),
        ("no frobnicator: apt-get install frobnicator", [], 0),
        ("no Python 3.9 here", ["--no-holes"], 0),
    ],
)
def test_a_hole_fails_the_run(tmp_path: Path, reason: str, option: list[str], status: int, workers: str) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_one.py").write_text(
        f"import pytest\ndef test_whole():\n    pass\ndef test_skipped():\n    pytest.skip({reason!r})\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider", *option, str(tmp_path)]
    environment = {"PYTHONPATH": str(TESTS), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("HOLE: 1 skipped" in done.stdout) == bool(status)


def test_the_allowed_reasons_are_few_and_name_no_package() -> None:
    allowed = read_allowed()
    assert 0 < len(allowed) <= 5
    assert not [reason for reason in allowed if re.search(r"apt-get|pip |install", reason)]
    assert find_holes(["no Python 3.9 here", "no Python 3.9 here!"], allowed) == {"no Python 3.9 here!": 1}


def test_no_module_of_tests_is_skipped_as_a_whole() -> None:
    """Such a skip happens in a worker of xdist, where nobody sees it."""
    for path in TESTS.rglob("*.py"):
        if path != Path(__file__):
            assert not re.search(r"importorskip|allow_module_level", path.read_text()), path
