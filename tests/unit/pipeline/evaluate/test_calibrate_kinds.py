"""Rows of every kind of layer: its weight as a matrix maps those of the input to those of the output."""

from typing import Any

import pytest
import torch
from torch import nn

from make.conv1ds import make_conv1d
from rankship_pipeline.evaluate.curvature import collect_curvatures
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.evaluate.rows import as_outputs, as_rows
from rankship_pipeline.models.layers import as_matrix, find_layers
from rankship_pipeline.models.plain_modules import make_plain

LAYERS: dict[str, Any] = {
    "linear": nn.Linear(4, 5, bias=False),
    "Conv1D": make_conv1d(4, 5),
    "over one axis": nn.Conv1d(4, 5, 3, 2, 1, bias=False),
    "same": nn.Conv1d(4, 5, 4, padding="same", bias=False),
    "circular": nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular", bias=False),
    "reflected": nn.Conv1d(4, 5, 3, padding=2, padding_mode="reflect", bias=False),
}


def draw(layer: nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    axes = len(getattr(layer, "kernel_size", ()))
    return torch.randn(3, 4, *(7, 6)[:axes])


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_the_matrix_maps_rows_to_outputs(layer: Any) -> None:  # noqa: ANN401
    x = draw(layer)
    expected = as_outputs(layer, layer(x)).double()
    torch.testing.assert_close(as_rows(layer, x).double() @ as_matrix(layer).T, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose1d(4, 5, 4, 2, 1, 1), nn.ConvTranspose2d(4, 5, 3, (2, 1), 1, (1, 0), dilation=2)], ids=str
)
def test_a_transposed_convolutions_gradient_reaches_its_rows(layer: Any) -> None:  # noqa: ANN401
    """∂/∂W of ⟨g, layer(x)⟩ is Σ rows of g times rows of x: the patches are those that each input adds to."""
    x = draw(layer)
    y = layer(x)
    g = torch.randn_like(y)
    (y * g).sum().backward()
    found = as_outputs(layer, g).T @ as_rows(layer, x)  # (rows, columns)
    torch.testing.assert_close(found, layer.weight.grad.flatten(1).T, rtol=1e-4, atol=1e-5)


def test_every_step_of_a_recurrent_network_counts() -> None:
    torch.manual_seed(0)
    net = make_plain(nn.ModuleDict({"rnn": nn.LSTM(4, 6, batch_first=True)}))
    model = Last(net["rnn"]).eval()  # type: ignore[index]  # a ModuleDict
    x = torch.randn(8, 5, 4)
    layers = find_layers(model)
    assert [layer.name for layer in layers] == ["rnn.cells.0.ih", "rnn.cells.0.hh"]
    grams = collect_grams(model, (x,), layers)
    X = x.reshape(-1, 4).double()
    torch.testing.assert_close(grams["rnn.cells.0.ih"], X.T @ X / 8, rtol=1e-5, atol=1e-5)
    states = torch.cat([torch.zeros(8, 1, 6), model.rnn(x)[0][:, :-1]], 1).reshape(-1, 6).double()
    torch.testing.assert_close(grams["rnn.cells.0.hh"], states.T @ states / 8, rtol=1e-5, atol=1e-5)
    curvatures = collect_curvatures(model, (x,), layers)
    # ∂/∂(inputs' gates) and ∂/∂(state's gates) are the same at every step: both are added up to the gates
    torch.testing.assert_close(curvatures["rnn.cells.0.hh"], curvatures["rnn.cells.0.ih"], rtol=1e-4, atol=1e-9)


class Last(nn.Module):
    """The outputs of a recurrent network at its last step, as logits."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last: torch.Tensor = self.rnn(x)[0][:, -1]
        return last
