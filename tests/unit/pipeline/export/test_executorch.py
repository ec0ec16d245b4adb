"""What XNNPACK's delegate would compute otherwise is spelt out before it sees the graph."""

from pathlib import Path

import torch
from torch import nn

from rankship_pipeline.export import executorch
from rankship_pipeline.export.graph import trace_graph


def test_an_approximate_gelu_stays_approximate(tmp_path: Path) -> None:
    from executorch.runtime import Runtime

    net, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(approximate="tanh")), torch.linspace(-4, 4, 16).reshape(2, 8)
    executorch.export_graph(trace_graph(net, (x,)), tmp_path / "net.pte")
    found = Runtime.get().load_program(tmp_path / "net.pte").load_method("forward").execute([x])[0]
    with torch.no_grad():
        assert (found - net(x)).abs().max() < 1e-6
        assert (nn.functional.gelu(net[0](x)) - net(x)).abs().max() > 1e-5


def test_an_exact_gelu_stays_one_operator() -> None:
    graph = trace_graph(nn.GELU(), (torch.ones(2, 8),))
    assert executorch.spell_gelu(graph) is graph
