"""Which layers' inputs are neurons: numbers that other layers make one by one, and that nothing else reads."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from make.decoders import make_decoder
from rankship_pipeline.align.neurons import mark_neurons
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.huggingface import ByPosition
from rankship_pipeline.models.layers import find_layers


def find_fed(net: nn.Module, inputs: Inputs, exclude: tuple[str, ...] = ()) -> dict[str, tuple[str, ...]]:
    layers = mark_neurons(net, find_layers(net, exclude), inputs)
    fed = {layer.name: layer.fed_by for layer in layers if layer.fed_by}
    assert {layer.name: layer.feeds for layer in layers if layer.feeds} == {
        name: reader for reader, names in fed.items() for name in names
    }
    return fed


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_a_decoders_mlps_are_found_and_nothing_of_its_attention(name: str) -> None:
    net = ByPosition(make_decoder(name), ("input_ids",)).eval()
    fed = find_fed(net, (torch.randint(0, 50, (2, 12)),))
    mlps = [f"model.model.layers.{block}.mlp" for block in range(3)]
    assert fed == {f"{mlp}.down_proj": (f"{mlp}.gate_proj", f"{mlp}.up_proj") for mlp in mlps}


class Net(nn.Module):
    """Neurons that one layer reads, that two read, that are normalised, and that are an output too."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second, self.third = nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(9, 6)
        self.norm = nn.LayerNorm(9)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = functional.gelu(self.first(x))
        if self.kind == "normalised":
            y = self.norm(y)
        if self.kind == "read twice":
            return (self.second(y) + self.third(y),)
        return (self.second(y), y) if self.kind == "given out" else (self.second(y),)


@pytest.mark.parametrize("kind", ["plain", "normalised", "read twice", "given out"])
def test_only_what_one_layer_alone_reads_is_neurons(kind: str) -> None:
    net = Net(kind).eval()
    assert find_fed(net, (torch.randn(2, 6),)) == ({"second": ("first",)} if kind == "plain" else {})


def test_a_layer_that_stays_dense_keeps_its_neurons() -> None:
    assert not find_fed(Net("plain").eval(), (torch.randn(2, 6),), ("first",))


def test_of_neurons_on_both_sides_of_a_layer_one_side_is_marked() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)).eval()
    assert len(find_fed(net, (torch.randn(2, 5),))) == 1


class Untraceable(nn.Module):
    """Looks at its numbers to decide what to do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(torch.relu(self.one(x)))
        return y if float(x.sum()) > 0 else -y


def test_of_a_model_that_cannot_be_traced_nothing_is_marked() -> None:
    net = Untraceable().eval()
    assert mark_neurons(net, find_layers(net), (torch.randn(2, 4),)) == find_layers(net)
