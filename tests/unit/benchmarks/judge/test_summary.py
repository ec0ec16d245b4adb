import io
from dataclasses import replace

import pytest
from rich.console import Console

from make.bundles import change_trial
from make.judged_runs import QUIET, SPEEDS, make_run
from make.trials import make_reading
from rankship_benchmarks.bundle.bundle import STAND_IN
from rankship_benchmarks.judge.summary import Summary, summarise
from rankship_benchmarks.report.words import print_summary, state_headline
from rankship_pipeline.foundation.artifact_key import VARIANTS
from rankship_pipeline.foundation.errors import MeasurementError, UnlikeConditions
from rankship_pipeline.foundation.formats import FORMATS


def render(summary: Summary, width: int = 100) -> str:
    stream = io.StringIO()
    print_summary(summary, Console(file=stream, width=width))
    return stream.getvalue()


def test_results_come_by_format_dense_first_with_what_the_build_knows() -> None:
    summary = summarise(make_run())
    assert [(one.key.format, one.key.variant) for one in summary.results] == [(f, v) for f in FORMATS for v in VARIANTS]
    dense, compressed = summary.results[:2]
    assert dense.ratio is None
    assert dense.accuracy is not None
    assert dense.accuracy.stage == "merged"
    assert compressed.accuracy is not None
    assert compressed.accuracy.stage == "compressed"
    assert compressed.parity is not None
    assert compressed.energy is None
    assert summary.energy_note
    assert summary.cautions == ("Rounds: 8 cannot show whether they are correlated (12 can); intervals assume not.",)


def test_an_emulated_devices_numbers_are_distrusted_first() -> None:
    bundle = make_run()
    conditions = {**bundle.header.conditions, STAND_IN: "emulated, for a pi4"}
    (caution, *_) = summarise(replace(bundle, header=replace(bundle.header, conditions=conditions))).cautions
    assert caution.startswith("The device is a stand-in, emulated, for a pi4: its times")


def test_ratio_is_paired_by_round_and_its_interval_holds_the_truth() -> None:
    for one in summarise(make_run(rounds=20)).results:
        if one.ratio is not None:
            assert one.ratio.low is not None
            assert one.ratio.high is not None
            assert one.ratio.low <= SPEEDS[one.key.format][1] <= one.ratio.high
            assert one.ratio.rounds == 20


def test_percentiles_appear_only_where_the_samples_support_them() -> None:
    few, some, many = (summarise(make_run(samples=count)).results[0] for count in (28, 29, 299))
    assert (few.p90_ns, few.p99_ns) == (None, None)
    assert some.p90_ns is not None
    assert some.p99_ns is None
    assert many.p99_ns is not None


def test_memory_is_the_largest_over_rounds_and_less_the_runtimes_own() -> None:
    bundle = make_run()
    result = summarise(change_trial(bundle, 0, peak_rss_bytes=99_000_000)).results[0]
    assert result.peak_rss_bytes == 99_000_000
    assert result.model_rss_bytes == 47_000_000
    untold = replace(bundle, trials=tuple(replace(one, peak_rss_bytes=None) for one in bundle.trials))
    assert summarise(untold).results[0].peak_rss_bytes is None


def test_a_format_that_is_not_faster_is_said_with_the_layers_to_suspect() -> None:
    (note,) = summarise(make_run()).slower_notes
    assert note.startswith("compressed is not faster in executorch (\u00d7 1.09 [")
    assert "layers most likely to blame: " in note
    assert "classifier (only 10 rows)" in note


def test_a_layer_near_break_even_is_a_suspect() -> None:
    bundle = make_run()
    layers = tuple(
        replace(layer, rows=64, chosen_parameters=int(0.7 * layer.dense_parameters))
        for layer in bundle.header.build.plan.layers
    )
    plan = replace(bundle.header.build.plan, layers=layers)
    build = replace(bundle.header.build, plan=plan)
    header = replace(bundle.header, build=build)
    (note,) = summarise(replace(bundle, header=header)).slower_notes
    assert "keeps 70% of its parameters" in note


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"warmed_up": False}, "Warm-up: dense onnx never reached a steady state in 1 of 8 rounds (round 0)."),
        ({"before": replace(QUIET, load_1m_milli=4001)}, "Doubted: other load in 1 of 48 trials"),
        ({"after": replace(QUIET, governor="ondemand")}, "Governor: ondemand, not performance"),
        ({"after": replace(QUIET, governor=None)}, "Governor unknown"),
        ({"after": replace(QUIET, temperature_mc=None)}, "Temperature unknown"),
        ({"after": replace(QUIET, frequency_khz=(600_000,) * 4)}, "Frequency: moved by up to 67%"),
        ({"after": replace(QUIET, frequency_khz=None)}, "Frequency unknown"),
        ({"samples_ns": (400_000,) * 50 + (440_000,) * 50}, "Drift: dense onnx changed speed inside round 0"),
        ({"retries": 2}, "retried 2 times"),
    ],
)
def test_every_reason_for_distrust_is_said(changes: dict[str, object], word: str) -> None:
    cautions = summarise(change_trial(make_run(), 0, **changes)).cautions
    assert any(word in caution for caution in cautions), cautions


def test_load_that_our_own_threads_explain_is_no_caution() -> None:
    busy = summarise(change_trial(make_run(), 0, before=replace(QUIET, load_1m_milli=1500)))
    assert busy.cautions == summarise(make_run()).cautions


def test_too_few_rounds_leave_no_interval_and_say_so() -> None:
    summary = summarise(make_run(rounds=5))
    assert "Too few rounds for an interval: 5 for every artifact" in summary.cautions[0]
    assert summary.results[0].latency_ns.low is None
    assert "too few rounds to tell" in state_headline(summary)
    assert "not shown to be faster in onnx" in summary.slower_notes[0]


def test_a_wide_spread_between_rounds_is_a_caution() -> None:
    bundle = make_run()
    for place in (0, 6, 12):  # dense onnx in rounds 0, 1, 2
        bundle = change_trial(bundle, place, samples_ns=(600_000,) * 40)
    assert any("Spread: the rounds of dense onnx" in caution for caution in summarise(bundle).cautions)


def test_unfinished_and_unproven_runs_say_so() -> None:
    bundle = make_run()
    bundle = replace(bundle, finished=False, header=replace(bundle.header, verified=bundle.header.verified[1:]))
    cautions = summarise(bundle).cautions
    assert cautions[0] == "The run is unfinished: 48 trials so far."
    assert cautions[1] == "dense onnx was timed without a proof of parity."


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"threads": 4}, "the thread count differs between trials: 4 in round 0; 1 in rounds 0, 1, 2"),
        ({"agent_sha256": "f" * 64}, "the agent differs between trials: ffffffffffff in round 0"),
        ({"device": "pixel6"}, "round 0 ran on 'pixel6', the run is for 'pi4-bench'"),
        ({"artifact_sha256": "0" * 64}, "round 0 of dense onnx timed 000000000000, which this build did not make"),
        (
            {"runtime": make_reading(version="1.30.0")},
            "the onnx runtime differs between trials: onnxruntime 1.30.0",
        ),
    ],
)
def test_unlike_conditions_are_refused_and_named(changes: dict[str, object], word: str) -> None:
    with pytest.raises(UnlikeConditions) as caught:
        summarise(change_trial(make_run(), 0, **changes))
    assert word in str(caught.value)
    assert caught.value.hint


def test_a_bundle_without_samples_is_refused() -> None:
    bundle = make_run()
    with pytest.raises(MeasurementError, match="no trial was taken"):
        summarise(replace(bundle, trials=()))
    with pytest.raises(MeasurementError, match="no samples in round 0 of dense onnx"):
        summarise(change_trial(bundle, 0, samples_ns=()))


def test_a_run_of_one_variant_has_no_ratio() -> None:
    bundle = make_run()
    only = replace(bundle, trials=tuple(one for one in bundle.trials if one.key.variant == "compressed"))
    summary = summarise(only)
    assert all(one.ratio is None for one in summary.results)
    assert "latency" not in state_headline(summary)


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_and_hides_nothing(width: int) -> None:
    text = render(summarise(make_run()), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "\x1b" not in text
    for word in ("compressed", "[0.45, 0.47]", "uniform", "source:digits_even"):
        assert word in text


def test_brackets_in_names_are_printed_and_not_obeyed() -> None:
    assert "[bold]x[/nope]" in render(summarise(make_run(recipe="[bold]x[/nope]")))


def test_the_headline_says_what_was_won_and_lost() -> None:
    sentence = state_headline(summarise(make_run()))
    assert sentence.startswith(
        "2.5\u00d7 fewer parameters: accuracy 97.3 % → 95.9 %, latency \u00d7 0.46 [0.45, 0.47] (onnx)"
    )
    assert sentence.endswith("(executorch: slower).")
