"""The table of the formats that models are exported to; all code reads the facts of a format here.

A new format needs a name in `Format`, an entry in `FACTS`, an exporter module (see export/__init__.py) and a loader in
the agent (agent/runtimes.py). The agent runs alone on a device and keeps its own copy; a test compares the two.
"""

from dataclasses import dataclass
from typing import Literal

Format = Literal["onnx", "tflite", "executorch"]

_TWO_GIB = 2**31 - 2**24  # protobuf's and flatbuffers' 2 GiB, less what the graph itself takes

_LOAD_ONNX = """import onnxruntime

session = onnxruntime.InferenceSession({path!r}, providers=["CPUExecutionProvider"])
names = [one.name for one in session.get_inputs()]
outputs = session.run(None, dict(zip(names, inputs)))  # inputs: one float array each, batch size 1"""
_LOAD_TFLITE = """from ai_edge_litert.interpreter import Interpreter  # tflite_runtime.interpreter has the same

interpreter = Interpreter({path!r})
interpreter.allocate_tensors()
for spec, array in zip(interpreter.get_input_details(), inputs):
    interpreter.set_tensor(spec["index"], array)
interpreter.invoke()
outputs = [interpreter.get_tensor(spec["index"]) for spec in interpreter.get_output_details()]"""
_LOAD_EXECUTORCH = """// C++; link executorch, its extension_module, extension_tensor and the XNNPACK backend
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

executorch::extension::Module module({json_path});
auto input = executorch::extension::from_blob(data, {{1, /* the model's other dimensions */}});
auto outputs = module.forward(input);  // check outputs.ok()"""
_START_RUNNER = (
    "import os, subprocess; subprocess.run([os.environ['RANKSHIP_EXECUTORCH_RUNNER'], 'version'], check=True)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatFacts:
    """The facts of one format.

    `suffix` is the file name's ending, without a dot. `limit_bytes` is what a file's weights may take, None without a
    limit. On the host, `exporter` is the module that writes the format,
    `extra` the pip requirement that installs it, `exporter_import` the module whose presence proves that;
    `exporter_distributions` are those whose versions shape a file, `runtime_distribution` the one that runs it.
    On a device, `device_packages` are what its interpreter needs to run the format, and `device_note` is a remark on
    installing them. `kit_series` is the runtime's release series in a kit; with `kit_compiles` the kit holds a program
    compiled from it instead of a Python package. `kit_check` is Python code that fails if the kit's runtime does not
    run. `load_example` shows how an application loads a file, with {path!r} or {json_path} to fill in. `fill` is how
    the format's markers are filled in charts, as matplotlib names it; a marker's shape is that of a precision.
    `seconds_a_module` is about how many CPU seconds an export takes for each module without children, as measured of
    networks of 40 to 170 of them; it says only whether exports are worth processes of their own. `takes_ranges` says
    whether one file takes inputs of any length in a range; litert-torch 0.10 cannot convert even a linear layer of any
    batch size. `holds_delegate` says whether a file is made for the delegate that computes it; other runtimes are asked
    for theirs when they load a file.
    """

    suffix: str
    limit_bytes: int | None = None
    exporter: str
    extra: str
    exporter_import: str
    exporter_distributions: tuple[str, ...]
    runtime_distribution: str
    device_packages: tuple[str, ...]
    device_note: str = ""
    kit_series: str
    kit_compiles: bool = False
    kit_check: str
    load_example: str
    fill: str
    seconds_a_module: float
    takes_ranges: bool = True
    holds_delegate: bool = False

    @property
    def pip_packages(self) -> str:
        """The arguments of `pip install` on a device, with the note in brackets."""
        return " ".join(self.device_packages) + (f" ({self.device_note})" if self.device_note else "")


# In the order that tables and pages show.
FACTS: dict[Format, FormatFacts] = {
    "onnx": FormatFacts(
        suffix="onnx",
        limit_bytes=_TWO_GIB,
        exporter="rankship_pipeline.export.onnx",
        extra="rankship[onnx]",
        exporter_import="onnxscript",
        exporter_distributions=("onnx", "onnxscript"),
        runtime_distribution="onnxruntime",
        device_packages=("onnxruntime", "numpy"),
        kit_series="1.31",
        kit_check="import onnxruntime",
        load_example=_LOAD_ONNX,
        fill="full",
        seconds_a_module=0.02,
    ),
    "tflite": FormatFacts(
        suffix="tflite",
        limit_bytes=_TWO_GIB,
        exporter="rankship_pipeline.export.tflite",
        extra="rankship[tflite]",
        exporter_import="litert_torch",
        exporter_distributions=("litert-torch", "litert-converter"),
        runtime_distribution="ai-edge-litert",
        device_packages=("ai-edge-litert", "numpy"),
        kit_series="2.3",
        kit_check="import ai_edge_litert.interpreter",
        load_example=_LOAD_TFLITE,
        fill="left",
        seconds_a_module=0.11,
        takes_ranges=False,
    ),
    "executorch": FormatFacts(
        suffix="pte",
        exporter="rankship_pipeline.export.executorch",
        extra="rankship[executorch]",
        exporter_import="executorch",
        exporter_distributions=("executorch", "torchao"),
        runtime_distribution="executorch",
        device_packages=("executorch", "torch", "numpy"),
        device_note="torch from PyTorch's CPU index",
        kit_series="1.5",
        kit_compiles=True,
        kit_check=_START_RUNNER,
        load_example=_LOAD_EXECUTORCH,
        fill="none",
        seconds_a_module=0.11,
        holds_delegate=True,
    ),
}
FORMATS: tuple[Format, ...] = tuple(FACTS)
