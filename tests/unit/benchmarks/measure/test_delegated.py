"""A suite says what computes each format's files; what a device lacks is refused before anything is measured."""

import stat
from dataclasses import replace
from pathlib import Path

import pytest

from make.artifacts import CANARY, DENSE, describe_file, make_artifact, sign
from make.builds import make_build
from make.bundles import change_header, change_trial, change_trials, make_header
from make.devices import make_local
from make.onnx_files import save_product
from make.trials import make_reading, make_trial
from rankship_benchmarks.bundle.bundle import Bundle, open_bundle
from rankship_benchmarks.bundle.delegated import Delegated
from rankship_benchmarks.bundle.suite import DelegateChoice, Suite, read_suite
from rankship_benchmarks.judge.changes import list_device_changes
from rankship_benchmarks.judge.comparability import find_differences
from rankship_benchmarks.judge.summary import summarise
from rankship_benchmarks.measure import cases
from rankship_benchmarks.measure.cases import list_cases, list_wanted
from rankship_benchmarks.measure.one_device import measure_build
from rankship_benchmarks.measure.ready import check_ready
from rankship_benchmarks.measure.run_plan import RunPlan
from rankship_benchmarks.report.delegate_words import list_delegated, state_aggregates
from rankship_benchmarks.report.page import render_report
from rankship_pipeline.foundation.artifact_key import ArtifactKey, Delegate
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError, Lacks, UnlikeConditions
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.export_choices import ParityChoice

TFLITE = ArtifactKey(variant="dense", format="tflite")
PTE = ArtifactKey(variant="dense", format="executorch")
PLAIN = replace(PTE, delegate="plain")
STEPS = Steps(quiet=True)


def list_keys(choice: DelegateChoice, *keys: ArtifactKey) -> list[ArtifactKey]:
    return [one.key for one in list_cases([make_artifact(key) for key in keys], Suite(recipe="r", delegates=choice))]


def test_without_a_word_every_file_is_timed_once_as_its_runtime_computes_it() -> None:
    keys = [DENSE, TFLITE, PTE, PLAIN, CANARY]
    assert list_keys(DelegateChoice(), *keys) == keys


def test_a_runtime_is_asked_for_each_delegate_and_a_file_is_made_for_one() -> None:
    choice = DelegateChoice(onnx=("xnnpack", "cpu"), tflite=("plain", "gpu", "xnnpack"), executorch=("plain",))
    asked = replace(DENSE, delegate="xnnpack"), DENSE, replace(TFLITE, delegate="plain"), TFLITE, PLAIN, CANARY
    assert list_keys(choice, DENSE, TFLITE, PTE, PLAIN, CANARY) == [*asked]
    assert [one.asked for one in asked] == ["xnnpack", None, "plain", None, None, None]
    assert [one.exported for one in asked] == [DENSE, DENSE, TFLITE, TFLITE, PLAIN, CANARY]
    wanted = list_wanted(Suite(recipe="r", delegates=choice), ["onnx", "tflite"])
    assert wanted == {"onnx": ("xnnpack",), "tflite": ("plain", "gpu")}


def test_a_delegate_that_no_file_was_made_for_is_refused() -> None:
    with pytest.raises(InputError, match="times executorch files with plain, but none was made for it") as caught:
        list_keys(DelegateChoice(executorch=("xnnpack", "plain")), DENSE, PTE)
    assert "export.executorch" in caught.value.hint
    assert list_keys(DelegateChoice(executorch=("plain",)), DENSE) == [DENSE], "a build without the format"


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('onnx = ["gpu"]', "onnx"),
        ('tflite = ["cpu"]', "tflite"),
        ('tflite = ["gpu"]', "nothing that is timed with samples"),
    ],
)
def test_a_suite_with_an_unknown_delegate_or_only_those_without_samples_is_refused(
    line: str, match: str, tmp_path: Path
) -> None:
    path = tmp_path / "suite.toml"
    path.write_text(f'recipe = "r.toml"\n[delegates]\n{line}\n')
    with pytest.raises(InputError, match=match):
        read_suite(path)


def test_a_device_whose_runtime_lacks_a_delegate_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    device = make_local(tmp_path)
    wanted: dict[Format, dict[Format, tuple[Delegate, ...]]] = {
        "onnx": {"onnx": ("nnapi",)},
        "tflite": {"tflite": ("gpu",)},
    }
    check_ready([device], {"onnx": ()}, STEPS)
    with pytest.raises(Lacks, match="has no NNAPI provider for onnx, only CPU provider") as caught:
        check_ready([device], wanted["onnx"], STEPS)
    assert "delegates.onnx" in caught.value.hint
    with pytest.raises(Lacks, match="has no benchmark_model"):
        check_ready([device], wanted["tflite"], STEPS)


PROGRAM = """#!/bin/sh
echo "Explicitly applied GPU delegate, and the model graph will be {share} executed by the delegate."
echo "count=5 first=900 curr=800 min=700 max=900 avg=800 std=9"
echo "Inference timings in us: Init: 100, First inference: 900, Warmup (avg): 800, Inference (avg): 750"
echo "count=20 first=750 curr=750 min=700 max=900 avg=750 std=9"
"""


def measure_with_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: str) -> Bundle:
    """Run a suite with an ONNX file for the trials, and a TFLite file that only benchmark_model runs."""
    store = Store(tmp_path / "store")
    line, other = save_product(store.root / "tiny.onnx"), store.root / "m.tflite"
    other.write_bytes(b"model")
    monkeypatch.setattr(cases, "find_inputs", lambda *_: [line.with_name("x.npy")])
    program = tmp_path / "benchmark_model"
    program.write_text(PROGRAM.format(share=share))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    device = replace(make_local(tmp_path / "board", "this-machine"), benchmark_model=str(program))
    artifacts = describe_file(line), describe_file(other, TFLITE)
    proofs = [sign(line), sign(other, TFLITE)]
    choice = DelegateChoice(tflite=("xnnpack", "gpu"))
    suite = Suite(recipe="r", rounds=2, min_samples=20, min_duration_ms=1, delegates=choice)
    monkeypatch.setattr("rankship_benchmarks.measure.one_device.list_cases", lambda *_: artifacts[:1])
    plan = RunPlan(make_build(*artifacts), proofs, store, suite, tmp_path / "results", ParityChoice())
    return open_bundle(measure_build(plan, device, STEPS))


def test_what_gives_no_samples_is_kept_apart_from_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = measure_with_program(tmp_path, monkeypatch, "completely")
    gpu = replace(TFLITE, delegate="gpu")
    assert [(one.round, one.key, one.share) for one in bundle.aggregates] == [(n, gpu, "completely") for n in range(2)]
    assert all(len(one.binary_sha256) == 64 for one in bundle.aggregates)
    assert {trial.key for trial in bundle.trials} == {DENSE}
    summary = summarise(bundle)
    assert [one.key for one in summary.results] == [DENSE], "no result, so no ratio and no verdict"
    told = list(state_aggregates(summary))
    assert "There are no samples" in told[0]
    assert told[1].startswith("tflite dense, gpu: the GPU delegate ran the whole graph; mean 750")
    assert "Delegates that give no samples" in render_report(bundle)


def test_a_program_that_used_no_delegate_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = measure_with_program(tmp_path, monkeypatch, "never")
    (line,) = list(state_aggregates(summarise(bundle)))[1:]
    assert "these are the processor's times" in line


def look(partitions: int) -> Delegated:
    return Delegated(key=TFLITE, partitions=partitions, operators=partitions, left={"CUMSUM": 2}, source="the runtime")


def test_xnnpack_that_takes_nothing_is_said_loudly() -> None:
    trials = tuple(make_trial(TFLITE, round=number) for number in range(3))
    header = make_header(make_build(make_artifact(TFLITE)), delegated=(look(0),))
    summary = summarise(Bundle(header=header, trials=trials, finished=True))
    assert "XNNPACK takes nothing of dense tflite: its times are those of the processor without it." in summary.cautions
    (line,) = list_delegated(summary.results)
    assert (line.taken, line.alarming) == ("nothing", True)
    assert not look(1).took_nothing
    assert not replace(look(0), key=replace(TFLITE, delegate="plain")).took_nothing


def test_unlike_binaries_are_not_compared_and_another_partition_is_a_change() -> None:
    trials = tuple(make_trial(TFLITE, round=number) for number in range(3))
    before = Bundle(header=make_header(delegated=(look(1),)), trials=trials, finished=True)
    known = change_trials(
        before, runtime=replace(make_reading("ai-edge-litert"), process="python", binary_sha256="a" * 64)
    )
    other = change_trials(
        before, runtime=replace(make_reading("ai-edge-litert"), process="program", binary_sha256="b" * 64)
    )
    found = {one.aspect: one.weight for one in find_differences(known, other)}
    assert found == {"tflite process": "forbids", "tflite binary": "forbids"}
    assert find_differences(before, other) == (), "what an older release did not note is no difference"
    known = change_header(known, build=make_build(make_artifact(TFLITE)))
    with pytest.raises(UnlikeConditions, match=r"tflite runtime differs between trials: .* python, a{12} in round"):
        summarise(change_trial(known, 2, runtime=other.trials[0].runtime))
    after = change_header(before, delegated=(look(2),))
    (change,) = list_device_changes(before, after, TFLITE)
    assert str(change).startswith("what XNNPACK takes: 1 of 3 operators in 1 partition; left: 2 CUMSUM → 2 of 4")
