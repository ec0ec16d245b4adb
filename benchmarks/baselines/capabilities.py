# ruff: noqa: INP001 - a script, no package
"""Tries every cell of what a format can do with rounded layers: operator x precision x activations, and writes a table.

    python benchmarks/baselines/capabilities.py [FORMAT …] > benchmarks/baselines/capabilities.json

Of each cell it says whether the file is built, holds the chosen integers and runs; its error beside the same net with
rounded weights and float32 activations (0: it computes in floats); its size and processor time beside float32, the
median and the 10th and 90th percentile of interleaved rounds on one thread.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from rankship_pipeline.export import executorch_bits, keep_stdout_clean, onnx_bits, onnx_read, tflite_bits
from rankship_pipeline.export.artifact import export_file
from rankship_pipeline.export.graph import trace_graph
from rankship_pipeline.export.rounded_weight import RoundedWeight, check_weights, store
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.quantise.grid import LARGEST

_ROUNDS, _CALLS, _BLOCK = 25, 4, 32


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(512, 64), nn.LayerNorm(64), nn.Linear(64, 512, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.norm(self.words(x))))


_TOKENS, _IMAGE = (
    torch.arange(32).reshape(1, 32),
    torch.randn(1, 32, 16, 16, generator=torch.Generator().manual_seed(0)),
)
_ROWS = torch.randn(1, 32, 256, generator=torch.Generator().manual_seed(1))
NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(256, 256)), _ROWS),
    "linear pair of 45": (lambda: nn.Sequential(nn.Linear(256, 45, bias=False), nn.Linear(45, 256)), _ROWS),
    "linear pair of 64": (lambda: nn.Sequential(nn.Linear(256, 64, bias=False), nn.Linear(64, 256)), _ROWS),
    "convolution 3x3": (lambda: nn.Sequential(nn.Conv2d(32, 32, 3, padding=1)), _IMAGE),
    "convolution 1x1": (lambda: nn.Sequential(nn.Conv2d(32, 64, 1)), _IMAGE),
    "spatial pair": (
        lambda: nn.Sequential(nn.Conv2d(32, 20, (3, 1), padding=(1, 0), bias=False), nn.Conv2d(20, 32, (1, 3))),
        _IMAGE,
    ),
    "tucker": (
        lambda: nn.Sequential(
            nn.Conv2d(32, 12, 1, bias=False), nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.Conv2d(12, 32, 1)
        ),
        _IMAGE,
    ),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32)), _IMAGE),
    "embedding": (lambda: nn.Sequential(nn.Embedding(512, 64)), _TOKENS),
    "tied head": (_Tied, _TOKENS),
}
CELLS: tuple[tuple[Precision, str], ...] = (
    ("int8", "static"),
    ("int8", "dynamic"),
    ("int8", "float32"),
    ("int4", "dynamic"),
    ("int4", "float32"),
)
Run = Callable[[], Any]


def round_net(net: nn.Module, precision: Precision) -> tuple[RoundedWeight, ...]:
    """Round every weight: 4 bits in blocks of 32 where the width allows, else by row."""
    found = []
    for name, layer in net.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding):
            continue
        weight, limit = layer.weight.detach(), LARGEST[precision]
        rows, columns = len(weight), weight[0].numel()
        small = precision == "int4" and columns % _BLOCK == 0 and not isinstance(layer, nn.Conv2d)
        blocks = weight.reshape(rows, -1, _BLOCK if small else columns)
        scales = (blocks.abs().amax(-1, keepdim=True) / limit).bfloat16().float()
        integers = (blocks / scales).round().clamp(-limit, limit)
        largest = blocks.abs().argmax(-1, keepdim=True)
        integers.scatter_(-1, largest, blocks.gather(-1, largest).sign() * limit)
        layer.weight.data.copy_((integers * scales).reshape(weight.shape))
        found.append(store(name, precision, integers.to(torch.int8), scales[..., 0]))
    return tuple(found)


def build(
    format_name: Format, net: nn.Module, given: Tensor, weights: tuple[RoundedWeight, ...], how: str, path: Path
) -> None:
    """Write the file of one cell; whatever the toolchain raises says that there is none."""
    if how == "static":
        build_static(format_name, net, given, path)
    elif format_name == "executorch":
        changed = executorch_bits.quantise_module(net, weights)
        for layer in changed.modules():
            if isinstance(layer, nn.Linear) and how == "float32":
                layer.weight.activation_quantization = None  # type: ignore[attr-defined]
        export_file(trace_graph(changed, (given,)), format_name, path)
    else:
        plain = path.with_suffix(".plain")
        traced = tflite_bits.mark_inputs(net, weights) if format_name == "tflite" else net
        export_file(trace_graph(traced, (given,)), format_name, plain)
        write = onnx_bits.quantise_file if format_name == "onnx" else tflite_bits.quantise_file
        if write(plain, path, weights, how) != weights:  # type: ignore[arg-type]
            message = "not every weight is in the file"
            raise ValueError(message)


def build_static(format_name: Format, net: nn.Module, given: Tensor, path: Path) -> None:
    """Calibrate with the input itself, and convert; TFLite's converter takes another graph, and is not tried here."""
    if format_name == "tflite":
        message = "not tried"
        raise NotImplementedError(message)
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = xnnpack_quantizer.XNNPACKQuantizer().set_global(
        xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True)
    )
    prepared = prepare_pt2e(trace_graph(net, (given,)).module(check_guards=False), quantizer)
    prepared(given)
    export_file(torch.export.export(convert_pt2e(prepared), (given,)), format_name, path)


def load(format_name: Format, path: Path, given: Tensor) -> Run:
    """A call that runs the file once on one thread and gives its output."""
    if format_name == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options)
        feed = {session.get_inputs()[0].name: given.numpy()}
        return lambda: session.run(None, feed)[0]
    if format_name == "tflite":
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(str(path), num_threads=1)
        interpreter.allocate_tensors()
        (spec,), (out,) = interpreter.get_input_details(), interpreter.get_output_details()
        interpreter.set_tensor(spec["index"], given.numpy().astype(spec["dtype"]))

        def run() -> Any:  # noqa: ANN401 - an array
            interpreter.invoke()
            return interpreter.get_tensor(out["index"])

        return run
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(1)  # noqa: SLF001 - the only way
    method = Runtime.get().load_program(path).load_method("forward")
    return lambda: method.execute([given])[0].numpy()  # noqa: PLW0108 - a call runs it


def try_cell(format_name: Format, operator: str, precision: Precision, how: str) -> dict[str, Any]:
    """Try one cell."""
    torch.manual_seed(0)
    make, given = NETS[operator]
    net = make().eval()
    weights = round_net(net, precision)
    row: dict[str, Any] = {"format": format_name, "operator": operator, "precision": precision, "activations": how}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        plain, path = Path(folder) / "float32", Path(folder) / "rounded"
        try:
            with keep_stdout_clean():
                export_file(trace_graph(net, (given,)), format_name, plain)
                build(format_name, net, given, weights, how, path)
                runs = load(format_name, plain, given), load(format_name, path, given)
        except Exception as failure:  # noqa: BLE001 - a toolchain's failure is a cell's content
            return row | {"builds": False, "why": f"{type(failure).__name__}: {str(failure).splitlines()[0][:160]}"}
        readers = {"onnx": onnx_read, "tflite": tflite_bits, "executorch": executorch_bits}
        try:
            check_weights(weights, readers[format_name].read_weights(path), where="cell")
            exact: bool | str = True
        except Exception as failure:  # noqa: BLE001 - as above
            exact = str(failure).splitlines()[1 if "\n" in str(failure) else 0][:160]
        wanted = net(given).numpy()
        try:
            error = float(np.abs(runs[1]() - wanted).max() / np.abs(wanted).max())
        except Exception as failure:  # noqa: BLE001 - as above
            return row | {"builds": True, "runs": False, "why": str(failure)[:160]}
        ratios = time_both(*runs)
        return row | {
            "builds": True,
            "runs": True,
            "chosen_integers": exact,
            "error": float(f"{error:.2g}"),
            "size_ratio": round(path.stat().st_size / plain.stat().st_size, 3),
            "time_ratio": [round(float(np.percentile(ratios, share)), 3) for share in (50, 10, 90)],
        }


def time_both(plain: Run, rounded: Run) -> list[float]:
    """The ratio of processor times in each round of both."""
    ratios = []
    for _ in range(_ROUNDS):
        spent = []
        for run in (plain, rounded):
            start = time.process_time_ns()
            for _ in range(_CALLS):
                run()
            spent.append(time.process_time_ns() - start)
        ratios.append(spent[1] / max(spent[0], 1))
    return ratios


def main() -> None:
    """Try all cells of the formats that are named, or of all."""
    rows = []
    for format_name in (one for one in get_args(Format) if one in (sys.argv[1:] or get_args(Format))):
        for operator in NETS:
            for precision, how in CELLS:
                rows.append(try_cell(format_name, operator, precision, how))
                sys.stderr.write(json.dumps(rows[-1]) + "\n")
    json.dump(rows, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
