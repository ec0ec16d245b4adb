"""What the machine has to spare is never more than its control group leaves."""

from pathlib import Path

import psutil
import pytest

from rankship_pipeline.foundation import spare
from rankship_pipeline.foundation.spare import count_cores, find_free_bytes


def test_the_free_memory_is_what_is_left_of_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used, of_what = (tmp_path / f"memory.{name}" for name in ("max", "current", "stat"))
    absent = str(tmp_path / "none")
    monkeypatch.setattr(spare, "_CGROUPS", ((str(limit), str(used), str(of_what)), (absent, absent, absent)))
    limit.write_text("max\n")
    used.write_text("1000\n")
    of_what.write_text("anon 100\nactive_file 300\ninactive_file 200\n")
    assert find_free_bytes() > 10**6
    limit.write_text("3000\n")
    assert find_free_bytes() == 2500, "cached files are given back"
    of_what.write_text("active_file 1\ninactive_file 1\ntotal_active_file 30\ntotal_inactive_file 20\n")
    assert find_free_bytes() == 2050


def test_there_is_at_least_one_core() -> None:
    assert 1 <= count_cores() <= (psutil.cpu_count() or 1)
