"""What release 0.1.0 wrote is read as if it were written today: those very files lie in tests/files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from make.artifacts import CANARY, COMPRESSED, DENSE
from rankship_benchmarks.bundle.bundle import append_trial, open_bundle, writing
from rankship_benchmarks.costs.energy_table import Watched
from rankship_benchmarks.costs.timings import Journal, Lines
from rankship_benchmarks.measure.pending import Pending
from rankship_benchmarks.measure.profiles import read_profiles
from rankship_benchmarks.nightly.records import list_nights
from rankship_benchmarks.report.page import write_report
from rankship_pipeline.flow.show import state_landing
from rankship_pipeline.foundation.artifact_key import head_of
from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.ranks.price import read_table

OLD = Path(__file__).parents[3] / "files/rankship-0.1.0"


def test_a_bundle_keeps_every_artifact_proof_trial_and_trace() -> None:
    bundle = open_bundle(OLD / "run")
    build = bundle.header.build
    heads = [replace(key, part=head_of("ink")) for key in (DENSE, COMPRESSED)]
    assert [one.key for one in build.files] == [DENSE, COMPRESSED, *heads]
    assert bundle.header.canary is not None
    assert bundle.header.canary.key == CANARY
    assert [one.key for one in bundle.header.verified] == [DENSE, COMPRESSED, CANARY, *heads]
    assert [one.key for one in bundle.header.verified_on_device] == [DENSE, COMPRESSED]
    assert [one.key for one in bundle.trials] == [DENSE, COMPRESSED, CANARY]
    assert [one.trial.key for one in bundle.metered] == [DENSE, COMPRESSED]
    assert build.landing is not None
    assert "landed; predicted" in state_landing(build.landing)
    assert bundle.finished


def test_a_bundle_has_its_page_and_its_profiles(tmp_path: Path) -> None:
    profiles = read_profiles(OLD / "run")
    assert profiles is not None
    assert [one.key for one in profiles.profiles] == [DENSE, COMPRESSED]
    assert "dense onnx, head of ink" in write_report(OLD / "run", tmp_path / "page.html").read_text()


def test_an_unfinished_run_is_gone_on_with_in_one_file(tmp_path: Path) -> None:
    lines = (OLD / "run/trials.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "trials.jsonl").write_bytes(b"".join(lines[:2]))
    before = open_bundle(tmp_path)
    with writing(tmp_path):
        append_trial(tmp_path, replace(before.trials[0], round=1))
        append_trial(tmp_path, replace(before.trials[0], key=replace(DENSE, precision="int8")))
    assert [(one.round, one.key.title) for one in open_bundle(tmp_path).trials] == [
        (0, "dense onnx"),
        (1, "dense onnx"),
        (0, "dense onnx, int8"),
    ]
    with writing(tmp_path):
        append_trial(tmp_path, before.trials[0])
    with pytest.raises(InputError, match="dense onnx round 0 again"):
        open_bundle(tmp_path)


def test_nights_keep_their_verdicts() -> None:
    (night,) = list_nights(OLD)
    cases = [(one.key, one.verdict) for one in night.devices[0].cases]
    assert cases == [(DENSE, "worse"), (COMPRESSED, "same")]
    assert [(one.key, one.verdict) for one in night.devices[0].energies] == [(DENSE, "unknown")]


def test_journals_notes_and_tables_are_read() -> None:
    assert [one.trial.key for one in Journal(OLD / "sweeps.jsonl").timings] == [DENSE, COMPRESSED]
    assert [one.metered.trial.key for one in Lines(Watched, OLD / "energies.jsonl").lines] == [DENSE]
    assert decode(Pending, (OLD / "pending.json").read_bytes(), where="note").place == (1, COMPRESSED)
    assert read_table(OLD / "cost-table.json", "ns").layers["conv"][1].cost == 300


def test_what_is_read_is_written_as_today() -> None:
    trial = open_bundle(OLD / "run").trials[1]
    table = json.loads(encode(trial))
    assert table["key"] == {
        "variant": "compressed",
        "format": "onnx",
        "precision": "float32",
        "delegate": "cpu",
        "part": "whole",
        "shape": "",
    }
    assert decode(type(trial), encode(trial), where="here") == trial


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variant": None}, "key"),  # nothing to make a key of
        ({"variant": "sparse"}, "key.variant"),
        ({"extra": 1}, "unknown key 'extra'"),
    ],
)
def test_an_old_file_that_is_wrong_is_refused_as_today(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    header, trial, *_ = (OLD / "run/trials.jsonl").read_text().splitlines()
    table = {name: value for name, value in (json.loads(trial) | changes).items() if value is not None}
    (tmp_path / "trials.jsonl").write_text(f"{header}\n{json.dumps(table)}\n")
    with pytest.raises(InputError, match=said):
        open_bundle(tmp_path)
