"""Accuracy on the device: the recipe's own measure of the outputs there, beside the host's of the same file."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from make.artifacts import DENSE, describe_file, sign
from make.builds import make_build
from make.devices import make_local, write_python
from make.onnx_files import SAMPLES, WEIGHT, save_product
from make.recipes import make_stages, write_untrained_recipe
from rankship_benchmarks.bundle.suite import AccuracyChoice, Suite, read_suite
from rankship_benchmarks.measure.device_accuracy import examine_device, read_device_scores
from rankship_benchmarks.measure.exam import Exam, set_exam
from rankship_benchmarks.measure.run_plan import RunPlan
from rankship_benchmarks.report.accuracy_words import show_differing, state_changes, state_part
from rankship_benchmarks.verbs.where import refuse_exam
from rankship_pipeline.evaluate.judging import Judging
from rankship_pipeline.evaluate.likelihood import Answer
from rankship_pipeline.flow.judging import Court, OwnScore
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.quality import ACCURACY
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.export_choices import ParityChoice
from rankship_targets.session.session import open_session

STEPS = Steps(quiet=True)
# A device's onnxruntime whose kernels turn every sign.
OTHER_KERNELS = """
import importlib, sys
sys.path.remove({folder!r}); del sys.modules["onnxruntime"]
real = importlib.import_module("onnxruntime")
class Other(real.InferenceSession):
    def io_binding(self):
        bound = super().io_binding()
        right = bound.copy_outputs_to_cpu
        bound.copy_outputs_to_cpu = lambda: [-output for output in right()]
        return bound
real.InferenceSession = Other
"""


@pytest.fixture
def plan(tmp_path: Path) -> RunPlan:
    """A build of one matrix product, and an exam that it passes on this host."""
    model = save_product(tmp_path / "store/tiny.onnx")
    likelihood = {"y": Answer()}
    judging = Judging(kind="classification", judged=("y",), outputs=("y",), likelihood=likelihood, labelled=True)
    labels = torch.from_numpy((SAMPLES @ WEIGHT).argmax(1))
    exam = Exam((torch.from_numpy(SAMPLES),), labels, 50, Court(judging), ("x",))
    build, store = make_build(describe_file(model)), Store(tmp_path / "store")
    return RunPlan(build, [sign(model)], store, Suite(recipe="r"), tmp_path / "results", ParityChoice(), exam=exam)


def examine(plan: RunPlan, folder: Path, python: Path | None = None) -> Path:
    (artifact,), (proof,) = plan.build.artifacts, plan.verified
    folder.mkdir()
    with open_session(make_local(folder / "work", "board", python)) as session:
        remote = {artifact.sha256: session.push(plan.store.root / artifact.file, proof)}
        examine_device(folder, [artifact], plan, remote, session, STEPS)
    return folder


def test_like_kernels_score_alike_and_no_prediction_differs(plan: RunPlan, tmp_path: Path) -> None:
    (found,) = read_device_scores(examine(plan, tmp_path / "run"))
    assert (found.key, found.differing, found.answers, found.samples) == (DENSE, 0, 5, 5)
    assert (found.host.correct, found.device.correct, found.device.samples) == (5, 5, 5)
    assert found.device.low is not None
    assert (state_part(found), show_differing(found)) == ("5 of 50 test inputs", "0 of 5")
    (line,) = state_changes([found], [replace(found, differing=2)])
    assert line.startswith("onnx dense on the device: 100.0 % → 100.0 % [56.6 %, 100.0 %]; ")
    assert line.endswith("0 of 5 → 2 of 5")
    assert list(state_changes([found], [replace(found, samples=4)])) == [], "another part of the test set"


def test_other_kernels_show_in_the_score_and_in_the_predictions(plan: RunPlan, tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "onnxruntime.py").write_text(OTHER_KERNELS.format(folder=str(modules)))
    (found,) = read_device_scores(examine(plan, tmp_path / "run", write_python(tmp_path, PYTHONPATH=modules)))
    wrong = int(((-SAMPLES @ WEIGHT).argmax(1) != (SAMPLES @ WEIGHT).argmax(1)).sum())
    assert wrong > 0
    assert (found.host.correct, found.device.correct, found.differing) == (5, 5 - wrong, wrong)


def test_outputs_are_scored_batch_by_batch_in_the_samples_order(plan: RunPlan) -> None:
    assert plan.exam is not None
    many = 700
    inputs = torch.from_numpy(np.resize(SAMPLES, (many, 4)))
    outputs = inputs @ torch.from_numpy(WEIGHT)
    exam = replace(plan.exam, inputs=(inputs,), labels=outputs.argmax(1))
    assert exam.score([outputs], "first").correct == many
    assert exam.score([outputs.roll(1, 0)], "shifted").correct != many


def test_a_function_of_the_users_own_sees_every_output_at_its_place(plan: RunPlan) -> None:
    assert plan.exam is not None
    outputs = torch.from_numpy(SAMPLES @ WEIGHT)
    seen: list[torch.Tensor] = []

    def judge(given: object, labels: torch.Tensor) -> float:
        assert isinstance(given, torch.Tensor)
        seen.extend((given, labels))
        return 1.0

    own = OwnScore(judge, ACCURACY, "hash")
    exam = replace(plan.exam, court=replace(plan.exam.court, own=own))
    assert exam.score([outputs], "device").value == 1
    assert torch.equal(seen[0], outputs)
    assert torch.equal(seen[1], exam.labels)


def test_the_exam_is_spread_over_the_whole_test_set(tmp_path: Path) -> None:
    prepared = make_stages(write_untrained_recipe(tmp_path, "a"), Store(tmp_path / "store")).prepared
    exam = set_exam(prepared, 5)
    assert exam.names == (), "no input of the model is a mask"
    assert (len(exam.labels), exam.of) == (5, len(prepared.data.labels))
    assert torch.equal(exam.labels, prepared.data.labels[[0, 8, 16, 23, 31]])
    assert torch.equal(exam.inputs[0], prepared.data.test_inputs[0][[0, 8, 16, 23, 31]])
    assert len(set_exam(prepared, 10_000).labels) == exam.of
    unlabelled = replace(prepared, data=replace(prepared.data, test_labels=None))
    with pytest.raises(InputError, match="cannot be scored on a device: its data have no labels"):
        set_exam(unlabelled, 5)


def test_an_exam_does_not_travel_and_has_at_least_one_sample(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not measured over a scheduler"):
        refuse_exam(Suite(recipe="r", accuracy=AccuracyChoice(samples=5)), "tls://rack:8786")
    refuse_exam(Suite(recipe="r"), "tls://rack:8786")
    path = tmp_path / "suite.toml"
    path.write_text('recipe = "r.toml"\n[accuracy]\nsamples = 0\n')
    with pytest.raises(InputError, match=r"accuracy.samples must be at least 1"):
        read_suite(path)
