"""The page of faults names every error of devices and measurements, and says truly which are transient."""

import re
from pathlib import Path

from rankship_pipeline.foundation import errors
from rankship_pipeline.foundation.errors import (
    MeasurementError,
    PersistentTargetError,
    TargetError,
    TransientTargetError,
)

PAGE = (Path(__file__).parents[2] / "docs/faults.md").read_text()
ROOTS = {"TargetError", "TransientTargetError", "PersistentTargetError", "MeasurementError"}
ROWS = {
    row[3].strip().strip("`"): row for line in PAGE.splitlines() if len(row := line.split("|")) == 7 and "`" in line
}


def list_classes(root: type[Exception]) -> dict[str, type[Exception]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= list_classes(child)
    return {name: kind for name, kind in found.items() if kind.__module__ == errors.__name__}


CLASSES = list_classes(TargetError) | list_classes(MeasurementError)


def test_every_error_class_has_its_row_and_every_row_its_class() -> None:
    assert set(ROWS) == set(CLASSES) - ROOTS
    assert len(ROWS) > 15


def test_what_the_page_calls_transient_is_transient() -> None:
    for name, row in ROWS.items():
        assert row[4].strip() == ("yes" if issubclass(CLASSES[name], TransientTargetError) else "no"), name
        assert issubclass(CLASSES[name], (TransientTargetError, PersistentTargetError, MeasurementError)), name


def test_every_fault_says_how_it_shows_and_what_to_do() -> None:
    for name, row in ROWS.items():
        assert all(re.search(r"\w", cell) for cell in row[1:6]), name
