import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from rankship_benchmarks.bundle.bundle import STAND_IN, Bundle, Header
from rankship_benchmarks.judge.summary import Summary, summarise
from rankship_benchmarks.report.words import print_summary, state_headline
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.errors import MeasurementError, UnlikeConditions
from rankship_pipeline.foundation.records import (
    FORMATS,
    VARIANTS,
    Accuracy,
    Alternative,
    Artifact,
    ArtifactKey,
    Build,
    Factors,
    Format,
    LayerRank,
    RankPlan,
    TensorSpec,
    Variant,
    Verified,
)
from rankship_targets.trials.trial import DeviceState, RuntimeReading, Trial

RUNTIMES: dict[Format, tuple[str, str]] = {
    "onnx": ("onnxruntime", "1.31.0"),
    "tflite": ("ai-edge-litert", "2.3.0"),
    "executorch": ("executorch", "1.5.1"),
}
# Median latency of the dense model in ns, and the true ratio of the compressed one.
SPEEDS: dict[Format, tuple[float, float]] = {
    "onnx": (412_000, 0.46),
    "tflite": (655_000, 0.71),
    "executorch": (520_000, 1.08),
}
QUIET = DeviceState(
    governor="performance",
    frequency_khz=(1_800_000,) * 4,
    temperature_mc=48_300,
    load_1m_milli=700,
    available_memory_bytes=3_100_000_000,
)


def make_accuracy(stage: str, correct: int, samples: int = 2000) -> Accuracy:
    share, margin = correct / samples, 0.008
    return Accuracy(stage=stage, samples=samples, correct=correct, low=share - margin, high=min(1.0, share + margin))


def make_plan(method: str, layers: int = 12, kept: float = 0.3) -> RankPlan:
    """Residual stages that widen, then a narrow head; the stem and one early layer stay dense."""
    chosen = []
    for place in range(layers):
        last = place == layers - 1
        rows = 10 if last else 32 * 2 ** (3 * place // layers)
        columns = 256 if last else rows * 9
        full = min(rows, columns)
        rank = None if place in {0, 3} else max(2, int(full * kept * (1 + 0.5 * (-1) ** place)))
        dense = rows * columns
        chosen.append(
            LayerRank(
                name="classifier" if last else f"stage{1 + 3 * place // layers}.block{place % 4}.conv{1 + place % 2}",
                rows=rows,
                columns=columns,
                factors=None if rank is None else Factors(rank=rank),
                operators=((rows, columns),) if rank is None else ((rank, columns), (rows, rank)),
                dense_parameters=dense,
                chosen_parameters=dense if rank is None else rank * (rows + columns),
                relative_error=0.0 if rank is None else 0.06 / (1 + place) + 0.004 * (place % 3),
                interference=0.02 + 0.001 * place,
            )
        )
    total = 9_800 + sum(layer.chosen_parameters for layer in chosen)
    return RankPlan(
        method=method,
        layers=tuple(chosen),
        fixed_parameters=9_800,
        total_parameters=total,
        unit="parameters",
        total_cost=total,
        budget_cost=total + 37,
        predicted_error=0.031,
    )


def make_build(recipe: str = "digits-merge", layers: int = 12) -> Build:
    plan = make_plan("calibrated", layers)
    dense = 9_800 + sum(layer.dense_parameters for layer in plan.layers)
    counts: dict[Variant, int] = {"dense": dense, "compressed": plan.total_parameters}
    artifacts = [
        Artifact(
            key=ArtifactKey(variant=variant, format=format_),
            file=f"{variant}.{format_}",
            size_bytes=4 * parameters + 18_000,
            sha256=digest([variant, format_]),
            inputs=(TensorSpec(name="image", shape=(1, 1, 28, 28), dtype="float32"),),
            outputs=(TensorSpec(name="logits", shape=(1, 10), dtype="float32"),),
            parameters=parameters,
            factored_layers=tuple(plan.factors) if variant == "compressed" else (),
            recipe_sha256=digest(recipe),
            source_sha256={"digits_even": digest("even"), "digits_odd": digest("odd")},
            toolchain={"torch": "2.13.0", "onnx": "1.23.2"},
        )
        for format_ in FORMATS
        for variant, parameters in counts.items()
    ]
    return Build(
        recipe=recipe,
        recipe_sha256=digest(recipe),
        artifacts=tuple(artifacts),
        plan=plan,
        accuracies=(
            make_accuracy("source:digits_even", 1958),
            make_accuracy("source:digits_odd", 1949),
            make_accuracy("merged", 1946),
            make_accuracy("compressed", 1918),
        ),
        alternatives=tuple(
            Alternative(method=method, plan=make_plan(method, layers, kept), accuracy=make_accuracy(method, correct))
            for method, kept, correct in (("energy", 0.3, 1897), ("uniform", 0.295, 1874), ("greedy", 0.3, 1895))
        ),
        dense_parameters=dense,
    )


def make_trial(
    build: Build, place: tuple[int, Variant, Format], random: np.random.Generator, samples: int = 200
) -> Trial:
    """Lognormal jitter within a round, a smaller one between rounds, and a rare slow tail."""
    number, variant, format_ = place
    median, ratio = SPEEDS[format_]
    centre = median * (ratio if variant == "compressed" else 1) * random.lognormal(0, 0.008)
    times = centre * random.lognormal(0, 0.03, samples) * (1 + 0.4 * (random.random(samples) < 0.01))
    name, version = RUNTIMES[format_]
    key = ArtifactKey(variant=variant, format=format_)
    return Trial(
        round=number,
        key=key,
        artifact_sha256=next(o.sha256 for o in build.artifacts if o.key == key),
        device="pi4-bench",
        started_utc=f"2025-01-01T10:{number:02}:00+00:00",
        threads=1,
        load_ns=int(9e6 * random.lognormal(0, 0.05)),
        warmup_ns=(int(4 * centre), int(1.2 * centre), *[int(centre)] * 20),
        warmed_up=True,
        samples_ns=tuple(int(time) for time in times),
        peak_rss_bytes=61_000_000 + int(4e6 * random.random()),
        runtime_rss_bytes=52_000_000,
        runtime=RuntimeReading(
            name=name, version=version, python="3.11.2", machine="aarch64", kernel="6.1.0-rpi7-rpi-v8"
        ),
        before=QUIET,
        after=QUIET,
        agent_sha256=digest("agent"),
        retries=0,
    )


def make_bundle(rounds: int = 8, layers: int = 12, recipe: str = "digits-merge", samples: int = 200) -> Bundle:
    build, random = make_build(recipe, layers), np.random.default_rng(7)
    verified = tuple(
        Verified(
            artifact_sha256=one.sha256,
            key=one.key,
            runtime=RUNTIMES[one.key.format][0],
            runtime_version=RUNTIMES[one.key.format][1],
            samples=256,
            max_relative_error=3.1e-7,
            min_cosine=0.99999994,
            top1_agreement=1.0,
        )
        for one in build.artifacts
    )
    header = Header(
        run_id="20250101-100000-digits",
        created_utc="2025-01-01T10:00:00+00:00",
        suite_sha256=digest("suite"),
        recipe=recipe,
        recipe_sha256=build.recipe_sha256,
        build_sha256=digest(build),
        device="pi4-bench",
        build=build,
        verified=verified,
        rounds=rounds,
        conditions={"host kernel": "Linux 6.8", "host CPU": "AMD EPYC"},
        rankship_version="0.1.0",
    )
    places = [(number, variant, format_) for number in range(rounds) for format_ in FORMATS for variant in VARIANTS]
    trials = tuple(make_trial(build, place, random, samples) for place in places)
    return Bundle(header=header, trials=trials, finished=True)


def alter(bundle: Bundle, place: int, **changes: object) -> Bundle:
    """The same bundle with one trial changed."""
    trials = list(bundle.trials)
    trials[place] = dataclasses.replace(trials[place], **changes)  # type: ignore[arg-type]
    return dataclasses.replace(bundle, trials=tuple(trials))


def render(summary: Summary, width: int = 100) -> str:
    stream = io.StringIO()
    print_summary(summary, Console(file=stream, width=width))
    return stream.getvalue()


def test_results_come_by_format_dense_first_with_what_the_build_knows() -> None:
    summary = summarise(make_bundle())
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
    assert summary.cautions == ("Rounds: 8 cannot show whether they hang together (12 can); intervals assume not.",)


def test_an_emulated_devices_numbers_are_distrusted_first() -> None:
    bundle = make_bundle()
    conditions = {**bundle.header.conditions, STAND_IN: "emulated, for a pi4"}
    (caution, *_) = summarise(
        dataclasses.replace(bundle, header=dataclasses.replace(bundle.header, conditions=conditions))
    ).cautions
    assert caution.startswith("A stand-in, emulated, for a pi4: its times")


def test_ratio_is_paired_by_round_and_its_interval_holds_the_truth() -> None:
    for one in summarise(make_bundle(rounds=20)).results:
        if one.ratio is not None:
            assert one.ratio.low is not None
            assert one.ratio.high is not None
            assert one.ratio.low <= SPEEDS[one.key.format][1] <= one.ratio.high
            assert one.ratio.rounds == 20


def test_percentiles_appear_only_where_the_samples_support_them() -> None:
    few, some, many = (summarise(make_bundle(samples=count)).results[0] for count in (28, 29, 299))
    assert (few.p90_ns, few.p99_ns) == (None, None)
    assert some.p90_ns is not None
    assert some.p99_ns is None
    assert many.p99_ns is not None


def test_memory_is_the_largest_over_rounds_and_less_the_runtimes_own() -> None:
    bundle = make_bundle()
    result = summarise(alter(bundle, 0, peak_rss_bytes=99_000_000)).results[0]
    assert result.peak_rss_bytes == 99_000_000
    assert result.model_rss_bytes == 47_000_000
    untold = dataclasses.replace(
        bundle, trials=tuple(dataclasses.replace(one, peak_rss_bytes=None) for one in bundle.trials)
    )
    assert summarise(untold).results[0].peak_rss_bytes is None


def test_a_format_that_is_not_faster_is_said_with_the_layers_to_suspect() -> None:
    (note,) = summarise(make_bundle()).slower_notes
    assert note.startswith("compressed is not faster in executorch (\u00d7 1.09 [")
    assert "layers most likely to blame: " in note
    assert "classifier (only 10 rows)" in note


def test_a_layer_near_break_even_is_a_suspect() -> None:
    bundle = make_bundle()
    layers = tuple(
        dataclasses.replace(layer, rows=64, chosen_parameters=int(0.7 * layer.dense_parameters))
        for layer in bundle.header.build.plan.layers
    )
    plan = dataclasses.replace(bundle.header.build.plan, layers=layers)
    build = dataclasses.replace(bundle.header.build, plan=plan)
    header = dataclasses.replace(bundle.header, build=build)
    (note,) = summarise(dataclasses.replace(bundle, header=header)).slower_notes
    assert "keeps 70% of its parameters" in note


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"warmed_up": False}, "Warm-up: dense onnx never reached a steady state in 1 of 8 rounds (round 0)."),
        ({"before": dataclasses.replace(QUIET, load_1m_milli=4001)}, "Doubted: other load in 1 of 48 trials"),
        ({"after": dataclasses.replace(QUIET, governor="ondemand")}, "Governor: ondemand, not performance"),
        ({"after": dataclasses.replace(QUIET, governor=None)}, "Governor unknown"),
        ({"after": dataclasses.replace(QUIET, temperature_mc=None)}, "Temperature unknown"),
        ({"after": dataclasses.replace(QUIET, frequency_khz=(600_000,) * 4)}, "Frequency: moved by up to 67%"),
        ({"after": dataclasses.replace(QUIET, frequency_khz=None)}, "Frequency unknown"),
        ({"samples_ns": (400_000,) * 50 + (440_000,) * 50}, "Drift: dense onnx changed speed inside round 0"),
        ({"retries": 2}, "retried 2 times"),
    ],
)
def test_every_reason_for_distrust_is_said(changes: dict[str, object], word: str) -> None:
    cautions = summarise(alter(make_bundle(), 0, **changes)).cautions
    assert any(word in caution for caution in cautions), cautions


def test_load_that_our_own_threads_explain_is_no_caution() -> None:
    busy = summarise(alter(make_bundle(), 0, before=dataclasses.replace(QUIET, load_1m_milli=1500)))
    assert busy.cautions == summarise(make_bundle()).cautions


def test_too_few_rounds_leave_no_interval_and_say_so() -> None:
    summary = summarise(make_bundle(rounds=5))
    assert "Too few rounds for an interval: 5 for every artifact" in summary.cautions[0]
    assert summary.results[0].latency_ns.low is None
    assert "too few rounds to tell" in state_headline(summary)
    assert "not shown to be faster in onnx" in summary.slower_notes[0]


def test_a_wide_spread_between_rounds_is_a_caution() -> None:
    bundle = make_bundle()
    for place in (0, 6, 12):  # dense onnx in rounds 0, 1, 2
        bundle = alter(bundle, place, samples_ns=(600_000,) * 40)
    assert any("Spread: the rounds of dense onnx" in caution for caution in summarise(bundle).cautions)


def test_unfinished_and_unproven_runs_say_so() -> None:
    bundle = make_bundle()
    bundle = dataclasses.replace(
        bundle, finished=False, header=dataclasses.replace(bundle.header, verified=bundle.header.verified[1:])
    )
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
            {"runtime": RuntimeReading(name="onnxruntime", version="1.30.0", python="3", machine="m", kernel="k")},
            "the onnx runtime differs between trials: onnxruntime 1.30.0",
        ),
    ],
)
def test_unlike_conditions_are_refused_and_named(changes: dict[str, object], word: str) -> None:
    with pytest.raises(UnlikeConditions) as caught:
        summarise(alter(make_bundle(), 0, **changes))
    assert word in str(caught.value)
    assert caught.value.hint


def test_a_bundle_without_samples_is_refused() -> None:
    bundle = make_bundle()
    with pytest.raises(MeasurementError, match="no trial was taken"):
        summarise(dataclasses.replace(bundle, trials=()))
    with pytest.raises(MeasurementError, match="no samples in round 0 of dense onnx"):
        summarise(alter(bundle, 0, samples_ns=()))


def test_a_run_of_one_variant_has_no_ratio() -> None:
    bundle = make_bundle()
    only = dataclasses.replace(bundle, trials=tuple(one for one in bundle.trials if one.key.variant == "compressed"))
    summary = summarise(only)
    assert all(one.ratio is None for one in summary.results)
    assert "latency" not in state_headline(summary)


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_and_hides_nothing(width: int) -> None:
    text = render(summarise(make_bundle()), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "\x1b" not in text
    for word in ("compressed", "[0.45, 0.47]", "uniform", "source:digits_even"):
        assert word in text


def test_brackets_in_names_are_printed_and_not_obeyed() -> None:
    assert "[bold]x[/nope]" in render(summarise(make_bundle(recipe="[bold]x[/nope]")))


def test_the_headline_says_what_was_won_and_lost() -> None:
    sentence = state_headline(summarise(make_bundle()))
    assert sentence.startswith(
        "2.5\u00d7 fewer parameters: accuracy 97.3 % → 95.9 %, latency \u00d7 0.46 [0.45, 0.47] (onnx)"
    )
    assert sentence.endswith("(executorch: slower).")
