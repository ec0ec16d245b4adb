"""Phases of a file that generates are cases like others: judged, compared, shown and kept, each over its dense one."""

from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select

from make.artifacts import COMPRESSED, DENSE
from make.bundles import keep
from make.judged_runs import make_run
from make.pages import read_outline
from make.token_files import GENERATION
from rankship_benchmarks.bundle.bundle import Bundle
from rankship_benchmarks.index.index import refresh_own_index
from rankship_benchmarks.index.tables import CASES
from rankship_benchmarks.judge.compare import compare_bundles
from rankship_benchmarks.judge.summary import summarise
from rankship_benchmarks.report.earlier_runs import list_histories
from rankship_benchmarks.report.page import render_report
from rankship_benchmarks.report.words import list_headlined, state_headline, state_tokens
from rankship_pipeline.foundation.artifact_key import DECODE, prefill_of
from rankship_targets.trials.trial import Trial

PARTS = {prefill_of(16): 4.0, prefill_of(128): 30.0, DECODE: 1.0}
KEYS = [replace(key, part=part) for key in (DENSE, COMPRESSED) for part in PARTS]


def stretch(trial: Trial, part: str, slower: float = 1.0) -> Trial:
    """The trial as that of a phase, whose second half of samples takes `slower` times as long."""
    count = len(trial.samples_ns)
    times = [round(ns * PARTS[part] * (slower if 2 * n >= count else 1)) for n, ns in enumerate(trial.samples_ns)]
    return replace(trial, key=replace(trial.key, part=part), samples_ns=tuple(times))


def make_phased_run(run_id: str = "phased", slower: float = 1.0) -> Bundle:
    """A run of two ONNX files that generate."""
    run = make_run(rounds=20, layers=3, samples=20)
    artifacts = [replace(one, generation=GENERATION) for one in run.header.build.artifacts if one.key.format == "onnx"]
    trials = [stretch(one, part, slower) for one in run.trials if one.key.format == "onnx" for part in PARTS]
    header = replace(run.header, run_id=run_id, build=replace(run.header.build, artifacts=tuple(artifacts)))
    return replace(run, header=header, trials=tuple(trials))


def test_each_phase_has_its_own_result_over_the_dense_one_of_the_same_phase() -> None:
    results = summarise(make_phased_run()).results
    assert [one.key for one in results] == KEYS
    assert [one.ratio.value for one in results if one.ratio is not None] == pytest.approx([0.46] * 3, rel=0.02)
    assert [one.key.part for one in list_headlined(results)] == [DECODE]
    assert len({one.parity for one in results if one.key.variant == "dense"}) == 1


def test_a_prompts_rate_counts_its_tokens_and_a_tokens_only_itself() -> None:
    for one in summarise(make_phased_run()).results:
        rate, time, tokens = one.tokens_per_second, one.latency_ns, one.key.prompt_tokens or 1
        assert rate is not None
        assert rate.value == pytest.approx(tokens * 1e9 / time.value)
        assert (rate.low, rate.high) == (tokens * 1e9 / (time.high or 0), tokens * 1e9 / (time.low or 0))
    assert {one.tokens_per_second for one in summarise(make_run(rounds=6)).results} == {None}


def test_a_device_that_slows_down_in_a_long_generation_is_seen() -> None:
    found = {one.key: one.drift for one in summarise(make_phased_run(slower=1.3)).results}
    drifts = [drift.value for drift in found.values() if drift is not None]
    assert [key.part for key, drift in found.items() if drift is not None] == [DECODE] * 2
    assert drifts == pytest.approx([0.3] * 2, abs=0.05)
    lines = " ".join(state_tokens(summarise(make_phased_run(slower=1.3)).results))
    assert "onnx dense +" in lines
    assert "onnx compressed +" in lines
    assert list(state_tokens(summarise(make_run(rounds=6)).results)) == []


def test_each_phase_is_compared_with_itself() -> None:
    verdicts = compare_bundles(make_phased_run(), make_phased_run("other", slower=1.2))
    assert [one.key for one in verdicts] == KEYS


def test_the_page_shows_each_phase_with_its_rate_and_one_proof_a_file() -> None:
    page = render_report(make_phased_run())
    read_outline(page)
    for part in PARTS:
        assert f"compressed, {part}</td>" in page
    assert "tokens/s" in page
    assert "tokens/s" not in render_report(make_run(rounds=6))
    assert "(onnx, decode)" in page
    assert "onnx, prefill" not in state_headline(summarise(make_phased_run()))
    assert page.count("</span>compressed</td><td>this host</td>") == 1


def test_each_phase_has_its_own_row_and_history(tmp_path: Path) -> None:
    keep(tmp_path / "phased", make_phased_run())
    run = make_phased_run("other")
    engine = refresh_own_index(tmp_path)
    with engine.connect() as connection:
        assert {one.part for one in connection.execute(select(CASES))} == set(PARTS)
    assert set(list_histories(keep(tmp_path / "other", run), run)) == set(KEYS)
