"""A build that generates is timed phase by phase, each under its own key, and proven as a whole."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from make.artifacts import COMPRESSED, DENSE
from make.builds import make_build
from make.devices import make_local
from make.token_files import GENERATION, TOKENS, store_decoder
from rankship_benchmarks.bundle.bundle import TIMED_TOKENS, open_bundle
from rankship_benchmarks.bundle.suite import GenerationChoice, Suite, default_suite
from rankship_benchmarks.judge.summary import summarise
from rankship_benchmarks.measure.cases import list_cases, make_inputs
from rankship_benchmarks.measure.host_gate import verify_on_host
from rankship_benchmarks.measure.one_device import measure_build
from rankship_benchmarks.measure.run_plan import RunPlan
from rankship_benchmarks.report.page import render_report
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.records import Artifact
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.export_choices import ParityChoice

CHOICE = GenerationChoice(prompt_tokens=(12, 4, 500), new_tokens=6, min_prompts=3)


def name_parts(artifact: Artifact, choice: GenerationChoice = CHOICE) -> list[tuple[str, int]]:
    cases = list_cases([artifact], Suite(recipe="r", generation=choice))
    return [(one.key.part, one.generation.prompt_tokens) for one in cases if one.generation is not None]


def test_prompts_that_the_context_holds_come_first_then_a_token_after_the_shortest(tmp_path: Path) -> None:
    artifact = store_decoder(Store(tmp_path))
    assert name_parts(artifact) == [("prefill 4", 4), ("prefill 12", 12), ("decode", 4)]
    short = replace(artifact, generation=replace(GENERATION, context=3))
    assert name_parts(short) == [("prefill 3", 3)]  # the proof's, and nothing fits behind it
    plain = replace(artifact, generation=None)
    assert list_cases([plain], Suite(recipe="r", generation=CHOICE)) == (plain,)


def test_a_phase_is_timed_on_as_many_tokens_as_it_takes(tmp_path: Path) -> None:
    store, context = Store(tmp_path / "store"), replace(GENERATION, context=9)
    for known, lengths in ((GENERATION, [4, 12, 10]), (context, [4, 9])):
        cases = list_cases([store_decoder(store, generation=known)], Suite(recipe="r", generation=CHOICE))
        made = [np.load(make_inputs(one, store, CHOICE, tmp_path)[0]) for one in cases]
        assert [array.shape for array in made] == [(1, length) for length in lengths]
        assert {array.dtype for array in made} == {np.dtype(np.int64)}
        assert made[0].tolist() == [TOKENS[0, :4].tolist()]
        assert made[-1][0].tolist() == np.resize(TOKENS, lengths[-1]).tolist()


def test_a_build_that_generates_is_proven_as_a_whole_and_timed_by_phase(tmp_path: Path) -> None:
    store, steps, limits = Store(tmp_path / "store"), Steps(quiet=True), ParityChoice()
    build = make_build(store_decoder(store), store_decoder(store, COMPRESSED), recipe="small", parameters=66)
    verified = verify_on_host(build, store, limits, steps)
    suite = Suite(recipe="r", rounds=2, min_samples=20, min_duration_ms=1, max_warmup_ms=9, generation=CHOICE)
    plan = RunPlan(build, verified, store, suite, tmp_path / "results", limits, profile=True)
    folder = measure_build(plan, make_local(tmp_path / "a device"), steps)  # not this machine: proven there too
    bundle = open_bundle(folder)
    parts = ["prefill 4", "prefill 12", "decode"]
    keys = [replace(key, part=part) for key in (DENSE, COMPRESSED) for part in parts]
    assert [trial.key for trial in bundle.trials] == [*keys, *keys[::-1]]
    assert [one.key for one in bundle.header.verified_on_device] == [DENSE, COMPRESSED]
    for trial in bundle.trials:
        assert len(trial.samples_ns) >= (20 if trial.key.part == "decode" else 3)
    assert "prompts of 4, 12, 500; 6 after the shortest" in bundle.header.conditions[TIMED_TOKENS]
    results = summarise(bundle).results
    assert [one.key for one in results] == keys
    assert [one.ratio is not None for one in results] == [False] * 3 + [True] * 3
    assert all(one.parity and one.device_parity and one.peak_rss_bytes for one in results)
    assert "compressed, prefill 12" in render_report(bundle)


def test_without_a_suite_a_budget_for_tokens_is_timed_with_its_prompt() -> None:
    usual = default_suite("r").generation.prompt_tokens
    assert default_suite("r", Budget(latency_ms=3.0)).generation.prompt_tokens == usual
    assert default_suite("r", Budget(token_ms=3.0, prompt_tokens=7)).generation.prompt_tokens == (7,)
    assert default_suite("r", Budget(time_to_first_token_ms=3.0)).generation.prompt_tokens == (128,)
