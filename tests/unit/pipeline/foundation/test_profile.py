import json
import mmap
import threading
from pathlib import Path

import pytest

from rankship_pipeline.foundation import profile
from rankship_pipeline.foundation.codec import decode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.profile_file import Profile, profile_to

LARGE = 64_000_000


def test_without_a_profile_nothing_is_recorded() -> None:
    with profile.stage("a"), profile.layer("b"):
        pass
    with profile.record_stages() as recording:
        pass
    assert recording.list_stages() == ()
    assert profile.stage("a") is profile.layer("b"), "one context that does nothing"


def test_a_stage_is_told_apart_from_those_inside_it_and_knows_its_layers() -> None:
    with profile.record_stages() as recording:
        for _ in range(2):
            with profile.stage("outer"):
                with Steps(quiet=True).step("inner"), profile.layer("head"):
                    sum(range(2_000_000))
                with profile.layer("stem"):
                    pass
    inner, outer = recording.list_stages()
    assert [inner.name, outer.name] == ["inner", "outer"]
    assert list(inner.layer_seconds) == ["head"]
    assert list(outer.layer_seconds) == ["stem"]
    assert 0 < inner.layer_seconds["head"] <= inner.wall_seconds
    assert 0 <= outer.wall_seconds < inner.wall_seconds


def test_layers_of_other_threads_count_for_the_stage_that_runs() -> None:
    def work() -> None:
        with profile.layer("head"):
            pass

    with profile.record_stages() as recording, profile.stage("compress"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert list(recording.list_stages()[0].layer_seconds) == ["head"]


def test_a_stage_has_the_memory_at_its_highest() -> None:
    with profile.record_stages() as recording:
        with profile.stage("small"):
            pass
        with profile.stage("large"):
            held = mmap.mmap(-1, LARGE)  # pages of its own: the heap may hold freed ones, which count already
            held.write(b"x" * LARGE)
    held.close()
    small, large = recording.list_stages()
    assert large.peak_bytes - small.peak_bytes > LARGE / 2


def test_a_profile_is_written_also_where_the_command_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "profile.json"

    def fail() -> None:
        with profile_to(path, "build"), profile.stage("calibrate [a]"):
            profile.note_estimates({"calibrate [a]": (2.5, 1000)})
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - the one above
        fail()
    found = decode(Profile, path.read_bytes(), where="profile")
    stage = next(one for one in found.stages if one.name == "calibrate [a]")
    assert (stage.estimated_seconds, stage.estimated_peak_bytes) == (2.5, 1000)
    assert found.peak_bytes >= stage.peak_bytes > 0
    assert found.wall_seconds >= sum(one.wall_seconds for one in found.stages) - 1e-6
    assert json.loads(path.read_text())["command"] == "build"
    assert "calibrate [a]" in capsys.readouterr().err
