import torch
import transformers
from torch import Tensor, nn

from rankship_pipeline.export.frozen_trace import trace_frozen


class Encoder(nn.Module):
    """T5's: the mask of its attention is learned."""

    def __init__(self) -> None:
        super().__init__()
        settings = transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        self.model = transformers.T5EncoderModel(settings)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.model(ids).last_hidden_state
        return hidden


def test_attention_with_a_learned_mask_is_traced_as_a_converter_reads_it() -> None:
    net, ids = Encoder().eval(), torch.ones(1, 5, dtype=torch.int64)
    graph = trace_frozen(net, (ids,))
    torch.testing.assert_close(graph.module()(ids), net(ids))
    assert torch.onnx.export(graph, dynamo=True, opset_version=20, verbose=False) is not None
    assert all(parameter.requires_grad for parameter in net.parameters())
