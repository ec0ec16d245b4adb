"""The toolchains that round a dense model by recipes of their own, to stand beside ours in a study.

Each writes one file. A package that is not installed is left out by name; those that no format needs are no
dependencies of Rankship. Every one has the same samples; what it may choose is left as its makers set it, but for
scales of weights by row.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rankship_pipeline.export.artifact import export_file
from rankship_pipeline.export.graph import trace_graph
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.recipe.precision import Computed


@dataclass(frozen=True)
class Given:
    """A dense model to round, and calibration samples for the ranges of its activations.

    `outputs` names what it returns, () one bare tensor. `activations` is how its layers are to compute.
    """

    module: nn.Module
    samples: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    activations: Computed

    @property
    def is_dynamic(self) -> bool:
        """Whether ranges are found as the file runs."""
        return self.activations == "dynamic"

    @property
    def example(self) -> tuple[Tensor, ...]:
        """One sample."""
        return tuple(one[:1] for one in self.samples)

    def list_singles(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield the samples one by one, as files of one sample take them."""
        for at in range(len(self.samples[0])):
            yield tuple(one[at : at + 1] for one in self.samples)

    def trace(self) -> ExportedProgram:
        """Trace the float32 graph."""
        return trace_graph(self.module, self.example, self.outputs)

    def write_float(self, format_: Format, path: Path) -> Path:
        """Write the float32 file, and return its path."""
        export_file(self.trace(), format_, path)
        return path


@dataclass(frozen=True)
class Toolchain:
    """A toolchain: its distribution and module, the format of its file, and what writes it."""

    distribution: str
    module: str
    format: Format
    write: Callable[[Given, Path], None]


def round_by_onnxruntime(given: Given, path: Path) -> None:
    """Round a file by onnxruntime.quantization, after its own preparation of the graph."""
    from onnxruntime.quantization import quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    plain = given.write_float("onnx", path.with_suffix(".plain.onnx"))
    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(plain), str(prepared))
    if given.is_dynamic:
        quantize_dynamic(prepared, path, per_channel=True)
    else:
        quantize_static(prepared, path, _Reader(_name_samples(given, plain)), per_channel=True)


def round_by_nncf(given: Given, path: Path) -> None:
    """Round an ONNX file by nncf.quantize, with ranges from samples; "dynamic" is its setting for transformers."""
    import nncf
    import onnx

    plain = given.write_float("onnx", path.with_suffix(".plain.onnx"))
    kind = nncf.ModelType.TRANSFORMER if given.is_dynamic else None
    samples = list(_name_samples(given, plain))
    rounded = nncf.quantize(onnx.load(plain), nncf.Dataset(samples), subset_size=len(samples), model_type=kind)
    onnx.save(rounded, path)


def round_by_neural_compressor(given: Given, path: Path) -> None:
    """Round a graph of PT2E by neural-compressor, with ranges from samples: its dynamic graphs have no ONNX.

    It writes no file, so that ours is exported from its graph.
    """
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import convert, get_default_static_config, prepare

    prepared = prepare(export(given.module, given.example), get_default_static_config())
    _run(prepared, given)
    export_file(trace_graph(convert(prepared), given.example), "onnx", path)


def round_by_aimet(given: Given, path: Path) -> None:
    """Round a module's layers by AIMET, batch normalisation folded before, with ranges from samples.

    Modules of a class that is not torch's own stay float32, as AIMET knows none of them.
    """
    import aimet_torch
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.nn import QuantizationMixin

    QuantizationMixin.ignore_unknown_modules()
    module = copy.deepcopy(given.module).eval()
    shapes = [tuple(one.shape) for one in given.example]
    fold_all_batch_norms(module, shapes[0] if len(shapes) == 1 else shapes, given.example)
    simulated = aimet_torch.QuantizationSimModel(module, given.example)
    simulated.compute_encodings(lambda model: _run(model, given))
    aimet_torch.onnx.export(simulated, given.example, str(path), prequantize_constants=True, dynamo=False)


def round_by_ai_edge(given: Given, path: Path) -> None:
    """Round a TFLite file by ai-edge-quantizer; its inputs and outputs are given back their float32."""
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import quantizer, recipe

    from rankship_pipeline.export.tflite_borders import restore_borders

    plain = given.write_float("tflite", path.with_suffix(".plain.tflite"))
    if given.is_dynamic:
        quantizer.Quantizer(str(plain), recipe.dynamic_wi8_afp32()).quantize().export_model(str(path), overwrite=True)
        return
    (signature, names), *_ = Interpreter(str(plain)).get_signature_list().items()
    samples = [
        {name: one.numpy() for name, one in zip(names["inputs"], batch, strict=True)} for batch in given.list_singles()
    ]
    work = quantizer.Quantizer(str(plain), recipe.static_wi8_ai8())
    work.quantize(work.calibrate({signature: samples})).export_model(str(path), overwrite=True)
    restore_borders(path)


def round_by_pt2e(given: Given, path: Path) -> None:
    """Round a graph by torchao's PT2E with ExecuTorch's quantiser for XNNPACK, as ExecuTorch's documents do."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    settings = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=given.is_dynamic)
    prepared = prepare_pt2e(given.trace().module(check_guards=False), XNNPACKQuantizer().set_global(settings))
    _run(prepared, given)
    export_file(trace_graph(convert_pt2e(prepared), given.example), "executorch", path)


TOOLCHAINS: dict[str, Toolchain] = {
    "onnxruntime": Toolchain("onnxruntime", "onnxruntime.quantization", "onnx", round_by_onnxruntime),
    "ai-edge-quantizer": Toolchain("ai-edge-quantizer", "ai_edge_quantizer", "tflite", round_by_ai_edge),
    "pt2e": Toolchain("torchao", "torchao.quantization", "executorch", round_by_pt2e),
    "nncf": Toolchain("nncf", "nncf", "onnx", round_by_nncf),
    "neural-compressor": Toolchain(
        "neural-compressor", "neural_compressor.torch.quantization", "onnx", round_by_neural_compressor
    ),
    "aimet": Toolchain("aimet-torch", "aimet_torch", "onnx", round_by_aimet),
}


@dataclass
class _Reader:
    """Samples as onnxruntime asks for them."""

    samples: Iterator[Mapping[str, Any]]

    def get_next(self) -> Mapping[str, Any] | None:
        """Give the next sample, None after the last."""
        return next(self.samples, None)


def _name_samples(given: Given, path: Path) -> Iterator[dict[str, Any]]:
    """Yield arrays by the names of an ONNX file's inputs."""
    import onnx

    names = [one.name for one in onnx.load(path).graph.input]
    for batch in given.list_singles():
        yield {name: one.numpy() for name, one in zip(names, batch, strict=True)}


@torch.inference_mode()
def _run(model: Callable[..., object], given: Given) -> None:
    for batch in given.list_singles():
        model(*(one.clone() for one in batch))
