"""One suite for every runner: same model, same samples, same answers, and the same errors."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from make.onnx_files import SAMPLES, WEIGHT, save_product
from make.token_files import GENERATION, PROMPT, TOKENS, compute_logits, save_decoder
from rankship_pipeline.export.runner import FakeRunner, Runner
from rankship_pipeline.foundation.errors import CommandFailed
from rankship_targets.devices.device import describe_this_machine
from rankship_targets.session.runner import DeviceRunner, HostRunner
from rankship_targets.session.session import open_session


@pytest.fixture(params=["fake", "host", "device"])
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    if request.param == "fake":
        yield FakeRunner(lambda x: x @ WEIGHT)
    elif request.param == "host":
        yield HostRunner()
    else:
        with open_session(describe_this_machine()) as session:
            yield DeviceRunner(session)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_product(tmp_path / "a model.onnx")


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    np.save(tmp_path / "samples.npy", SAMPLES)
    return tmp_path / "samples.npy"


def test_every_sample_is_run_and_stacked_in_order(runner: Runner, model: Path, samples: Path, tmp_path: Path) -> None:
    into = tmp_path / "into"
    into.mkdir()
    output = runner.run("onnx", model, [samples], into)
    (file,) = output.outputs
    np.testing.assert_allclose(np.load(file, allow_pickle=False), np.load(samples) @ WEIGHT, rtol=1e-5)
    assert Path(file).parent == into
    assert output.runtime
    assert output.runtime_version


def test_a_file_that_generates_gives_the_logits_from_the_prompts_last_place_on(runner: Runner, tmp_path: Path) -> None:
    decoder, wanted = save_decoder(tmp_path / "decoder.onnx"), compute_logits(TOKENS)[:, PROMPT - 1 :]
    if isinstance(runner, FakeRunner):
        runner = FakeRunner(lambda tokens: compute_logits(tokens)[:, PROMPT - 1 :])
    output = runner.run("onnx", decoder, [tmp_path / "x.npy"], tmp_path, 1, GENERATION)
    (file,) = output.outputs
    np.testing.assert_allclose(np.load(file, allow_pickle=False), wanted, rtol=1e-4, atol=1e-4)


def test_an_artifact_that_is_no_model_is_an_error(runner: Runner, samples: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"")
    with pytest.raises(CommandFailed) as caught:
        runner.run("onnx", broken, [samples], tmp_path)
    assert caught.value.hint
