"""What LiteRT's benchmark_model prints, in the forms that its releases and platforms give it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankship_pipeline.foundation.errors import CommandFailed, Lacks, UnlikeConditions
from rankship_targets.kit.benchmark_model import parse_output, run_benchmark
from rankship_targets.transport.fake import FakeTransport
from rankship_targets.transport.protocol import Completed
from rankship_targets.verbs.kit import kit

# The program's own wording, as its sources write it and published logs show it; the figures are made up.
GPU = """\
INFO: STARTING!
INFO: Log parameter values verbosely: [0]
INFO: Graph: [/data/local/tmp/model.tflite]
INFO: Use gpu: [1]
INFO: Loaded model /data/local/tmp/model.tflite
INFO: Created TensorFlow Lite delegate for GPU.
VERBOSE: Replacing 58 out of 58 node(s) with delegate (TfLiteGpuDelegateV2) node, yielding 1 partitions.
INFO: Initialized OpenCL-based API.
INFO: Explicitly applied GPU delegate, and the model graph will be completely executed by the delegate.
INFO: The input model file size (MB): 4.27
INFO: Initialized session in 1361.24ms.
INFO: Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
INFO: count=5 first=125113 curr=112537 min=111758 max=125113 avg=115344 std=4959 p5=111758 median=112912 p95=125113

INFO: Running benchmark for at least 50 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
INFO: count=50 first=1249964 curr=1240143 min=1238588 max=1252566 avg=1.24027e+06 std=2565 p5=1238753 median=1239807 \
p95=1247415

INFO: Inference timings in us: Init: 1361240, First inference: 125113, Warmup (avg): 115344, \
Inference (avg): 1.24027e+06
INFO: Note: as the benchmark tool itself affects memory footprint, the following is only APPROXIMATE.
INFO: Memory footprint delta from the start of the tool (MB): init=6.36328 overall=109.832
"""
OLD = """\
STARTING!
Explicitly applied NNAPI delegate, and the model graph will be partially executed by the delegate w/ 3 delegate kernels.
Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
count=1 curr=3512391

Running benchmark for at least 50 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
count=50 first=2990275 curr=2913402 min=2727568 max=3189954 avg=2.95034e+06 std=109798

Inference timings in us: Init: 17187, First inference: 3512391, Warmup (avg): 3.51239e+06, Inference (avg): 2.95034e+06
"""
APPLIED = OLD.splitlines()[1]
NOT_APPLIED = "Though NNAPI delegate is explicitly applied, the model graph will not be executed by the delegate."
BY_THE_CPU = "Explicitly applied XNNPACK delegate, and the model graph will be completely executed by the delegate."
REFUSED = OLD.replace(APPLIED, f"{NOT_APPLIED}\n{BY_THE_CPU}")


def test_a_run_on_the_gpu_is_read_whole() -> None:
    found = parse_output(GPU.splitlines())
    assert (found.count, found.mean_ns, found.median_ns) == (50, 1_240_270_000, 1_239_807_000)
    assert (found.min_ns, found.max_ns, found.std_ns) == (1_238_588_000, 1_252_566_000, 2_565_000)
    assert (found.init_ns, found.first_ns) == (1_361_240_000, 125_113_000)
    assert found.delegated == {"GPU": "completely"}


def test_an_older_release_has_no_prefix_and_no_median() -> None:
    found = parse_output(OLD.splitlines())
    assert (found.count, found.mean_ns, found.median_ns) == (50, 2_950_340_000, None)
    assert found.delegated == {"NNAPI": "partially"}


def test_androids_own_log_prefix_is_no_obstacle() -> None:
    assert parse_output([f"I tflite  : {line}" for line in OLD.splitlines()]) == parse_output(OLD.splitlines())


def test_inferences_that_all_took_equally_long_have_no_deviation() -> None:
    same = OLD.replace("count=50 first=2990275 curr=2913402 min=2727568 max=3189954 avg=2.95034e+06 std=109798", "{}")
    found = parse_output(same.format("count=50 curr=17(all same)").splitlines())
    assert (found.count, found.mean_ns, found.min_ns, found.max_ns, found.std_ns) == (50, 17_000, 17_000, 17_000, None)


@pytest.mark.parametrize("cut", ["Running benchmark for at least 50", "Inference timings"])
def test_a_run_that_was_cut_off_is_an_error_and_no_number(cut: str) -> None:
    with pytest.raises(CommandFailed, match="without its summary"):
        parse_output(OLD[: OLD.index(cut)].splitlines())


@given(st.lists(st.one_of(st.text(), st.sampled_from([*GPU.splitlines(), *OLD.splitlines(), "count=0", "count=3"]))))
def test_any_text_is_a_summary_or_one_error(lines: list[str]) -> None:
    try:
        found = parse_output(lines)
    except CommandFailed:
        return
    assert found.count > 0
    assert found.mean_ns in {1_240_270_000, 2_950_340_000, 115_344_000, 3_512_391_000}


def answer(code: int, stdout: str = "", stderr: str = "") -> FakeTransport:
    return FakeTransport({"/d/benchmark_model": lambda _, __: Completed(code=code, stdout=stdout, stderr=stderr)})


def test_the_program_gets_the_delegate_and_speaks_on_either_stream() -> None:
    device = answer(0, stderr=GPU)
    run_benchmark(device, "/d/benchmark_model", "/d/m.tflite", "gpu", threads=2, runs=50, timeout_s=9)
    (call,) = device.calls
    assert call == ("/d/benchmark_model", "--graph=/d/m.tflite", "--num_threads=2", "--num_runs=50", "--use_gpu=true")


def test_an_absent_program_and_a_failing_one_are_told_apart() -> None:
    with pytest.raises(Lacks, match="cannot be started"):
        run_benchmark(FakeTransport(), "/d/none", "/d/m.tflite", "cpu", threads=1, runs=1, timeout_s=9)
    with pytest.raises(CommandFailed, match="status 1: failed to load"):
        run_benchmark(answer(1, "failed to load"), "/d/benchmark_model", "m", "cpu", threads=1, runs=1, timeout_s=9)


@pytest.mark.parametrize(("said", "refused"), [(OLD, False), (REFUSED, True)])
def test_times_of_a_delegate_that_ran_nothing_are_not_passed_for_its_own(
    said: str,
    refused: bool,  # noqa: FBT001 - a parameter of the test
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program = tmp_path / "benchmark_model"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{said}END\n")
    program.chmod(0o755)
    argv = ["benchmark", "this-machine", "--binary", str(program), "--model", "m.tflite", "--delegate", "nnapi"]
    if refused:
        with pytest.raises(UnlikeConditions, match="nothing shows that the nnapi delegate ran"):
            kit(argv)
    else:
        assert kit(argv) == 0
    printed = capsys.readouterr().out
    assert "50 inferences: mean 2,950.34 ms" in printed
    assert "no samples" in printed
