"""Two artifacts that differ in precision alone are two: in every figure, table, page, index and history."""

from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select

from make.artifacts import COMPRESSED, DENSE
from make.bundles import keep
from make.judged_runs import make_run
from make.nights import make_device_night, make_night
from rankship_benchmarks.bundle.bundle import Bundle, open_bundle
from rankship_benchmarks.index.index import refresh_own_index
from rankship_benchmarks.index.mlflow_export import list_metrics
from rankship_benchmarks.index.tables import CASES
from rankship_benchmarks.judge.compare import compare_bundles
from rankship_benchmarks.judge.summary import summarise
from rankship_benchmarks.nightly.histories import list_histories
from rankship_benchmarks.report.page import render_report
from rankship_benchmarks.stats.estimates import median_by_round
from rankship_targets.trials.trial import Trial

INT8 = replace(COMPRESSED, precision="int8")
KEYS = [DENSE, COMPRESSED, INT8]


def halve(trial: Trial, slower: float) -> Trial:
    times = tuple(int(ns * slower / 2) for ns in trial.samples_ns)
    return replace(trial, key=INT8, artifact_sha256="8" * 64, samples_ns=times)


def make_mixed_run(slower: float = 1.0, run_id: str = "mixed") -> Bundle:
    """A run of ONNX alone, in which a third artifact takes half as long as the compressed one, times `slower`."""
    run = make_run(rounds=20, layers=3, samples=11)
    build = run.header.build
    artifacts = [one for one in build.artifacts if one.key.format == "onnx"]
    small = replace(artifacts[1], key=INT8, sha256="8" * 64, size_bytes=9_000)
    trials = [one for one in run.trials if one.key.format == "onnx"]
    faster = [halve(one, slower) for one in trials if one.key == COMPRESSED]
    scores = (*build.accuracies, replace(build.accuracies[-1], stage="int8"))
    made = replace(build, artifacts=(*artifacts, small), accuracies=scores)
    header = replace(run.header, run_id=run_id, build=made)
    return replace(run, header=header, trials=(*trials, *faster))


def test_each_has_its_own_result_over_the_dense_one() -> None:
    results = summarise(make_mixed_run()).results
    assert [one.key for one in results] == KEYS
    ratios = [one.ratio.value for one in results if one.ratio is not None]
    assert ratios == pytest.approx([0.46, 0.23], rel=0.02)


def test_each_is_compared_with_itself() -> None:
    verdicts = compare_bundles(make_mixed_run(), make_mixed_run(1.2, "other"))
    assert [(one.key, one.verdict) for one in verdicts] == [(DENSE, "same"), (COMPRESSED, "same"), (INT8, "worse")]


def test_each_stands_on_the_page_and_among_the_metrics() -> None:
    assert "onnx compressed, int8, 9.0 kB" in render_report(make_mixed_run())
    names = {name.rpartition(".")[0] for name in list_metrics(make_mixed_run())}
    assert names == {"onnx.dense", "onnx.compressed", "onnx.compressed.int8"}


def test_each_has_its_own_row_and_its_own_history(tmp_path: Path) -> None:
    run = open_bundle(keep(tmp_path / "mixed", make_mixed_run()))
    engine = refresh_own_index(tmp_path)
    with engine.connect() as connection:
        rows = connection.execute(select(CASES)).all()
    assert {(one.variant, one.precision): one.size_bytes for one in rows}["compressed", "int8"] == 9_000
    night = make_night(1, [replace(make_device_night("pi4-bench", None), run="mixed")])
    histories = list_histories(engine, [night])
    assert [case.key for case in histories] == KEYS
    for case, (one,) in histories.items():
        own = [trial for trial in run.trials if trial.key == case.key]
        assert one.rounds_ns == tuple(median_by_round(own).values())
