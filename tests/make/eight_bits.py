"""A small net that computes in 8 bits, its graph, and faults that a toolchain could make in it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rankship_pipeline.export.eight_bits import EightBits, fold_weights, make_eight_bits
from rankship_pipeline.export.graph import trace_graph

ZERO_POINT = "a zero point dropped"
Arrays = dict[str, Tensor]  # a quantised layer's "integers" (rows, …) and "scales" (rows,)


class Net(nn.Module):
    """A convolution with batch-norm, a factored one around which a sum goes, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8))
        self.pair = nn.Sequential(nn.Conv2d(8, 5, 3, 1, 1, bias=False), nn.Conv2d(5, 8, 1))
        self.square = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        y = torch.relu(y + self.pair(y))
        return cast("Tensor", self.head(torch.relu(self.square(y.mean((2, 3))))))


def make_net(seed: int = 0) -> tuple[Net, Tensor]:
    """The net, its batch-norm settled, and samples (32, 3, 8, 8)."""
    torch.manual_seed(seed)
    net, x = Net(), torch.randn(32, 3, 8, 8)
    for layer in (net.first[0], *net.pair, net.square, net.head):
        layer.weight.data *= torch.logspace(-1, 0.5, len(layer.weight)).reshape(-1, *[1] * (layer.weight.ndim - 1))
    with torch.no_grad():
        for _ in range(20):
            net.train()(x)
    return net.eval(), x


def make_rounded(seed: int = 0) -> tuple[EightBits, ExportedProgram, Tensor]:
    """The net in 8 bits, its graph of one sample, and the samples."""
    net, x = make_net(seed)
    module = make_eight_bits(net, (x,))
    return module, trace_graph(module, (x[:1],)), x


def double_scale(one: Arrays, _other: Arrays) -> Arrays:
    """One output's scale is wrong."""
    scales = one["scales"].clone()
    scales[scales.argmax()] *= 2
    return {**one, "scales": scales}


def share_scale(one: Arrays, _other: Arrays) -> Arrays:
    """The scales of all outputs are taken for one."""
    return {**one, "scales": one["scales"].mean().expand_as(one["scales"]).clone()}


def swap_axes(one: Arrays, _other: Arrays) -> Arrays:
    """A square weight is transposed; other weights stay."""
    integers = one["integers"]
    return {**one, "integers": integers.T.contiguous()} if integers.shape[0] == integers.shape[-1] else one


def keep_old(one: Arrays, other: Arrays) -> Arrays:
    """The integers are those of another net."""
    return {**one, "integers": other["integers"]}


FAULTS: dict[str, Callable[[Arrays, Arrays], Arrays]] = {
    "a wrong scale": double_scale,
    "per tensor for per channel": share_scale,
    "swapped axes": swap_axes,
    "stale integers": keep_old,
}


def spoil(graph: ExportedProgram, other: ExportedProgram, fault: str) -> ExportedProgram:
    """The graph with folded weights, of which those of the square layer have a fault; `other` is another net's."""
    spoilable, stranger = fold_weights(graph), fold_weights(other)
    (mine, theirs), state, old = map(_list_weights, (spoilable, stranger)), spoilable.state_dict, stranger.state_dict
    at = next(place for place, (name, _) in enumerate(mine) if tuple(state[name].shape) == (8, 8))
    (integers, scales), (stale, _) = mine[at], theirs[at]
    spoilt = FAULTS[fault]({"integers": state[integers], "scales": state[scales]}, {"integers": old[stale]})
    state[integers], state[scales] = spoilt["integers"], spoilt["scales"]
    return spoilable


def drop_zero_point(graph: ExportedProgram) -> ExportedProgram:
    """The graph with folded weights, in which the zero point of the outputs is zero."""
    folded = fold_weights(graph)
    for node in [one for one in folded.graph.nodes if "quantize_per_tensor" in str(one.target)][-2:]:
        node.args = (*node.args[:2], 0, *node.args[3:])
    folded.graph_module.recompile()
    return folded


def spoil_tflite(path: Path, other: Path, fault: str) -> None:
    """Spoil the square layer of a finished TFLite file in place; `other` is another net's file."""
    from ai_edge_litert.tools import flatbuffer_utils

    mine, theirs = (flatbuffer_utils.read_model(str(one)) for one in (path, other))
    if fault == ZERO_POINT:
        (graph,) = mine.subgraphs
        moved = [
            one for one in graph.tensors if one.quantization is not None and one.quantization.zeroPoint is not None
        ]
        next(one for one in reversed(moved) if one.quantization.zeroPoint.any()).quantization.zeroPoint[:] = 0
    else:
        (own, buffer), (_, old) = (_find_square(one) for one in (mine, theirs))
        integers, stale = (
            torch.frombuffer(bytearray(one.data), dtype=torch.int8).reshape(8, 8) for one in (buffer, old)
        )
        arrays = {"integers": integers, "scales": torch.tensor(own.quantization.scale)}
        spoilt = FAULTS[fault](arrays, {"integers": stale})
        own.quantization.scale = spoilt["scales"].numpy()
        buffer.data = spoilt["integers"].numpy().view("uint8").flatten()
    flatbuffer_utils.write_model(mine, str(path))


def _find_square(model: Any) -> tuple[Any, Any]:  # noqa: ANN401 - the schema's own records
    (graph,) = model.subgraphs
    for one in graph.tensors:
        if list(one.shape) == [8, 8] and one.quantization is not None and len(one.quantization.scale) == 8:
            return one, model.buffers[one.buffer]
    raise AssertionError("no weight of 8x8")


def _list_weights(folded: ExportedProgram) -> list[tuple[str, str]]:
    """The names of every quantised weight and of its scales in a folded graph."""
    own = {**folded.graph_signature.inputs_to_parameters, **folded.graph_signature.inputs_to_buffers}
    return [
        (own[node.args[0].name], own[node.args[1].name])
        for node in folded.graph.nodes
        if "dequantize_per_channel" in str(node.target)
    ]
