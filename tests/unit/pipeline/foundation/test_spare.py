"""What the machine has to spare is never more than its control group leaves."""

from pathlib import Path

import psutil
import pytest

from rankship_pipeline.foundation import spare
from rankship_pipeline.foundation.spare import count_cores, find_free_bytes


def test_a_control_groups_rest_is_the_memory_that_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used = tmp_path / "limit", tmp_path / "used"
    monkeypatch.setattr(spare, "_CGROUPS", ((str(limit), str(used)),))
    assert 0 < find_free_bytes() <= psutil.virtual_memory().total  # without a control group
    used.write_text("300\n")
    limit.write_text("max\n")
    assert find_free_bytes() > 1000
    limit.write_text("1000\n")
    assert find_free_bytes() == 700


def test_there_is_at_least_one_core() -> None:
    assert 1 <= count_cores() <= (psutil.cpu_count() or 1)
