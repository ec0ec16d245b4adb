"""Delegates in the runtimes of this machine: what each takes of a file, that results stay, and how it is all kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from make.artifacts import make_artifact
from make.builds import make_build
from make.devices import make_local
from rankship_benchmarks.bundle.bundle import open_bundle
from rankship_benchmarks.bundle.suite import DelegateChoice, Suite
from rankship_benchmarks.judge.summary import summarise
from rankship_benchmarks.measure.one_device import measure_build
from rankship_benchmarks.measure.run_plan import RunPlan
from rankship_benchmarks.report.delegate_words import NONE, list_delegated
from rankship_benchmarks.report.page import render_report
from rankship_pipeline.export.artifact import export_file
from rankship_pipeline.export.delegation import count_delegated, runs_vulkan
from rankship_pipeline.export.graph import trace_graph
from rankship_pipeline.export.parity import verify_artifact
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.records import TensorSpec
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.export_choices import ParityChoice
from rankship_targets.agent import taken
from rankship_targets.agent.runtimes import load_artifact, open_runtime
from rankship_targets.session.manifest import sign_artifact
from rankship_targets.session.runner import HostRunner

SAMPLES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers that XNNPACK takes, and at the end a sum that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(1, 4, 3), nn.Linear(144, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(self.linear(torch.relu(self.convolution(x)).flatten(1)), 1)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def files(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, graph = tmp_path_factory.mktemp("files"), trace_graph(net, (SAMPLES[:1],))
    paths = {name: folder / name for name in ("xnnpack.pte", "plain.pte", "vulkan.pte", "model.tflite")}
    export_file(graph, "tflite", paths["model.tflite"])
    export_file(graph, "executorch", paths["xnnpack.pte"])
    export_file(graph, "executorch", paths["plain.pte"], delegate="plain")
    export_file(graph, "executorch", paths["vulkan.pte"], delegate="vulkan")
    return paths


def ask(path: Path, **more: object) -> dict[str, Any]:
    return {"format": "tflite", "artifact": str(path), "inputs": [], "threads": 1, **more}


def run(format_: str, path: Path, delegate: str | None = None) -> Any:  # noqa: ANN401 - numpy's arrays
    model = load_artifact(open_runtime(format_, delegate)[0], ask(path))
    return np.array(model.unpack(model.infer(model.prepare([SAMPLES[:1].numpy()])))[0])


def test_litert_is_asked_for_xnnpack_or_for_its_own_kernels_and_says_what_was_taken(
    net: nn.Module, files: dict[str, Path]
) -> None:
    usual, _ = taken.inspect(ask(files["model.tflite"]))
    plain, _ = taken.inspect(ask(files["model.tflite"], delegate="plain"))
    assert usual == {"event": "taken", "partitions": 1, "operators": usual["operators"], "left": {"CUMSUM": 1}}
    assert (plain["partitions"], plain["operators"]) == (0, 0)
    assert sum(plain["left"].values()) == usual["operators"] + 1
    expected = net(SAMPLES[:1]).detach().numpy()
    for delegate in (None, "plain"):
        np.testing.assert_allclose(run("tflite", files["model.tflite"], delegate), expected, rtol=1e-4, atol=1e-5)


def test_executorchs_files_say_themselves_what_they_were_lowered_to(net: nn.Module, files: dict[str, Path]) -> None:
    partitions, operators, left = count_delegated(files["xnnpack.pte"])
    assert (partitions, left) == (1, {"aten::cumsum": 1})
    assert operators is not None
    assert operators >= 2
    partitions, operators, left = count_delegated(files["plain.pte"])
    assert (partitions, operators) == (0, 0)
    assert {"aten::convolution", "aten::addmm", "aten::cumsum"} <= set(left)
    assert "aten::permute_copy" not in left, "a constant weight is turned when the file is made"
    expected = net(SAMPLES[:1]).detach().numpy()
    for name in ("xnnpack.pte", "plain.pte"):
        np.testing.assert_allclose(run("executorch", files[name]), expected, rtol=1e-4, atol=1e-5)


def test_a_file_for_vulkan_is_made_here_and_only_run_where_its_backend_is(files: dict[str, Path]) -> None:
    assert count_delegated(files["vulkan.pte"]) == (1, None, {"aten::cumsum": 1})
    event, _ = taken.list_delegates({"format": "executorch"})
    assert {"cpu", "plain"} <= set(event["known"])
    assert ("vulkan" in event["known"]) == runs_vulkan()


def test_a_run_times_every_delegate_proves_it_first_and_tells_what_it_took(
    net: nn.Module, files: dict[str, Path], tmp_path: Path
) -> None:
    def make(folder: Path) -> None:
        (folder / "model.tflite").write_bytes(files["model.tflite"].read_bytes())
        np.save(folder / "input.0.npy", SAMPLES.numpy())
        np.save(folder / "expected.0.npy", net(SAMPLES).detach().numpy())

    store = Store(tmp_path / "store")
    entry = store.produce("artifact", {}, make)
    path = entry.folder / "model.tflite"
    artifact = make_artifact(
        ArtifactKey(variant="dense", format="tflite"),
        file=str(path.relative_to(store.root)),
        size_bytes=path.stat().st_size,
        sha256=hash_file(path),
        inputs=(TensorSpec(name="input.0", shape=(1, 1, 8, 8), dtype="float32"),),
        outputs=(TensorSpec(name="logits", shape=(1, 6), dtype="float32"),),
    )
    limits = ParityChoice(samples=3)
    inputs, expected = [entry.folder / "input.0.npy"], [entry.folder / "expected.0.npy"]
    proof = verify_artifact(artifact, path, inputs, expected, HostRunner(), limits)
    sign_artifact(path, proof, "r")
    suite = Suite(
        recipe="r", rounds=1, min_samples=3, min_duration_ms=1, max_warmup_ms=50,
        delegates=DelegateChoice(tflite=("xnnpack", "plain")),
    )  # fmt: skip
    plan = RunPlan(make_build(artifact), [proof], store, suite, tmp_path / "results", limits)
    bundle = open_bundle(measure_build(plan, make_local(tmp_path / "here", "this-machine"), Steps(quiet=True)))
    plain = replace(artifact.key, delegate="plain")
    assert {trial.key for trial in bundle.trials} == {artifact.key, plain}
    assert {trial.runtime.process for trial in bundle.trials} == {"python"}
    assert all(len(trial.runtime.binary_sha256 or "") == 64 for trial in bundle.trials)
    assert [one.key for one in bundle.header.verified_on_device] == [plain], "the host's gate has proven the other"
    summary = summarise(bundle)
    assert [one.key for one in summary.results] == [artifact.key, plain]
    assert [one.parity.key for one in summary.results if one.parity] == [artifact.key, plain]
    first, second = list_delegated(summary.results)
    assert (first.title, first.left, first.alarming) == ("XNNPACK", "1 CUMSUM", False)
    assert (second.title, second.taken, second.alarming) == ("LiteRT's own kernels", NONE, False)
    page = render_report(bundle)
    assert "What delegates take" in page
    assert "dense, plain" in page
