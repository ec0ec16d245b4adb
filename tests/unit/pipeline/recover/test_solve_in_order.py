"""Sequential merging: layers solved on the inputs they really get, norms set so that nothing else changes."""

import copy

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.factors.analysis import analyse
from rankship_pipeline.factors.decompose import Metric
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.merge import Sources, merge_states
from rankship_pipeline.models.layers import find_layers
from rankship_pipeline.recover.solve_in_order import find_norms, refit


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.out = nn.Linear(8, 4)
        self.unused = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.stem(x)))
        logits: Tensor = self.out(torch.relu(self.norm2(self.mix(y)) + y).mean((2, 3)))
        return logits


def make_pair() -> tuple[list[Net], list[tuple[Tensor]]]:
    """Two models from one initialisation, moved apart, with other norms' statistics and other data."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    start = Net()
    models, data = [], []
    for shift in (0.0, 1.5):
        model = copy.deepcopy(start)
        inputs = torch.randn(96, 1, 6, 6, generator=generator) * (1 + shift) + shift
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
        model.train()
        for _ in range(60):  # running statistics of its own data
            model(inputs)
        models.append(model.eval())
        data.append((inputs,))
    return models, data


def merge(models: list[Net], data: list[tuple[Tensor]]) -> Net:
    layers = find_layers(models[0])
    states = [model.state_dict() for model in models]
    grams = [collect_grams(model, inputs, layers) for model, inputs in zip(models, data, strict=True)]
    state = merge_states("sequential", Sources(states=states, layers=layers, grams=grams), {"off_diagonal": 1})
    merged = Net().eval()
    merged.load_state_dict(state)
    return merged


def measure_error(model: nn.Module, models: list[Net], data: list[tuple[Tensor]]) -> float:
    errors = [
        float((predict(model, inputs)["output"] - predict(one, inputs)["output"]).square().mean())
        for one, inputs in zip(models, data, strict=True)
    ]
    return sum(errors) / len(errors)


def test_layers_run_in_order_and_norms_are_found_behind_them() -> None:
    model = Net().eval()
    found = find_norms(model, find_layers(model), (torch.randn(1, 1, 6, 6),))
    assert list(found.items()) == [("stem", "norm"), ("mix", "norm2"), ("out", None)]


def test_a_norm_that_does_not_take_the_layers_output_itself_is_none_of_its_own() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.one(x) + x)
            return y

    model = Apart().eval()
    assert find_norms(model, find_layers(model), (torch.randn(2, 4),)) == {"one": None}


def test_one_model_stays_what_it_is() -> None:
    models, data = make_pair()
    again = refit(models[0], find_layers(models[0]), [(models[0], data[0])])
    torch.testing.assert_close(
        predict(again, data[0])["output"], predict(models[0], data[0])["output"], atol=1e-3, rtol=1e-3
    )
    unused = again.state_dict()["unused.weight"]
    assert torch.equal(unused, models[0].unused.weight), "a layer that never runs"


def test_solving_on_what_really_comes_in_beats_each_layer_for_itself() -> None:
    models, data = make_pair()
    merged = merge(models, data)
    again = refit(merged, find_layers(merged), list(zip(models, data, strict=True)))
    assert measure_error(again, models, data) < 0.5 * measure_error(merged, models, data)


def test_norms_hold_the_statistics_of_what_passes_through_them() -> None:
    models, data = make_pair()
    merged = merge(models, data)
    again = refit(merged, find_layers(merged), list(zip(models, data, strict=True)))
    seen: list[Tensor] = []
    handle = again.get_submodule("mix").register_forward_hook(lambda _m, _a, y: seen.append(y))
    with torch.no_grad():
        again(torch.cat([inputs for (inputs,) in data]))
    handle.remove()
    norm = again.get_submodule("norm2")
    torch.testing.assert_close(norm.running_mean, seen[0].mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(norm.running_var, seen[0].var((0, 2, 3), correction=0), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("form", ["svd", "spatial"])
def test_factors_solved_on_the_way_beat_factors_of_the_finished_merge(form: str) -> None:
    models, data = make_pair()
    merged = merge(models, data)
    layers = find_layers(merged)
    teachers = list(zip(models, data, strict=True))
    dense = refit(merged, layers, teachers)
    pooled = (torch.cat([inputs for (inputs,) in data]),)
    metrics = {name: Metric(gram=gram) for name, gram in collect_grams(dense, pooled, layers).items()}
    analysis = analyse(dense, layers, metrics, "eigen")
    plan = {"mix": Factors(form=form, rank=3), "unused": Factors(rank=2)}  # type: ignore[arg-type]  # parametrized
    once = refit(dense, layers, teachers, plan, analysis.layers)
    assert isinstance(once.get_submodule("mix"), nn.Sequential)
    assert isinstance(once.get_submodule("unused"), nn.Sequential)
    from rankship_pipeline.factors.analysis import fill

    assert measure_error(once, models, data) < measure_error(fill(analysis, plan), models, data)
