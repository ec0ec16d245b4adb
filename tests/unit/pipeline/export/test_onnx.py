from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from rankship_pipeline.export.graph import trace_graph
from rankship_pipeline.export.onnx import export_graph, lift_attention

Attend = Callable[[Tensor], Tensor]
ATTENTIONS: dict[str, Attend] = {
    "three": lambda x: scaled_dot_product_attention(x, x, x),
    "two": lambda x: scaled_dot_product_attention(x[0], x[0], x[0]),
    "masked": lambda x: scaled_dot_product_attention(x, x, x, (x[:, :, :5] > 0) | torch.eye(5).bool()),
    "causal and scaled": lambda x: scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.3),
    "beside four": lambda x: (
        scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0] + scaled_dot_product_attention(x, x, x)
    ),
}


class Attending(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_of_fewer_than_four_dimensions_is_exported(tmp_path: Path, kind: str) -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    module = Attending(ATTENTIONS[kind]).eval()
    export_graph(trace_graph(module, (x,)), tmp_path / "x.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module(x), rtol=1e-5, atol=1e-5)


def test_a_graph_that_needs_no_lifting_is_left_alone() -> None:
    x = torch.randn(2, 2, 5, 8)
    graph = trace_graph(Attending(ATTENTIONS["three"]), (x,))
    assert lift_attention(graph) is graph
