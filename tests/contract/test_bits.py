"""One suite for the files of fewer bits of every format: they hold the chosen integers, and compute what torch says."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from make.rounded import Image, Text, round_net
from rankship_pipeline.export import executorch_bits, keep_stdout_clean, onnx_bits, onnx_read, tflite_bits
from rankship_pipeline.export.artifact import export_file, read_operators
from rankship_pipeline.export.dynamic import simulate_activations
from rankship_pipeline.export.graph import expect_operators, trace_graph
from rankship_pipeline.export.rounded_weight import RoundedWeight, check_weights
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.recipe.precision import Activations

Read = Callable[[Path], tuple[RoundedWeight, ...]]
READERS: dict[Format, Read] = {
    "onnx": onnx_read.read_weights,
    "tflite": tflite_bits.read_weights,
    "executorch": executorch_bits.read_weights,
}
FOUR = ("marks", "odd.0", "even.0", "even.1", "head")


@dataclass(frozen=True)
class Built:
    """A net, its file of fewer bits, what it chose, and inputs."""

    format_name: Format
    net: nn.Module
    path: Path
    chosen: tuple[RoundedWeight, ...]
    given: Tensor


def build(
    format_name: Format, net: nn.Module, given: Tensor, folder: Path, four: tuple[str, ...], activations: Activations
) -> Built:
    torch.manual_seed(0)
    chosen = round_net(net, four)
    plain, path = folder / "plain", folder / f"model.{format_name}"
    with keep_stdout_clean():
        if format_name == "executorch":
            changed = executorch_bits.quantise_module(net, chosen)
            export_file(trace_graph(changed, (given,)), format_name, path)
        else:
            traced = tflite_bits.mark_inputs(net, chosen) if format_name == "tflite" else net
            export_file(trace_graph(traced, (given,)), format_name, plain)
            write = onnx_bits.quantise_file if format_name == "onnx" else tflite_bits.quantise_file
            assert write(plain, path, chosen, activations) == chosen
    return Built(format_name, net, path, chosen, given)


@pytest.fixture(scope="module", params=get_args(Format))
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    given = torch.arange(24).reshape(1, 24) % 40
    return build(request.param, Text(), given, tmp_path_factory.mktemp("text"), FOUR, "dynamic")


def run(built: Built) -> NDArray[np.float32]:
    if built.format_name == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(built.path)
        outputs = session.run(None, {session.get_inputs()[0].name: built.given.numpy()})
        return np.asarray(outputs[0])
    if built.format_name == "tflite":
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(str(built.path))
        interpreter.allocate_tensors()
        (spec,) = interpreter.get_input_details()
        interpreter.set_tensor(spec["index"], built.given.numpy().astype(spec["dtype"]))
        interpreter.invoke()
        return np.asarray(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(built.path).load_method("forward")
    return np.asarray(method.execute([built.given])[0])


def compare(found: NDArray[np.float32], wanted: Tensor) -> float:
    """The median over rows: where a float lies between two integers, a last bit moves it, and its row with it."""
    errors = np.abs(found - wanted.numpy()).max(-1)
    return float(np.median(errors) / wanted.abs().max())


def test_a_file_holds_the_integers_and_scales_that_were_chosen(text: Built) -> None:
    check_weights(text.chosen, READERS[text.format_name](text.path), where=text.format_name)


def test_a_file_computes_what_the_simulation_says_and_not_what_floats_say(text: Built) -> None:
    simulated = simulate_activations(text.net, text.chosen, text.format_name)
    with torch.no_grad():
        wanted, floats, found = simulated(text.given), text.net(text.given), run(text)
    assert compare(found, wanted) < 2e-5
    assert compare(found, floats) > 1e-3


def test_a_file_is_small(text: Built) -> None:
    """ONNX holds the table of a tied head once."""
    floats = sum(one.numel() for one in text.net.parameters()) * 4
    assert text.path.stat().st_size < {"onnx": 0.45, "tflite": 0.5, "executorch": 0.5}[text.format_name] * floats


def test_its_operators_are_found(text: Built) -> None:
    assert list_missing(text) == Counter()


def list_missing(built: Built) -> Counter[tuple[int, int]]:
    expected = expect_operators(trace_graph(built.net, (built.given,))).needed
    found = read_operators(built.format_name, built.path)
    wanted, present = (Counter((one.rows, one.columns) for one in side) for side in (expected, found))
    return wanted - present


def test_torchao_computes_what_the_simulation_says() -> None:
    net = Text()
    chosen = round_net(net, FOUR)
    given = torch.arange(24).reshape(1, 24) % 40
    with torch.no_grad():
        wanted = simulate_activations(net, chosen, "executorch")(given)
        found = executorch_bits.quantise_module(net, chosen)(given)
    assert compare(found.numpy(), wanted) < 2e-5


@pytest.mark.parametrize("format_name", ["onnx", "tflite"])
def test_weights_alone_change_nothing(format_name: Format, tmp_path: Path) -> None:
    given = torch.linspace(-1, 1, 3 * 12 * 12).reshape(1, 3, 12, 12)
    built = build(format_name, Image(), given, tmp_path, (), "float32")
    check_weights(built.chosen, READERS[format_name](built.path), where=format_name)
    assert list_missing(built) == Counter()
    with torch.no_grad():
        assert compare(run(built), built.net(given)) < 2e-6
