import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from rankship_pipeline.models.layers import find_layers
from rankship_pipeline.models.plain_modules import copy_module, is_plain, make_plain

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pruned(module: nn.Module) -> nn.Module:
    prune.l1_unstructured(module, "weight", 0.5)  # type: ignore[no-untyped-call]  # torch types none of its pruning
    return module


REPARAMETRISED = {
    "weight norm": parametrizations.weight_norm,
    "weight norm of old": weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm of old": spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": pruned,
}


@pytest.mark.parametrize("wrap", REPARAMETRISED.values(), ids=REPARAMETRISED)
def test_a_computed_weight_becomes_a_plain_one(wrap: Any) -> None:  # noqa: ANN401
    net = nn.Sequential(wrap(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(5, 6)
    expected = net(x)
    assert not is_plain(net)
    plain = make_plain(copy_module(net))
    torch.testing.assert_close(plain(x), expected)
    assert is_plain(plain)
    assert set(plain.state_dict()) == {"0.bias", "0.weight", "2.weight", "2.bias"}
    assert [layer.name for layer in find_layers(plain)] == ["0", "2"]
    torch.testing.assert_close(net(x), expected)  # the copy was changed, not the model
    assert not is_plain(net)


def test_a_model_without_such_modules_is_left_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    parts = list(net)
    assert is_plain(net)
    assert list(make_plain(net)) == parts  # type: ignore[call-overload]  # a Sequential


MASKS = {
    "none": {},
    "causal": {"attn_mask": torch.ones(7, 7).triu(1).bool(), "is_causal": True},
    "added": {"attn_mask": torch.randn(7, 7)},
    "per head": {"attn_mask": torch.randn(3 * 4, 7, 7)},
    "padding": {"key_padding_mask": torch.arange(7) > torch.tensor([6, 4, 2])[:, None]},
    "both": {
        "attn_mask": torch.ones(7, 7).triu(1).bool(),
        "key_padding_mask": torch.arange(7) > torch.tensor([6, 4, 2])[:, None],
    },
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("weights", [None, True, False], ids=["no weights", "averaged weights", "weights"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_computes_what_torchs_does(masks: Any, weights: bool | None, batch_first: bool) -> None:  # noqa: ANN401, FBT001
    of = nn.MultiheadAttention(16, 4, dropout=0.3, batch_first=batch_first).eval()
    nn.init.normal_(of.in_proj_bias)
    plain = make_plain(copy.deepcopy(of))
    x = torch.randn(3, 7, 16)
    x = x if batch_first else x.transpose(0, 1)
    asked = {"need_weights": weights is not None, "average_attn_weights": weights is not False, **masks}
    expected, scores = of(x, x, x, **asked)
    output, found = plain(x, x, x, **asked)
    torch.testing.assert_close(output, expected, **CLOSE)
    assert (found is None) == (scores is None)
    if scores is not None:
        torch.testing.assert_close(found, scores, **CLOSE)
    assert [layer.name for layer in find_layers(plain)] == ["q_proj", "k_proj", "v_proj", "out_proj"]


def test_attention_of_other_widths_and_without_samples() -> None:
    of = nn.MultiheadAttention(16, 4, bias=False, kdim=6, vdim=10).eval()
    plain = make_plain(copy.deepcopy(of))
    q, k, v = torch.randn(5, 16), torch.randn(8, 6), torch.randn(8, 10)
    for found, expected in zip(plain(q, k, v), of(q, k, v), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_attention_that_appends_keys_of_its_own_stays_as_it_is() -> None:
    of = nn.MultiheadAttention(16, 4, add_bias_kv=True)
    assert make_plain(of) is of


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_calls_its_layers(norm_first: bool) -> None:  # noqa: FBT001
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
    net = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()
    x = torch.randn(3, 7, 16)
    plain = make_plain(copy.deepcopy(net))
    layers = find_layers(plain)
    called = []
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.inference_mode():
        torch.testing.assert_close(plain(x), net(x), **CLOSE)
    assert len(called) == 2 * 6
    assert set(called) == {one.name for one in layers}


KINDS = [nn.LSTM, nn.GRU, nn.RNN]
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "two layers": {"num_layers": 2, "dropout": 0.5},
    "both directions": {"num_layers": 2, "bidirectional": True, "bias": False},
    "samples first": {"batch_first": True},
}


def watch_calls(net: nn.Module) -> list[Tensor]:
    """What its linear layers give from now on; being watched, they are called one by one."""
    seen: list[Tensor] = []
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _module, _x, y: seen.append(y))
    return seen


@pytest.mark.parametrize("watched", [True, False], ids=["step by step", "one operator"])
@pytest.mark.parametrize("given", [True, False], ids=["given state", "no state"])
@pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_networks_compute_what_torchs_do(
    kind: Any,  # noqa: ANN401
    settings: dict[str, Any],
    given: bool,  # noqa: FBT001
    watched: bool,  # noqa: FBT001
) -> None:
    of = kind(6, 8, **settings).eval()
    plain = make_plain(copy.deepcopy(of))
    x = torch.randn(5, 3, 6)
    states = of.num_layers * (2 if of.bidirectional else 1)
    state = torch.randn(states, 5 if of.batch_first else 3, 8)
    start = () if not given else ((state, state + 1) if kind is nn.LSTM else state,)
    seen = watch_calls(plain) if watched else []
    compare(plain(x, *start), of(x, *start))
    steps = 3 if of.batch_first else 5
    assert len(seen) == (states * (steps + 1) if watched else 0)
    if "dropout" not in settings:
        single = (x[:, 0], *(take_first(one) for one in start))
        compare(plain(*single), of(*single))


def take_first(state: Any) -> Any:  # noqa: ANN401
    """The state of the first sample, without the axis of samples."""
    return tuple(one[:, 0] for one in state) if isinstance(state, tuple) else state[:, 0]


def compare(found: Any, expected: Any) -> None:  # noqa: ANN401
    """Outputs and states, of any nesting."""
    if isinstance(expected, tuple):
        for one, other in zip(found, expected, strict=True):
            compare(one, other)
    else:
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("watched", [True, False])
def test_a_projected_lstm_and_a_relu_network(watched: bool) -> None:  # noqa: FBT001
    for of in (nn.LSTM(6, 8, 2, proj_size=3, bidirectional=True), nn.RNN(6, 8, nonlinearity="relu")):
        plain = make_plain(copy.deepcopy(of))
        if watched:
            watch_calls(plain)
        x = torch.randn(5, 3, 6)
        compare(plain(x), of(x))


@pytest.mark.parametrize("of", [nn.LSTMCell(6, 8), nn.GRUCell(6, 8), nn.RNNCell(6, 8, nonlinearity="relu")])
def test_cells_compute_what_torchs_do(of: nn.Module) -> None:
    plain = make_plain(nn.Sequential(copy.deepcopy(of)))[0]  # type: ignore[index]  # a Sequential
    assert [layer.name for layer in find_layers(nn.Sequential(plain))] == ["0.ih", "0.hh"]
    x = torch.randn(3, 6)
    state: Any = of(x)
    compare(plain(x), state)
    compare(plain(x, state), of(x, state))
    one = tuple(part[0] for part in state) if isinstance(state, tuple) else state[0]
    compare(plain(x[0], one), of(x[0], one))


def test_a_module_under_two_names_stays_one() -> None:
    cell = nn.GRUCell(4, 4)
    net = make_plain(nn.ModuleDict({"a": cell, "b": cell}))
    assert net.get_submodule("a") is net.get_submodule("b")
    assert type(net.get_submodule("a")) is not nn.GRUCell
