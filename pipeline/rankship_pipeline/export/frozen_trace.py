"""Traces a model with its parameters frozen."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rankship_pipeline.export.collector import pause_collector


def trace_frozen(
    module: nn.Module,
    example: tuple[Tensor, ...],
    shapes: dict[str, Any] | None = None,
    named: dict[str, Tensor] | None = None,
) -> ExportedProgram:
    """The graph of torch.export, none of whose parameters wants a gradient; the module stays as it is.

    `shapes` are the dynamic shapes of torch.export, by input; `named` are inputs that are given by name.

    Where the mask of attention is learned, as in T5, torch picks another kernel for a graph with gradients than for one
    without, and the orders of the two outputs in memory differ: a graph traced with gradients then fails in the
    converters, which go through it without.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad = False
    try:
        with pause_collector():
            graph = torch.export.export(module, example, named, dynamic_shapes=shapes)
    finally:
        for parameter in trained:
            parameter.requires_grad = True
    for name, tensor in graph.state_dict.items():
        if isinstance(tensor, nn.Parameter):
            graph.state_dict[name] = nn.Parameter(tensor.detach(), requires_grad=False)
    return graph
