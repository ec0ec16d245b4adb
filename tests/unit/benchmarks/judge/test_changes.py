"""What is said to differ between two runs: only what does, the likeliest cause first."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from make.artifacts import COMPRESSED, DENSE, make_artifact
from make.builds import make_build, make_plan
from make.bundles import change_header, change_trials, keep, make_header
from make.trials import CALM, make_trial
from rankship_benchmarks.bundle.bundle import Bundle
from rankship_benchmarks.judge.changes import explain_case, list_words
from rankship_pipeline.cli import main
from rankship_pipeline.foundation.artifact_key import DECODE, ArtifactKey
from rankship_pipeline.foundation.records import Factors, LayerRank, RankPlan
from rankship_targets.trials.trial import DeviceState


def make_layer(name: str, rank: int | None, parameters: int) -> LayerRank:
    return LayerRank(
        name=name,
        rows=8,
        columns=8,
        factors=None if rank is None else Factors(rank=rank),
        operators=((8, 8),),
        dense_parameters=64,
        chosen_parameters=parameters,
        relative_error=0.0,
        interference=None,
    )


PLAN = make_plan(make_layer("stem", None, 64), make_layer("head", 4, 40))


def make_run(
    plan: RankPlan = PLAN,
    state: DeviceState = CALM,
    changed: ArtifactKey | None = None,
    **made_from: Any,  # noqa: ANN401 - any field
) -> Bundle:
    """A run of two files; `changed` is the one that `made_from` is said of, and that has another hash."""
    common: dict[str, Any] = {"toolchain": {"torch": "2.1", "onnx": "1.15"}, "source_sha256": {"a": "1"}}
    new = {"sha256": "new", **made_from}
    made = [make_artifact(key, **common | (new if key == changed else {})) for key in (DENSE, COMPRESSED)]
    build = replace(make_build(*made), plan=plan)
    trials = [make_trial(one.key, artifact_sha256=one.sha256, before=state, round=n) for n in range(3) for one in made]
    return Bundle(header=make_header(build, conditions={"kernel": "6.1"}), trials=tuple(trials), finished=True)


def read_changes(before: Bundle, after: Bundle, key: ArtifactKey = COMPRESSED, **outcomes: str) -> list[str]:
    words = {one: outcomes.get(one.variant, "same") for one in (DENSE, COMPRESSED)}
    return list(map(str, explain_case(before, after, key, words).changes))


def test_the_same_file_is_told_and_nothing_that_makes_files_is_listed() -> None:
    after = change_header(make_run(), conditions={"kernel": "6.6"}, recipe_sha256="another")
    why = explain_case(make_run(), after, DENSE, {DENSE: "worse"})
    assert "the same, byte for byte" in why.finding
    assert [str(one) for one in why.changes] == ["kernel: 6.1 → 6.6"]


def test_runs_that_differ_in_nothing_on_record_say_so() -> None:
    why = explain_case(make_run(), make_run(), DENSE, {DENSE: "worse"})
    assert why.changes == ()
    assert "the cause is not on record" in why.finding


def test_another_file_names_layers_then_recipe_models_and_packages() -> None:
    plan = make_plan(make_layer("stem", 2, 20), make_layer("head", 5, 50), make_layer("new", None, 9))
    after = make_run(
        plan,
        changed=COMPRESSED,
        recipe_sha256="s",
        source_sha256={"a": "2", "b": "3"},
        toolchain={"torch": "2.2"},
        parameters=2,
    )
    assert read_changes(make_run(), after) == [
        "layer stem: dense → svd 2",
        "layer head: svd 4 → svd 5",
        "layer new: none → dense",
        "recipe: r → s",
        "weights or code of a: 1 → 2",
        "weights or code of b: none → 3",
        "package torch: 2.1 → 2.2",
        "package onnx: 1.15 → none",
        "parameters: 1 → 2",
    ]


def test_a_dense_file_has_no_ranks_to_blame() -> None:
    plan = make_plan(make_layer("stem", 2, 20), make_layer("head", 4, 40))
    (change,) = read_changes(make_run(), make_run(plan, changed=DENSE), DENSE)
    assert change.startswith("contents of the file, though recipe, models, layers and packages are the same")


def test_of_very_many_layers_the_largest_changes_are_named() -> None:
    early, late = (make_plan(*(make_layer(f"l{n}", rank, rank * n) for n in range(20))) for rank in (2, 3))
    changes = read_changes(make_run(early), make_run(late, changed=COMPRESSED))
    assert changes[0] == "layer l19: svd 2 → svd 3"
    assert changes[8] == "12 more layers: stored so → stored otherwise"
    assert len(changes) == 9


@pytest.mark.parametrize(("other", "first"), [("worse", "temperature"), ("same", "package torch")])
def test_files_that_stayed_the_same_decide_whether_device_or_file_comes_first(other: str, first: str) -> None:
    warm = replace(CALM, temperature_mc=CALM.temperature_mc + 12_000 if CALM.temperature_mc else None)
    after = make_run(state=warm, changed=COMPRESSED, toolchain={"torch": "2.2", "onnx": "1.15"})
    changes = read_changes(make_run(), after, dense=other, compressed="worse")
    assert changes[0].startswith(first)
    assert sorted(one.split(":")[0] for one in changes) == ["package torch", "temperature"]
    why = explain_case(make_run(), after, COMPRESSED, {DENSE: other, COMPRESSED: "worse"})
    assert ("device first" in why.finding) == (other == "worse")
    assert list_words(why)[0] == why.finding


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (replace(CALM, temperature_mc=53_000), []),
        (replace(CALM, temperature_mc=57_000), ["temperature: 50.0 °C → 57.0 °C"]),
        (replace(CALM, frequency_khz=(1_490_000,)), []),
        (replace(CALM, frequency_khz=(600_000,)), ["clock: 1,500 MHz → 600 MHz"]),
        (replace(CALM, load_1m_milli=2500), ["load: 0.1 → 2.5"]),
        (replace(CALM, available_memory_bytes=10**8), ["free memory: 1.0 GB → 100.00 MB"]),
        (replace(CALM, temperature_mc=None, frequency_khz=None), []),
        (replace(CALM, governor="ondemand"), ["governor: performance → ondemand"]),
    ],
)
def test_a_reading_is_named_if_it_moved_more_than_from_day_to_day(state: DeviceState, words: list[str]) -> None:
    assert read_changes(make_run(), make_run(state=state), DENSE) == words


def test_a_case_of_one_run_only_is_told() -> None:
    alone = replace(make_run(), header=make_header(make_build(make_artifact(DENSE))))
    assert "does not have this file" in explain_case(make_run(), alone, COMPRESSED, {}).finding
    assert change_trials(alone).trials


def test_a_phase_of_a_file_that_generates_is_explained_by_its_file() -> None:
    phase = replace(DENSE, part=DECODE)
    why = explain_case(make_run(), make_run(changed=DENSE, recipe_sha256="s"), phase, {})
    assert str(why.changes[0]) == "recipe: r → s"


def test_compare_explains_a_worse_case_and_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(), make_run(changed=COMPRESSED, recipe_sha256="s")]
    for name, run, factor in zip(("a", "b"), runs, (1.0, 1.1), strict=True):
        noise = np.random.default_rng(len(name)).lognormal(0, 0.002, 16)
        trials = [
            make_trial(
                one.key,
                artifact_sha256=one.sha256,
                round=number,
                samples_ns=(round(1e6 * noise[number] * (factor if one.key == COMPRESSED else 1)),) * 3,
            )
            for number in range(16)
            for one in run.header.build.artifacts
        ]
        keep(tmp_path / name, replace(run, trials=tuple(trials)))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    printed = capsys.readouterr().out
    assert "onnx compressed, time: worse" in printed
    assert "recipe: r → s" in printed
    assert "onnx dense, time" not in printed
