from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from make.conv1ds import make_conv1d
from rankship_pipeline.models.layers import (
    as_matrix,
    count_parameters,
    find_dense,
    find_layers,
    get_layer,
    matricise,
    shape_weight,
)


class Aliased(nn.Module):
    """One layer under two names, and one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.left = nn.Linear(4, 4)
        self.right = nn.Linear(4, 4)
        self.right.weight = self.left.weight
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Use each once."""
        y: Tensor = self.head(self.right(self.left(self.again(self.first(x)))))
        return y


class Curious(nn.Linear):
    """A subclass may do anything in its forward."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch's
        """Twice the layer."""
        return 2 * super().forward(input)


class Renamed(nn.Linear):
    """A subclass that changes nothing, as torch's own in its attention."""


class Sharing(nn.Module):
    """Every reason to stay dense, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.grouped = nn.Conv1d(4, 4, 3, groups=2)
        self.first = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.head.weight = self.first.weight
        self.cube = nn.Conv3d(4, 4, 3)
        self.curious = Curious(4, 4)
        self.hooked = nn.Linear(4, 4)
        self.hooked.register_forward_hook(lambda *_: None)
        self.bounded = nn.Embedding(4, 4, max_norm=1.0)
        self.plain = nn.Linear(4, 4)
        self.norm = nn.BatchNorm2d(4)


def test_linear_and_convolution_are_matrices_in_the_models_order() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, (3, 2), bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5))
    conv, linear = find_layers(net)
    assert (conv.name, conv.rows, conv.columns, conv.parameters) == ("0", 8, 18, 144)
    assert (linear.name, linear.rows, linear.columns, linear.parameters) == ("3", 5, 8, 40)
    assert (conv.kind, conv.kernel, conv.channels) == ("convolution", (3, 2), 3)
    assert (linear.kind, linear.kernel, linear.channels) == ("linear", (1, 1), 8)
    assert conv.count_factored(2) == 52
    assert as_matrix(get_layer(net, "0")).shape == (8, 18)
    assert as_matrix(get_layer(net, "0")).dtype == torch.float64


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.ConvTranspose2d(4, 4, 3, groups=2),
        nn.Conv3d(4, 4, 3),
        nn.Embedding(4, 4, max_norm=1.0),
        nn.Embedding(4, 4, sparse=True),
        nn.EmbeddingBag(4, 4),
        nn.BatchNorm2d(4),
        Curious(4, 4),
    ],
    ids=lambda module: str(module)[:40],
)
def test_what_cannot_become_two_operators_is_left_out(module: nn.Module) -> None:
    assert find_layers(nn.Sequential(module)) == ()
    with pytest.raises(TypeError, match="not a layer from find_layers"):
        get_layer(nn.Sequential(module), "0")


def test_an_embedding_is_the_matrix_that_its_one_hot_inputs_meet() -> None:
    net = nn.Sequential(nn.Embedding(9, 4))
    (layer,) = find_layers(net)
    assert (layer.rows, layer.columns, layer.kind, layer.parameters) == (4, 9, "embedding", 36)
    one_hot = torch.eye(9, dtype=torch.float64)
    torch.testing.assert_close(one_hot @ as_matrix(get_layer(net, "0")).T, net(torch.arange(9)).double())


def test_what_stays_dense_is_named_with_its_reason() -> None:
    net = Sharing()
    assert find_dense(net) == {
        "depthwise": "its convolution is depthwise",
        "grouped": "its convolution is grouped",
        "first": "it is used twice or shares its weight",
        "head": "it is used twice or shares its weight",
        "cube": "Conv3d has no form",
        "curious": "Curious computes in its own way",
        "hooked": "hooks may change what it computes",
        "bounded": "it renormalises its weight, or its gradient is sparse",
    }
    assert [layer.name for layer in find_layers(net)] == ["plain"]


def test_a_subclass_that_changes_nothing_is_the_layer() -> None:
    assert [layer.kind for layer in find_layers(nn.Sequential(Renamed(4, 4)))] == ["linear"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(3, 8, (3, 2)),
        lambda: nn.Linear(4, 5),
        lambda: nn.Embedding(7, 3),
        lambda: nn.Conv1d(3, 8, 4),
        lambda: nn.ConvTranspose2d(3, 8, (3, 2)),
        lambda: make_conv1d(4, 5),
    ],
)
def test_a_matrix_goes_back_into_the_weight_that_it_was(make: Any) -> None:  # noqa: ANN401
    net = nn.Sequential(make())
    (layer,) = find_layers(net)
    weight = net.state_dict()["0.weight"]
    matrix = matricise(weight, layer)
    assert matrix.shape == (layer.rows, layer.columns)
    assert torch.equal(shape_weight(matrix, weight, layer), weight)


def test_tied_weights_and_layers_with_two_names_are_left_out() -> None:
    assert [layer.name for layer in find_layers(Aliased())] == ["head"]


def make_pair(head: nn.Linear | None = None) -> nn.Sequential:
    """An embedding, and a head that has its weight."""
    pair = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False) if head is None else head)
    pair[1].weight = pair[0].weight
    return pair


def test_an_embedding_and_the_head_that_has_its_weight_are_one_layer() -> None:
    (layer,) = find_layers(make_pair())
    assert (layer.name, layer.kind, layer.parameters) == ("0", "embedding", 20)
    assert [(use.name, use.kind, use.rows, use.columns) for use in layer.uses] == [
        ("0", "embedding", 4, 5), ("1", "linear", 5, 4),
    ]  # fmt: skip
    assert find_dense(make_pair()) == {}
    assert find_layers(make_pair(), ("1",)) == ()


def hook(pair: nn.Sequential) -> None:
    pair[1].register_forward_hook(lambda *_: None)


def name_twice(pair: nn.Sequential) -> None:
    pair.append(pair[1])


def share_otherwise(pair: nn.Sequential) -> None:
    pair.register_parameter("weight_too", pair.get_parameter("0.weight"))


@pytest.mark.parametrize("spoil", [hook, name_twice, share_otherwise])
def test_a_pair_of_which_one_cannot_be_replaced_stays_dense(spoil: Any) -> None:  # noqa: ANN401
    pair = make_pair()
    spoil(pair)
    assert find_layers(pair) == ()
    assert find_dense(pair).keys() == {"0", "1"}


def test_an_embedding_tied_to_a_layer_of_its_own_kind_stays_dense() -> None:
    assert find_layers(make_pair(Curious(4, 5, bias=False))) == ()


def test_a_layer_used_twice_in_a_sequence_is_left_out() -> None:
    shared = nn.Linear(4, 4)
    assert find_layers(nn.Sequential(shared, nn.ReLU(), shared)) == ()


def test_a_model_that_is_itself_a_layer_has_no_name_to_factor_under() -> None:
    assert find_layers(nn.Linear(4, 4)) == ()


def test_a_layer_whose_weight_is_computed_is_left_out() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    prune.l1_unstructured(net[0], "weight", 0.5)  # type: ignore[no-untyped-call]  # torch types none of its pruning
    assert [layer.name for layer in find_layers(net)] == ["1"]


def test_excluded_names_are_left_out() -> None:
    net = nn.Sequential()
    for name in ("stem", "head", "Head"):
        net.add_module(name, nn.Sequential(nn.Linear(2, 2)))
    assert [layer.name for layer in find_layers(net, ("head*",))] == ["stem.0", "Head.0"]
    assert [layer.name for layer in find_layers(net, ("*.0",))] == []
    assert len(find_layers(net, ("nothing",))) == 3


def test_parameters_are_counted_once_and_buffers_never() -> None:
    net = Aliased()
    assert count_parameters(net) == (16 + 4) + (16 + 4 + 4) + (8 + 2)
    assert count_parameters(nn.BatchNorm2d(3)) == 6
