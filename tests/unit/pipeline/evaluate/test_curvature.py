"""Curvature at outputs against a slow definition of it, what padding counts for, and what it all predicts."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from make.nets import count_hooks
from rankship_pipeline.evaluate.accuracy import measure_divergence
from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.evaluate.curvature import collect_curvatures
from rankship_pipeline.evaluate.grams import TOKEN_SMOOTHING, collect_grams
from rankship_pipeline.models.layers import find_layers


class Net(nn.Module):
    """Two convolutions and a linear layer, so small that every gradient can be taken alone."""

    def __init__(self, *, inplace: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1)
        self.body = nn.Conv2d(3, 4, 2, stride=2, bias=False)
        self.head = nn.Linear(16, 5)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.relu(self.body(self.relu(self.stem(x)))).flatten(1))
        return y


def make_net(*, inplace: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Net(inplace=inplace).eval()


def find_slowly(net: nn.Module, x: Tensor, name: str) -> Tensor:
    """E_x Σ_y p(y|x) Σ_positions g·gᵀ / positions, one sample and one class at a time."""
    kept: list[Tensor] = []
    module = net.get_submodule(name)
    handle = module.register_forward_hook(lambda _module, _args, y: kept.append(y))
    found, positions = torch.zeros(0), 0
    for sample in x:
        kept.clear()
        logs = net(sample[None]).log_softmax(-1)[0]
        for log in logs:
            (gradient,) = torch.autograd.grad(log, kept[0], retain_graph=True)
            rows = gradient[0].flatten(1).T if gradient.ndim == 4 else gradient.reshape(-1, gradient.shape[-1])
            for g in rows.double():
                part = log.exp().double().detach() * torch.outer(g, g)
                found = part if not found.numel() else found + part
        positions += len(rows)
    handle.remove()
    return found / positions


@pytest.mark.parametrize("name", ["stem", "body", "head"])
def test_a_classifiers_curvature_is_its_definition(name: str) -> None:
    net, x = make_net(), torch.randn(70, 1, 4, 4, generator=torch.Generator().manual_seed(1))  # two batches and a bit
    torch.testing.assert_close(
        collect_curvatures(net, (x,), find_layers(net), draws=8)[name], find_slowly(net, x, name), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("name", ["stem", "body"])
def test_an_activation_in_place_changes_no_curvature(name: str) -> None:
    x = torch.randn(9, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    found, expected = (
        collect_curvatures(net, (x,), find_layers(net))[name] for net in (make_net(inplace=True), make_net())
    )
    torch.testing.assert_close(found, expected)


def test_models_whose_parameters_are_frozen_have_the_same_curvature() -> None:
    net, x = make_net(), torch.randn(9, 1, 4, 4)
    expected = collect_curvatures(net, (x,), find_layers(net))
    with torch.no_grad():
        found = collect_curvatures(net.requires_grad_(requires_grad=False), (x,), find_layers(net))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


class Wide(nn.Module):
    """One linear layer, of many classes."""

    def __init__(self, classes: int = 14) -> None:
        super().__init__()
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x)
        return y


def expect_fisher(logits: Tensor) -> Tensor:
    """diag(p) − p·pᵀ, averaged: the Fisher information of a softmax in its logits."""
    p = logits.softmax(-1).double()
    return p.mean(0).diag() - p.T @ p / len(p)


def test_drawn_signs_agree_with_the_sum_over_all_classes_and_come_again() -> None:
    torch.manual_seed(0)
    net, x = Wide().eval(), torch.randn(1500, 4)
    found, again, other = (collect_curvatures(net, (x,), find_layers(net), seed, draws=2)["head"] for seed in (3, 3, 4))
    assert torch.equal(found, again)
    assert not torch.equal(found, other)
    expected = expect_fisher(net(x).detach())
    assert float((found - expected).norm() / expected.norm()) < 0.2
    exact = collect_curvatures(net, (x[:100],), find_layers(net), draws=16)["head"]
    torch.testing.assert_close(exact, expect_fisher(net(x[:100]).detach()), rtol=1e-4, atol=1e-6)


class Reader(nn.Module):
    """A language model or a classifier of token ids that a mask may hide."""

    inputs = ("input_ids", "attention_mask")

    def __init__(self, *, pooled: bool, width: int = 6) -> None:
        super().__init__()
        self.words = nn.Embedding(9, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, 4)
        self.pooled = pooled

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        y = torch.tanh(self.mix(self.words(ids)))
        if self.pooled:
            y = (y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        logits: Tensor = self.head(y)
        return logits


def draw_tokens(samples: int = 20, positions: int = 7, shown: int = 4) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 9, (samples, positions), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[:, shown:] = 0
    return ids, mask


@pytest.mark.parametrize("width", [6, 7])
def test_padding_counts_for_nothing(width: int) -> None:
    """As if it were not there; also where the pooled state is as wide as the sample is long: that is no padding."""
    torch.manual_seed(0)
    net = Reader(pooled=True, width=width).eval()
    ids, mask = draw_tokens()
    layers = find_layers(net)
    grams = [collect_grams(net, one, layers) for one in ((ids, mask), (ids[:, :4], mask[:, :4]))]
    curvatures = [collect_curvatures(net, one, layers) for one in ((ids, mask), (ids[:, :4], mask[:, :4]))]
    for name in ("words", "mix", "head"):
        torch.testing.assert_close(grams[0][name], grams[1][name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(curvatures[0][name], curvatures[1][name], rtol=1e-4, atol=1e-7)


def test_an_embeddings_gram_counts_the_tokens_that_are_seen() -> None:
    net = Reader(pooled=True).eval()
    ids, mask = torch.tensor([[1, 1, 2], [8, 1, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    counts = collect_grams(net, (ids, mask), find_layers(net))["words"]
    expected = (torch.tensor([0, 3, 1, 0, 0, 0, 0, 0, 1]).double() + TOKEN_SMOOTHING) / 2
    torch.testing.assert_close(counts, expected)


def test_a_language_models_curvature_leaves_hidden_positions_out() -> None:
    torch.manual_seed(0)
    net = Reader(pooled=False).eval()
    ids, mask = draw_tokens(300)
    with torch.no_grad():
        net.words.weight[:] *= 3
    found = collect_curvatures(net, (ids, mask), find_layers(net), draws=4)["head"]
    expected = expect_fisher(net(ids, mask).detach()[:, :4].flatten(0, 1))
    assert float((found - expected).norm() / expected.norm()) < 0.05


class Mixer(Reader):
    """Every position's answer depends on all shown ones, a hidden position's by far the most."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        mean = super().forward(ids, mask).mul(mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        return mean * torch.where(mask.bool(), 1.0, 5.0)[..., None]


def test_what_is_answered_at_a_hidden_position_weighs_nothing() -> None:
    torch.manual_seed(0)
    net = Mixer(pooled=False).eval()
    ids, mask = draw_tokens(400)
    layers = find_layers(net)
    hidden, absent = (collect_curvatures(net, one, layers) for one in ((ids, mask), (ids[:, :4], mask[:, :4])))
    for name in ("words", "mix", "head"):
        assert float((hidden[name] - absent[name]).norm() / absent[name].norm()) < 0.2  # both are drawn


def test_a_layer_that_runs_for_nothing_has_no_curvature() -> None:
    class Aside(Wide):
        def __init__(self) -> None:
            super().__init__()
            self.aside = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x)
            return super().forward(x)

    net = Aside().eval()
    assert not collect_curvatures(net, (torch.randn(5, 4),), find_layers(net))["aside"].any()


def test_a_layer_that_never_runs_has_no_curvature() -> None:
    class Idle(Wide):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(4, 3)

    net = Idle().eval()
    assert not collect_curvatures(net, (torch.randn(5, 4),), find_layers(net))["idle"].any()


def test_no_hook_stays_whether_the_model_runs_or_fails() -> None:
    net = make_net()
    layers = find_layers(net)
    collect_curvatures(net, (torch.randn(2, 1, 4, 4),), layers)
    with pytest.raises(RuntimeError):
        collect_curvatures(net, (torch.randn(2, 1, 9, 9),), layers)
    with pytest.raises(RuntimeError):
        collect_grams(net, (torch.randn(2, 1, 9, 9),), layers)
    assert count_hooks(net) == 0
    assert not any(parameter.grad is not None for parameter in net.parameters())


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return torch.tensor(load_digits().images / 16, dtype=torch.float32)[:, None]


@pytest.fixture(scope="module")
def trained(digits: Tensor) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    labels = torch.tensor(load_digits().target)
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(120):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(digits), labels).backward()  # type: ignore[no-untyped-call]  # torch types no backward
        optimiser.step()
    return net.eval()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["1", "3"])
def test_gram_and_curvature_together_predict_the_divergence_of_a_small_error(
    trained: nn.Module, digits: Tensor, name: str, seed: int
) -> None:
    """½·tr(H·Δ·G·Δᵀ), in nats."""
    layers = find_layers(trained)
    G, H = collect_grams(trained, (digits,), layers)[name], collect_curvatures(trained, (digits,), layers)[name]
    weight = trained.get_submodule(name).weight
    assert isinstance(weight, nn.Parameter)
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    expected = float(torch.trace(H @ change.double() @ G @ change.double().T)) / 2
    teacher = predict(trained, (digits,))
    with torch.no_grad():
        weight.add_(change)
        measured = measure_divergence(trained, (digits,), teacher)
        weight.sub_(change)
    assert measured / 2 < expected < measured * 2
