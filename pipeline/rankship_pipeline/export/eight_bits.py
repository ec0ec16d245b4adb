"""Makes graphs that compute in 8 bits, by torch's quantisation of exported graphs (PT2E).

Every format is exported from the one graph, in which weights and activations are quantised and dequantised again: run
in torch it computes what the runtimes compute, and files are proven against it. Weights are rounded before
(quantise/grid.py), and found on their grid here.
"""

import copy
import os
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from rankship_pipeline.evaluate.calibrate import BATCH, split
from rankship_pipeline.export.frozen_trace import trace_frozen
from rankship_pipeline.export.graph import trace_graph, trace_ranges
from rankship_pipeline.export.rounded_weight import RoundedWeight, store
from rankship_pipeline.foundation.errors import InputError, UnsupportedOp
from rankship_pipeline.foundation.records import Dimension
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.recipe.export_choices import BATCH_AXIS

if TYPE_CHECKING:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer

_SMALLEST = 2.0**-60  # the least scale: torch's own, 2^-12, rounds rows of small weights to zero
_QUANTISE = ("quantize_per_tensor", "quantize_per_channel")


class EightBits(nn.Module):
    """A model that computes in 8 bits: a quantised graph, run on `rows` samples at once, on any number where None.

    `names` are those of its outputs; () stands for one bare tensor.
    """

    def __init__(self, body: GraphModule, rows: int | None, names: Sequence[str]) -> None:
        super().__init__()
        self.body, self.rows, self.names = body, rows, tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor | dict[str, Tensor]:
        """Compute samples, a multiple of `rows`."""
        count = len(inputs[0])
        if self.rows is None or self.rows == count:
            return self._name(self._run(inputs))
        parts = [self._run(tuple(one[at : at + self.rows] for one in inputs)) for at in range(0, count, self.rows)]
        return self._name([torch.cat(some) for some in zip(*parts, strict=True)])

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        given = self.body(*inputs)
        return [given] if isinstance(given, Tensor) else list(given)

    def _name(self, tensors: list[Tensor]) -> Tensor | dict[str, Tensor]:
        return dict(zip(self.names, tensors, strict=True)) if self.names else tensors[0]


def make_eight_bits(
    module: nn.Module, samples: Inputs, *, outputs: Sequence[str] = (), kept: Collection[str] = ()
) -> EightBits:
    """The module computing in 8 bits, with ranges of activations from unlabelled `samples`.

    Ranges are chosen from histograms by the error of rounding and clipping together. Batch normalisation is folded into
    the convolution before it. Modules named in `kept` compute in float32. InputError says what is not installed.
    """
    with warnings.catch_warnings(action="ignore"):
        return _make(module, samples, outputs, kept)


def _make(module: nn.Module, samples: Inputs, outputs: Sequence[str], kept: Collection[str]) -> EightBits:
    prepare, convert, quantizer = _load_toolchain()
    quantizer.set_global(_configure()).set_filter_function(_leave_out(kept))
    graph, rows = _trace(module, samples, outputs)
    prepared = prepare(graph.module(check_guards=False), quantizer)
    with torch.inference_mode():
        for batch in split(samples, rows or BATCH):
            prepared(*(one.clone() for one in batch))
    return EightBits(convert(prepared, fold_quantize=False), rows, outputs)


def _trace(module: nn.Module, samples: Inputs, outputs: Sequence[str]) -> tuple[ExportedProgram, int | None]:
    """The module's graph, of any number of samples (None) where its code lets that vary, else of one."""
    batch = Dimension(name=BATCH_AXIS, low=1, high=BATCH)
    try:
        return trace_ranges(module, samples, ({0: batch},) * len(samples), outputs), None
    except UnsupportedOp:
        return trace_graph(module, tuple(one[:1] for one in samples), outputs), 1


def _load_toolchain() -> tuple[Callable[..., Any], Callable[..., Any], "XNNPACKQuantizer"]:
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")  # it complains of kernels for other processors
    try:
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    except ImportError as failure:
        raise InputError(
            f"cannot make a graph of 8 bits: {failure}",
            hint="pip install 'rankship[executorch]' (its quantiser serves all formats), or leave int8 out",
        ) from failure
    return prepare_pt2e, convert_pt2e, XNNPACKQuantizer()


def _configure() -> Any:  # noqa: ANN401 - ExecuTorch's record
    """8 bits: activations per tensor from histograms, weights symmetric per output channel."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer_utils import QuantizationConfig
    from torchao.quantization.pt2e.observer import HistogramObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationSpec

    activations = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=HistogramObserver.with_args(eps=_SMALLEST),
    )
    weights = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=_SMALLEST),
    )
    return QuantizationConfig(activations, activations, weights, None)


def _leave_out(kept: Collection[str]) -> Callable[[Node], bool]:
    """Whether a node may be quantised: it does not belong to a module of these names."""

    def is_taken(node: Node) -> bool:
        names = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
        return not any(name == one or name.startswith(f"{one}.") for name in names for one in kept)

    return is_taken


def separate(model: EightBits) -> list[EightBits]:
    """Each named output of a graph of 8 bits as a graph of its own, with all that it is computed from."""
    return [EightBits(_keep_output(model.body, place), model.rows, ()) for place in range(len(model.names))]


def _keep_output(body: GraphModule, place: int) -> GraphModule:
    kept = copy.deepcopy(body)
    (output,) = kept.graph.find_nodes(op="output")
    output.args = (output.args[0][place],)
    kept.graph.set_codegen(CodeGen())  # the graph's own expects all outputs
    kept.graph.eliminate_dead_code()
    kept.recompile()
    _drop_unread(kept)
    return kept


def _drop_unread(module: GraphModule) -> None:
    """Remove the parameters and buffers that the graph does not read."""
    read = {node.target for node in module.graph.find_nodes(op="get_attr")}
    tensors = (*module.named_parameters(), *module.named_buffers())
    for name in [one for one, _ in tensors if one not in read]:
        owner, _, own = name.rpartition(".")
        delattr(module.get_submodule(owner), own)


def has_bits(graph: ExportedProgram) -> bool:
    """Whether a graph quantises anything."""
    return any(_is_quantising(node) for node in graph.graph.nodes)


def _is_quantising(node: Node) -> bool:
    return node.op == "call_function" and _name_operator(node).split(".")[0] in _QUANTISE


def _name_operator(node: Node) -> str:
    """The name of the operator that a node calls."""
    return str(getattr(node.target, "__name__", ""))


def list_weights(graph: ExportedProgram) -> tuple[RoundedWeight, ...]:
    """The integers and scales of every weight that a graph of 8 bits quantises."""
    signature = graph.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors = {**graph.constants, **graph.state_dict}
    found = []
    for node in graph.graph.nodes:
        if _is_quantising(node) and _name_operator(node).startswith(_QUANTISE[1]):
            given = [tensors[names[one.name]] if isinstance(one, Node) else one for one in node.args]
            integers, (_, scales, _, axis, *_) = node.target(*given), given
            found.append(store(names[node.args[0].name], "int8", integers.movedim(axis, 0), scales))
    return tuple(found)


def fold_weights(graph: ExportedProgram) -> ExportedProgram:
    """The graph with its quantised weights stored as integers; itself if it quantises nothing."""
    if not has_bits(graph):
        return graph
    from torchao.quantization.pt2e.constant_fold import constant_fold

    module = graph.module(check_guards=False)
    constant_fold(module, _is_quantising)
    _drop_unread(module)
    (example, _) = cast("tuple[tuple[Tensor, ...], object]", graph.example_inputs)
    return trace_frozen(module, example)
