"""Ratios learned by training, and the model left as it was."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from make.masks import ORIGINAL, REPAIRED, make_layer_stats, with_ratio
from rankship_pipeline.evaluate.accuracy import measure_divergence
from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.factors.decompose import Spectrum, decompose_eigen, decompose_plain, truncate
from rankship_pipeline.models.layers import as_matrix, find_layers, get_layer
from rankship_pipeline.ranks import ara
from rankship_pipeline.ranks.allocators import allocate_uniform, total_cost
from rankship_pipeline.ranks.ara import AraChoice, Task, finalise, make_mask, train_ratios
from rankship_pipeline.ranks.stats import Choices, LayerStats
from rankship_pipeline.recipe.choices import RankChoice

FAST = AraChoice(steps=100, learning_rate=3e-2, batch=16)
CALIBRATION = 256


def ignore_tick(_done: int, _total: int) -> None:
    """Show nothing."""


def make_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))


def make_convnet() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 12, 3, 2, 1), nn.ReLU()),
        *(nn.Conv2d(12, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(96, 10)),
    )


@dataclass(frozen=True)
class Trained:
    """A net that reads digits, and what allocation knows of it."""

    model: nn.Module
    spectra: dict[str, Spectrum]
    stats: tuple[LayerStats, ...]
    calibration: Tensor
    test: Tensor

    @property
    def total(self) -> int:
        return sum(entry.layer.parameters for entry in self.stats)

    def measure(self, plan: Choices) -> float:
        cut = copy.deepcopy(self.model)
        for name, stored in plan.items():
            if stored.factors is not None:
                A, B = truncate(self.spectra[name], stored.factors.rank)
                weight = get_layer(cut, name).weight
                weight.data.copy_((A @ B).reshape(weight.shape))
        return measure_divergence(cut, (self.test,), predict(self.model, (self.test,)))


def train(make: Callable[[], nn.Module]) -> Trained:
    torch.manual_seed(0)
    digits = load_digits()
    x, labels = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        picked = torch.randint(1200, (64,))
        loss = functional.cross_entropy(model(x[picked]), labels[picked])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    model.eval()
    layers = find_layers(model)
    grams = collect_grams(model, (x[:CALIBRATION],), layers)
    spectra = {
        layer.name: decompose_eigen(as_matrix(get_layer(model, layer.name)), grams[layer.name]) for layer in layers
    }
    stats = tuple(make_layer_stats(layer, spectra[layer.name].energy) for layer in layers)
    return Trained(model, spectra, stats, x[:CALIBRATION], x[1200:])


@pytest.fixture(scope="module")
def mlp() -> Trained:
    return train(make_mlp)


@pytest.fixture(scope="module")
def convnet() -> Trained:
    return train(make_convnet)


@pytest.mark.parametrize("kept", [0.4, 0.6])
@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_learned_ranks_beat_uniform_ones_at_the_same_budget(
    name: str, kept: float, request: pytest.FixtureRequest
) -> None:
    net: Trained = request.getfixturevalue(name)
    task = ara.match_outputs(net.model, (net.calibration,))
    ratios = train_ratios(net.model, net.spectra, task, kept, FAST, 0, ignore_tick)
    budget = int(kept * net.total)
    learned = finalise(ratios, net.stats, budget, repaired=True)
    uniform = allocate_uniform(net.stats, budget, RankChoice(method="uniform", step=1))
    assert total_cost(net.stats, learned) <= budget
    assert net.measure(learned) < 0.7 * net.measure(uniform)


class Forked(nn.Module):
    """Two like branches, of which the output hears only one."""

    def __init__(self, hearing: tuple[float, float]) -> None:
        super().__init__()
        self.left, self.right, self.hearing = nn.Linear(24, 24), nn.Linear(24, 24), hearing

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.hearing[0] * self.left(x) + self.hearing[1] * self.right(x)
        return y


@pytest.mark.parametrize("choice", [ORIGINAL, REPAIRED], ids=["original", "repaired"])
@pytest.mark.parametrize("hearing", [(1.0, 0.0), (0.0, 1.0)])
def test_rank_moves_from_a_useless_layer_to_a_useful_one(hearing: tuple[float, float], choice: AraChoice) -> None:
    torch.manual_seed(0)
    model, x = Forked(hearing), torch.randn(64, 24)
    model.right.load_state_dict(model.left.state_dict())
    spectra = {
        layer.name: decompose_plain(as_matrix(get_layer(model, layer.name)), None) for layer in find_layers(model)
    }
    task = ara.match_outputs(model, (3 * x,))
    choice = replace(FAST, guidance_weight=0.0, repaired=choice.repaired)  # it treats both alike
    ratios = train_ratios(model, spectra, task, 0.5, choice, 0, ignore_tick)
    useful, useless = (ratios["left"], ratios["right"]) if hearing[0] else (ratios["right"], ratios["left"])
    assert useful > 0.55
    assert useless < 0.45


def test_repaired_training_ends_at_the_target_size_where_guidance_takes_the_published_above_it() -> None:
    torch.manual_seed(0)
    model, x = Forked((1.0, 1.0)), torch.randn(64, 24)
    spectra = {
        layer.name: decompose_plain(as_matrix(get_layer(model, layer.name)), None) for layer in find_layers(model)
    }
    task = ara.match_outputs(model, (x,))
    sizes = []
    for choice in (replace(FAST, repaired=False), FAST):
        ratios = train_ratios(model, spectra, task, 0.5, choice, 0, ignore_tick)
        sizes.append(sum(min(1, ratio) for ratio in ratios.values()) / 2)
    assert sizes[0] > 0.6
    assert sizes[1] == pytest.approx(0.5, abs=0.03)


def test_a_model_in_training_mode_is_judged_as_it_will_be_used(convnet: Trained) -> None:
    choice, runs = replace(FAST, steps=5), []
    task = ara.match_outputs(convnet.model, (convnet.calibration,))
    for training in (False, True):
        model = copy.deepcopy(convnet.model).train(training)
        runs.append(train_ratios(model, convnet.spectra, task, 0.5, choice, 0, ignore_tick))
    assert runs[0] == runs[1]


def test_training_is_deterministic_and_tells_its_progress(convnet: Trained) -> None:
    ticks: list[tuple[int, int]] = []
    choice = replace(FAST, steps=7, batch=100)
    task = ara.match_outputs(convnet.model, (convnet.calibration,))
    runs = [
        train_ratios(convnet.model, convnet.spectra, task, 0.5, choice, seed, lambda *done: ticks.append(done))
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert ticks == [(done, 7) for done in range(1, 8)] * 3
    assert list(runs[0]) == list(convnet.spectra)


def test_every_epoch_sees_every_sample_once_in_an_order_of_its_own() -> None:
    batches = [batch.tolist() for batch in ara._draw_batches(10, AraChoice(steps=10, batch=3), 0)]
    assert [len(batch) for batch in batches] == [3, 3, 3, 1, 3, 3, 3, 1, 3, 3]
    epochs = [list(itertools.chain(*batches[start : start + 4])) for start in (0, 4)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]


class Echo(nn.Module):
    """Says what it hears, whatever its layer is worth."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + 0 * self.layer(x)
        return y


def test_every_batch_meets_its_own_targets() -> None:
    model, seen = Echo(), list[int]()

    def loss(outputs: Tensor, picked: Tensor) -> Tensor:
        assert torch.equal(outputs[:, 0].detach(), picked.float())
        seen.extend(picked.tolist())
        return outputs.mean()

    spectra = {"layer": decompose_plain(as_matrix(model.layer), None)}
    task = Task((torch.arange(10.0)[:, None].expand(10, 6),), loss)
    train_ratios(model, spectra, task, 0.5, AraChoice(steps=2, batch=5), 0, ignore_tick)
    assert sorted(seen) == list(range(10))


class Interrupted(Exception):
    """Any reason to stop."""


@pytest.mark.parametrize("stop", [None, Interrupted, KeyboardInterrupt])
def test_the_model_is_left_as_it_was_even_when_training_stops(
    stop: type[BaseException] | None, convnet: Trained
) -> None:
    model = copy.deepcopy(convnet.model).train()  # its batch-norm statistics must not move either
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]

    def tick(done: int, _total: int) -> None:
        if stop is not None and done == 2:
            raise stop

    def learn() -> None:
        task = ara.match_outputs(model, (convnet.calibration,))
        train_ratios(model, convnet.spectra, task, 0.5, replace(FAST, steps=3), 0, tick)

    if stop is None:
        learn()
    else:
        with pytest.raises(stop):
            learn()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(name, type(module), module.training) for name, module in model.named_modules()] == modules
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_only_logits_of_layers_that_a_rank_makes_cheaper_are_trained() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 1)), torch.randn(32, 12)
    spectra = {name: decompose_plain(as_matrix(get_layer(model, name)), None) for name in ("0", "2")}
    task = ara.match_targets((x,), torch.zeros(32, dtype=torch.int64))
    ratios = train_ratios(model, spectra, task, 0.5, replace(FAST, steps=3), 0, ignore_tick)
    assert ratios["2"] == 1  # 12 parameters, 13 in factors
    assert ratios["0"] < 0.9
    ticks: list[int] = []
    tick = lambda done, _total: ticks.append(done)  # noqa: E731
    assert train_ratios(model, {"2": spectra["2"]}, task, 0.5, FAST, 0, tick) == {"2": 1}
    assert train_ratios(model, spectra, task, 1.0, FAST, 0, tick) == {"0": 1, "2": 1}
    assert ticks == []


class Mixed(nn.Module):
    """Two layers of equal size, of which only one can be factored."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.row = nn.Linear(12, 12), nn.Linear(144, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.square(x) + self.row(x.repeat(1, 12))
        return y


def test_layers_that_stay_dense_count_for_the_size() -> None:
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(32, 12)
    spectra = {
        layer.name: decompose_plain(as_matrix(get_layer(model, layer.name)), None) for layer in find_layers(model)
    }
    choice = replace(FAST, guidance_weight=0.0)
    ratios = train_ratios(model, spectra, ara.match_outputs(model, (x,)), 0.7, choice, 0, ignore_tick)
    assert ratios["row"] == 1
    assert ratios["square"] == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("choice", [ORIGINAL, REPAIRED], ids=["original", "repaired"])
def test_an_absorbed_layer_leaves_dense_only_when_repaired(choice: AraChoice) -> None:
    torch.manual_seed(0)
    model, x = Forked((1.0, 0.0)), torch.randn(16, 24)
    spectra = {"right": decompose_plain(as_matrix(model.right), None)}
    task = ara.match_outputs(model, (x,))
    masks = {"right": with_ratio(make_mask(spectra["right"], 0.5, choice), 1.05)}
    masked = ara.attach(model, spectra, masks, repaired=choice.repaired)
    optimizer = torch.optim.Adam([masks["right"].logits], lr=1e-2)
    for _ in range(60):
        loss = task.loss(masked(x), torch.arange(16)) + ara.measure_penalty(masks, 0.5, 576, choice)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert (float(masks["right"].find_ratio().detach()) < 1) == choice.repaired
