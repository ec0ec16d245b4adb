"""Tests that share what only one of them may have stay in one process, also where files are renamed."""

from collections import Counter

from make import TESTS
from make.groups import BUILDING, FIRST, GROUPS, name_group

FILES = [str(path.relative_to(TESTS.parent)) for path in sorted(TESTS.rglob("test_*.py"))]


def test_every_group_has_files_and_every_file_one_group() -> None:
    sizes = Counter(map(name_group, FILES))
    assert all(sizes[group] > 1 for group in GROUPS)
    assert all(sizes[group] for group in FIRST)
    assert all(any(file.endswith(name) for file in FILES) for name in BUILDING)


def test_whoever_measures_on_this_machine_does_so_beside_nobody() -> None:
    measuring = {"tests/flow/test_run.py", "tests/flow/test_nightly.py", "tests/contract/test_runner.py"}
    assert {name_group(file) for file in measuring} == {"this machine"}
    assert name_group("tests/flow/test_bad_input.py") == "tests/flow/test_bad_input.py"
