"""Models whose weights are hidden in attention, recurrence or a reparametrisation: compressed, saved, merged."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import rankship as rs
from make.sessions import compress_recipe
from rankship_pipeline.models.plain_modules import copy_module

X = torch.randn(48, 6, 16, generator=torch.Generator().manual_seed(0))
LAYERS = {
    "start",
    *(f"attention.{one}_proj" for one in ("q", "k", "v", "out")),
    "rnn.cells.0.ih",
    "rnn.cells.0.hh",
    "head",
}


class Net(nn.Module):
    """All three."""

    def __init__(self) -> None:
        super().__init__()
        self.start = weight_norm(nn.Linear(16, 16))
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.rnn = nn.LSTM(16, 24, batch_first=True)
        self.head = parametrizations.weight_norm(nn.Linear(24, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.start(x)
        y = y + self.attention(y, y, y)[0]
        logits: Tensor = self.head(self.rnn(y)[0][:, -1])
        return logits


def make_net(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


@pytest.fixture
def small() -> rs.Compressed:
    return rs.compress(make_net(0), X, kept_parameters=0.7, ranks=rs.RankChoice(step=2), progress=False)


def test_hidden_weights_are_factored_and_the_model_stays_as_it_was(small: rs.Compressed) -> None:
    assert {layer.name for layer in small.plan.layers} == LAYERS
    assert any("rnn" in name for name in small.plan.factors)
    assert small.plan.total_parameters == sum(one.numel() for one in small.module.parameters())
    net = make_net(0)
    before = net(X)
    full = rs.compress(net, X, kept_parameters=1.0, progress=False)
    torch.testing.assert_close(full.module(X), before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net(X), before, rtol=0, atol=0)
    assert hasattr(net.start, "weight_g")


def test_a_saved_model_loads_into_the_architecture_as_its_owner_wrote_it(small: rs.Compressed, tmp_path: Path) -> None:
    into = make_net(9)
    loaded = rs.load(small.save(tmp_path), into=into)
    assert torch.equal(loaded(X), small.module(X))
    assert type(into.rnn) is nn.LSTM


def test_merging_averages_what_the_models_compute_with(tmp_path: Path) -> None:
    nets = [make_net(0), make_net(1)]
    one = rs.merge(nets, {"a": X, "b": X}, method="average", progress=False)
    expected = sum(net.head.weight.detach() for net in nets) / 2
    torch.testing.assert_close(one.module.get_parameter("head.weight"), expected)
    assert torch.equal(rs.load(one.save(tmp_path), into=make_net(9))(X), one.module(X))


def test_a_recipe_of_files_makes_the_same_plan(small: rs.Compressed, tmp_path: Path) -> None:
    beside = Path(__file__).read_text().partition("\n\n\ndef make_net")[0]
    (tmp_path / "net.py").write_text(beside + "\n")
    small.to_recipe(tmp_path / "recipe", factory=f"{tmp_path / 'net.py'}:Net")
    _, plan = compress_recipe(tmp_path / "recipe" / "recipe.toml")
    assert plan == small.plan


def test_a_copy_takes_computed_weights_along() -> None:
    net = make_net(3)
    net(X)  # the hook leaves a tensor of autograd's on the module
    assert torch.equal(copy_module(net)(X), net(X))
