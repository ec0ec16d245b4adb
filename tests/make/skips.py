"""Pytest's option `--no-holes`: a skip for a reason that is not in tests/skips.txt fails the run."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

ALLOWED = Path(__file__).parents[1] / "skips.txt"


def read_allowed(path: Path = ALLOWED) -> list[str]:
    """The patterns of the file, without its comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def find_holes(reasons: Iterable[str], allowed: Iterable[str]) -> dict[str, int]:
    """How often each reason occurs that matches no pattern as a whole."""
    patterns = [re.compile(pattern) for pattern in allowed]
    holes: dict[str, int] = {}
    for reason in reasons:
        if not any(pattern.fullmatch(reason) for pattern in patterns):
            holes[reason] = holes.get(reason, 0) + 1
    return holes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-holes", action="store_true", help="fail where a skip's reason is not in tests/skips.txt")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.exitstatus and _list_holes(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for reason, times in _list_holes(config).items():
        terminalreporter.write_line(f"HOLE: {times} skipped: {reason} (not among the reasons of {ALLOWED})", red=True)


def _list_holes(config: pytest.Config) -> dict[str, int]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if not config.getoption("--no-holes") or reporter is None:
        return {}
    skipped = reporter.stats.get("skipped", [])
    return find_holes((str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped), read_allowed())
