import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from make.builds import make_build
from make.bundles import make_header, start_bundle
from make.trials import UNTOLD, make_reading, make_trial
from rankship_benchmarks.bundle.bundle import (
    BUNDLE_FILE,
    Header,
    append_trial,
    create_bundle,
    find_unfinished,
    finish_bundle,
    open_bundle,
    writing,
)
from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.errors import InputError
from rankship_targets.trials.trial import Trial

HEADER = make_header(make_build(recipe="Grüße"), conditions={"kernel": "6.1"})
FIRST, SECOND, THIRD = (
    make_trial(round=number, before=UNTOLD, after=UNTOLD, runtime=make_reading("µruntime")) for number in range(3)
)


def fill(folder: Path, trials: int = 2, header: Header = HEADER) -> Path:
    return start_bundle(folder, header, *(FIRST, SECOND, THIRD)[:trials]) / BUNDLE_FILE


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.from_type(Trial))
def test_any_trial_survives_its_line(trial: Trial) -> None:
    assert decode(Trial, encode(trial), where="test") == trial


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    path = fill(tmp_path / "run")
    bundle = open_bundle(tmp_path / "run")
    assert bundle.header == HEADER
    assert bundle.trials == (FIRST, SECOND)
    assert not bundle.finished
    with writing(tmp_path / "run"):
        finish_bundle(tmp_path / "run")
    assert open_bundle(tmp_path / "run").finished
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["header", "trial", "trial", "end"]


def test_a_writer_killed_at_any_byte_leaves_no_half_trial_and_the_next_append_mends_the_file(tmp_path: Path) -> None:
    path = fill(tmp_path / "run")
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        assert open_bundle(tmp_path / "run").trials == (FIRST,)
        with writing(tmp_path / "run"):
            append_trial(tmp_path / "run", SECOND)
        assert path.read_bytes() == whole


def test_a_last_line_that_the_disk_lost_is_a_torn_tail_too(tmp_path: Path) -> None:
    path = fill(tmp_path / "run", trials=1)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 40 + b"\n")
    assert open_bundle(tmp_path / "run").trials == (FIRST,)
    with writing(tmp_path / "run"):
        append_trial(tmp_path / "run", SECOND)
    assert open_bundle(tmp_path / "run").trials == (FIRST, SECOND)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda lines: [lines[0], lines[1][:30], lines[2]], ":2: not a JSON object"),
        (lambda lines: [lines[0], "", lines[1]], ":2: not a JSON object"),
        (lambda lines: [lines[0], '{"kind":"energy"}', lines[1]], ":2: unknown kind 'energy'"),
        (lambda lines: [lines[0], lines[1].replace('"round":0', '"round":"0"'), lines[2]], ":2: round: "),
        (lambda lines: [lines[0], lines[1].replace('"round":0', '"runde":0'), lines[2]], "unknown key 'runde'"),
        (lambda lines: [lines[0], lines[1], lines[1]], ":3: dense onnx round 0 again"),
        (lambda lines: [lines[0], lines[0]], ":2: a header line is out of place"),
        (lambda lines: [lines[1]], ":1: a trial line is out of place"),
        (lambda lines: [lines[0], lines[1], '{"kind":"end","trials":2,"finished_utc":"x"}'], "holds 1 trials"),
        (
            lambda lines: [lines[0], '{"kind":"end","trials":0,"finished_utc":"x"}', lines[1]],
            ":3: a trial line is out of place",
        ),
        (lambda _: [], "no header"),
    ],
)
def test_damage_that_no_crash_makes_is_an_error_naming_the_line(tmp_path: Path, damage, word: str) -> None:  # type: ignore[no-untyped-def] # noqa: ANN001
    path = fill(tmp_path / "run")
    lines = damage(path.read_text().splitlines())
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(InputError) as caught:
        open_bundle(tmp_path / "run")
    assert word in str(caught.value)
    assert caught.value.hint


def test_a_second_writer_is_refused_and_a_later_one_is_not(tmp_path: Path) -> None:
    fill(tmp_path / "run")
    with (
        writing(tmp_path / "run"),
        pytest.raises(InputError, match="another run is writing here"),
        writing(tmp_path / "run"),
    ):
        pass
    with writing(tmp_path / "run"):
        pass


def test_a_folder_is_created_once_and_a_finished_one_grows_no_more(tmp_path: Path) -> None:
    fill(tmp_path / "run")
    with pytest.raises(InputError, match="written once"):
        create_bundle(tmp_path / "run", HEADER)
    finish_bundle(tmp_path / "run")
    with pytest.raises(InputError, match="finished"):
        append_trial(tmp_path / "run", THIRD)
    with pytest.raises(InputError, match="no such file"):
        open_bundle(tmp_path / "elsewhere")


def test_the_newest_unfinished_run_of_the_same_suite_build_and_device_is_found(tmp_path: Path) -> None:
    def start(name: str, **changes: str) -> Path:
        fill(tmp_path / name, 1, dataclasses.replace(HEADER, run_id=name, **changes))  # type: ignore[arg-type]
        return tmp_path / name

    assert find_unfinished(tmp_path / "none", "s", "b", "pi4") is None
    newest = start("a", created_utc="2025-01-03")
    start("b", created_utc="2025-01-02")
    finish_bundle(start("c", created_utc="2025-01-09"))
    start("d", created_utc="2025-01-09", device="pixel6")
    damaged = start("e", created_utc="2025-01-09", suite_sha256="other") / BUNDLE_FILE
    damaged.write_bytes(damaged.read_bytes() + b"x\n\n\n")
    assert find_unfinished(tmp_path, "s", "b", "pi4") == newest
    assert find_unfinished(tmp_path, "s", "other", "pi4") is None
