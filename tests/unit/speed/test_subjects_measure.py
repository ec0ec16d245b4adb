"""What the subjects measure, on sizes of a moment; no test looks at a time."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from rankship_pipeline.models.layers import count_parameters
from rankship_pipeline.ranks.knapsack import solve
from speed import peers, whole
from speed.allocation import make_menus
from speed.growth import draw_growth, fit_slope
from speed.nets import SHAPES, Shape, make_inputs, make_net
from speed.ours import compress
from speed.records import Measured, make_figure
from speed.scenes import SCENES, Scene
from speed.stages import measure_calibration, measure_compression
from speed.timing import list_times, measure_peak, spend_in_turn


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet50", 25_557_032), ("vit-b16", 86_567_656), ("bert-base", 108_596_738)]
)
def test_the_full_shapes_have_their_models_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert count_parameters(make_net(SHAPES[name])) == parameters


@pytest.mark.parametrize("name", [name for name in SHAPES if name.endswith("small")])
def test_the_small_shapes_are_compressed_to_their_share(name: str) -> None:
    model, inputs = make_net(SHAPES[name]), make_inputs(SHAPES[name], 6)
    smaller = compress(model, inputs, 0.7)
    assert count_parameters(smaller) <= 0.7 * count_parameters(model)
    assert smaller(*inputs).shape == model(*inputs).shape


def test_a_stage_and_what_it_is_compared_with_give_their_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", Shape("bert", 32, (1,), tokens=8, words=50))
    calibration = measure_calibration(2, shape="tiny", samples=4)
    assert [len(one.samples) for one in calibration.figures if one.name.startswith("over_forward")] == [2, 2]
    names = {one.name for one in measure_compression(1, shape="tiny", samples=4).figures}
    assert {"ours_cpu_s", "numpy_svd_cpu_s", "over_numpy_svd", "peak_above_statistics_bytes"} <= names


def test_jobs_run_in_turn_and_ratios_are_those_of_a_round() -> None:
    order: list[str] = []
    spent = spend_in_turn({"ours": partial(order.append, "ours"), "other": partial(order.append, "other")}, 2)
    assert order == ["ours", "other"] * 2
    assert [one.name for one in list_times(spent, "ours")] == [
        "ours_cpu_s",
        "ours_wall_s",
        "other_cpu_s",
        "other_wall_s",
        "over_other",
        "over_other_wall",
    ]


def test_a_peak_counts_what_a_job_takes_for_a_while() -> None:
    assert measure_peak(lambda: bytearray(64 * 2**20)) == pytest.approx(64 * 2**20, rel=0.1)


def test_an_allocation_of_three_widths_is_solved_exactly() -> None:
    menus = make_menus(6, 8)
    limit = int(0.4 * sum(menu[-1].cost for menu in menus))
    solution = solve(menus, limit)
    assert {len(menu) for menu in menus} == {3 * 8 + 1}
    assert sum(menu[index].cost for menu, index in zip(menus, solution.picked, strict=True)) <= limit
    assert solution.error - solution.bound <= 1e-9 * max(option.error for menu in menus for option in menu)


def test_the_slope_of_a_power_is_its_exponent_and_is_drawn() -> None:
    sizes = [1e6, 1e7, 1e8]
    assert fit_slope(sizes, [size**1.2 for size in sizes]) == pytest.approx(1.2)
    figures = [make_figure("slope", "", [1.2])]
    figures += [make_figure(f"ours_cpu_s {size:.0f}", "s", [size**1.2 / 1e6]) for size in sizes]
    svg = draw_growth(Measured(figures=tuple(figures)))
    assert re.search("slope 1.20", svg)
    assert svg.startswith("<svg ")


def make_scene() -> Scene:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 32)).eval()
    rows = torch.randn(128, 48) @ torch.randn(48, 48) / 7
    wanted = model(rows[64:]).detach()

    def measure_error(other: nn.Module) -> float:
        with torch.inference_mode():
            return float((other(rows[64:]) - wanted).norm() / wanted.norm())

    return Scene(model, (rows[:64],), measure_error, "relative error")


@pytest.mark.parametrize("name", ["ours", "svd_llm"])
def test_methods_without_a_package_reach_the_share(name: str) -> None:
    scene = make_scene()
    smaller = peers.PEERS[name].compress(scene, 0.6)
    assert 0.5 < count_parameters(smaller) / count_parameters(scene.model) <= 0.61
    assert 0 < scene.rate(smaller) < 0.9


def test_peers_that_are_missing_or_fail_are_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCENES, "tiny", make_scene)
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "aimet_torch" else name)

    def run_apart(name: str, _scene: str, kept: float) -> peers.Outcome:
        if name == "tensorly":
            message = "no such rank"
            raise ValueError(message)
        return peers.Outcome(cpu_s=1.0, wall_s=1.0, peak_bytes=1, kept=kept, quality=1.0)

    monkeypatch.setattr(peers, "_run_apart", run_apart)
    measured = peers.measure_peers(2, scene="tiny", kept=0.5, peers="ours,aimet,tensorly")
    assert measured.left_out == {"aimet": "aimet_torch is not installed", "tensorly": "ValueError: no such rank"}
    assert {one.name.split("_")[0] for one in measured.figures} == {"ours"}
    assert {len(one.samples) for one in measured.figures} == {2}


def test_a_language_model_is_compressed_to_its_share_and_its_quality_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = SCENES["llama-shape"]()
    monkeypatch.setattr(whole, "open_smollm2", lambda _samples: replace(scene, rate=count_parameters))
    figures = {one.name: one for one in whole.measure_language_model(1, samples=16, kept=0.7).figures}
    outside = 2 * 256 * 64 + 5 * 64  # embedding, head and norms
    inside = count_parameters(scene.model) - outside
    assert 0.68 < (figures["ours_quality"].value - outside) / inside <= 0.7
    assert figures["quality_over_dense"].value == figures["ours_quality"].value / count_parameters(scene.model)
    assert len(figures["ours_cpu_s"].samples) == 1
