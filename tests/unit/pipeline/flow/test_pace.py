import torch
from torch import Tensor, nn

from rankship_pipeline.flow.pace import measure_pace
from rankship_pipeline.models.layers import find_layers


def test_positions_and_written_bytes_are_those_of_one_sample() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Flatten(1, 2), nn.Linear(4, 5), nn.ConvTranspose1d(32, 4, 2)
    ).eval()
    pace = measure_pace(model, (torch.randn(20, 3, 8, 8),), find_layers(model))
    assert pace.positions == {"0": 16, "2": 32, "3": 5}
    assert pace.activation_bytes == 4 * (8 * 16 + 32 * 5 + 4 * 6), "a view writes nothing"
    assert min(pace.forward_seconds, pace.product64_flops, pace.product32_flops, pace.eigen_flops) > 0
    assert pace.operators is None


def test_tokens_are_positions_of_their_table() -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50, bias=False))
    model[1].weight = model[0].weight
    pace = measure_pace(model, (torch.zeros(3, 7, dtype=torch.int64),), find_layers(model))
    assert pace.positions == {"0": 7, "1": 7}


class Odd(nn.Module):
    """Writes sparse and batched tensors on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.vmap(lambda row: row * 2)(self.layer(x))
        scaled: Tensor = torch.sparse.mm(torch.eye(4).to_sparse(), y.T).T
        return scaled


def test_tensors_without_a_storage_are_no_obstacle() -> None:
    model = Odd().eval()
    assert measure_pace(model, (torch.randn(5, 4),), find_layers(model)).activation_bytes >= 2 * 16
