"""Every merge method against a second way to the same numbers: by hand, by brute force, or by what must hold."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankship_pipeline.merge import MERGES, Sources, merge_states
from rankship_pipeline.merge.fisher import measure_fisher
from rankship_pipeline.merge.grams import proxy_gram
from rankship_pipeline.merge.sparse import find_largest
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.models.weights import State
from rankship_pipeline.recipe.merge_methods import METHODS, MergeMethod, check_count, check_settings, fill_settings

NAMES: tuple[MergeMethod, ...] = get_args(MergeMethod)
LAYER = Layer(name="fc", rows=6, columns=9)
CONVOLUTION = Layer(name="conv", rows=4, columns=12, kind="convolution", kernel=(2, 2))


def draw_states(seed: int, count: int, spread: float = 0.1) -> tuple[State, list[State]]:
    """A base and models near it: a linear layer, a convolution, a bias, a statistic and a counter."""
    random = np.random.default_rng(seed)
    shapes = {"fc.weight": (6, 9), "conv.weight": (4, 3, 2, 2), "fc.bias": (6,), "norm.running_var": (4,)}
    base: State = {name: torch.tensor(random.normal(size=shape)) for name, shape in shapes.items()}
    base["norm.running_var"] = base["norm.running_var"].abs() + 0.1
    models = [
        {name: value + spread * torch.tensor(random.normal(size=tuple(value.shape))) for name, value in base.items()}
        for _ in range(count)
    ]
    for model in models:
        model["norm.running_var"] = model["norm.running_var"].abs()
        model["steps"] = torch.tensor(7)
    return {**base, "steps": torch.tensor(0)}, models


def draw_sources(seed: int, count: int) -> Sources:
    base, states = draw_states(seed, count)
    random = np.random.default_rng(seed + 1)
    inputs = [
        {"fc": torch.tensor(random.normal(size=(40, 9))), "conv": torch.tensor(random.normal(size=(40, 12)))}
        for _ in range(count)
    ]
    grams = [{name: X.T @ X for name, X in one.items()} for one in inputs]
    fishers: list[State] = [
        {name: torch.tensor(random.uniform(size=tuple(base[name].shape))) for name in ("fc.weight", "fc.bias")}
        for _ in range(count)
    ]
    return Sources(states=states, base=base, layers=[LAYER, CONVOLUTION], grams=grams, fishers=fishers)


def merge(method: MergeMethod, sources: Sources, given: Mapping[str, float] | None = None, seed: int = 0) -> State:
    return merge_states(method, sources, fill_settings(method, given or {}), seed)


def merge_one(method: MergeMethod, base: Tensor, *models: Tensor, **given: float) -> Tensor:
    """A single linear layer's weight."""
    layer = Layer(name="fc", rows=base.shape[0], columns=base[0].numel()) if base.ndim > 1 else None
    states: list[State] = [{"fc.weight": one} for one in models]
    sources = Sources(states=states, base={"fc.weight": base}, layers=[layer] if layer else [])
    return merge(method, sources, given)["fc.weight"]


def count_models(method: MergeMethod) -> int:
    return 2 if method == "slerp" else 3


def test_every_name_has_a_function_and_needs() -> None:
    assert set(MERGES) == set(METHODS) == set(NAMES)


@pytest.mark.parametrize("method", NAMES)
def test_a_merge_keeps_shapes_types_and_integers_and_gives_the_same_bits_each_time(method: MergeMethod) -> None:
    sources = draw_sources(3, count_models(method))
    half = replace(sources, states=[{k: v.float() if v.ndim else v for k, v in s.items()} for s in sources.states])
    before = [{name: value.clone() for name, value in state.items()} for state in half.states]
    first, again = merge(method, half), merge(method, half)
    assert {name: (value.shape, value.dtype) for name, value in first.items()} == {
        name: (value.shape, value.dtype) for name, value in half.states[0].items()
    }
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(
        torch.equal(old[name], state[name]) for old, state in zip(before, half.states, strict=True) for name in old
    )
    assert first["steps"] == 7
    assert all(value.isfinite().all() for value in first.values())


@pytest.mark.parametrize("method", [name for name in NAMES if name not in {"dare", "della"}])
@given(order=st.permutations([0, 1, 2]), seed=st.integers(0, 2**32 - 2))
@settings(max_examples=8)
def test_the_order_of_the_models_does_not_matter(method: MergeMethod, order: list[int], seed: int) -> None:
    count = count_models(method)
    sources = draw_sources(seed, count)
    order = [index for index in order if index < count]
    turned = replace(
        sources,
        states=[sources.states[index] for index in order],
        grams=[sources.grams[index] for index in order],
        fishers=[sources.fishers[index] for index in order],
    )
    left, right = merge(method, sources), merge(method, turned)
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", NAMES)
def test_statistics_are_averaged_and_stay_positive(method: MergeMethod) -> None:
    sources = draw_sources(5, count_models(method))
    expected = torch.stack([state["norm.running_var"] for state in sources.states]).mean(0)
    given = {"scale": 10.0} if "scale" in METHODS[method].defaults else {}
    torch.testing.assert_close(merge(method, sources, given)["norm.running_var"], expected)


@pytest.mark.parametrize("method", ["wudi", "tsv-m", "iso-c", "knots", "ctm", "regmean", "joint"])
def test_methods_for_matrices_average_biases_and_see_a_convolution_as_a_matrix(method: MergeMethod) -> None:
    sources = draw_sources(6, 3)
    merged = merge(method, sources)
    torch.testing.assert_close(merged["fc.bias"], torch.stack([one["fc.bias"] for one in sources.states]).mean(0))
    flat = Sources(
        states=[{"conv.weight": one["conv.weight"].flatten(1)} for one in sources.states],
        base={"conv.weight": sources.base["conv.weight"].flatten(1)} if sources.base else None,
        layers=[Layer(name="conv", rows=4, columns=12)],
        grams=sources.grams,
    )
    torch.testing.assert_close(merged["conv.weight"].flatten(1), merge(method, flat)["conv.weight"])
    mean = torch.stack([one["conv.weight"] for one in sources.states]).mean(0)
    assert not torch.allclose(merged["conv.weight"], mean, rtol=1e-3)


def test_task_arithmetic_is_the_base_plus_scaled_changes() -> None:
    sources = draw_sources(7, 3)
    base = sources.base or {}
    for name in ("fc.weight", "fc.bias"):
        expected = base[name] + 0.3 * sum(one[name] - base[name] for one in sources.states)
        torch.testing.assert_close(merge("task-arithmetic", sources, {"scale": 0.3})[name], expected)


def test_slerp_has_the_models_at_its_ends_keeps_the_norm_and_cuts_the_angle() -> None:
    a, b = torch.tensor([[3.0, 0.0, 4.0]]).double(), torch.tensor([[0.0, 5.0, 0.0]]).double()
    torch.testing.assert_close(merge_one("slerp", a, a, b, position=0), a)
    torch.testing.assert_close(merge_one("slerp", a, a, b, position=1), b)
    third = merge_one("slerp", a, a, b, position=1 / 3)
    assert float(third.norm()) == pytest.approx(5)
    assert float((third * a).sum()) / 25 == pytest.approx(math.cos(math.radians(30)))
    torch.testing.assert_close(merge_one("slerp", a, a, 2 * a), 1.5 * a)  # no great circle between them
    torch.testing.assert_close(merge_one("slerp", a, a, 0 * a), 0.5 * a)


def test_model_stock_by_its_formula() -> None:
    base = torch.zeros(1, 3, dtype=torch.float64)
    x, y, z = torch.eye(3, dtype=torch.float64)[:, None]
    torch.testing.assert_close(merge_one("model-stock", base, x, y, z), base)  # orthogonal: cos 0, the base is kept
    torch.testing.assert_close(merge_one("model-stock", base, x, x, x), x)
    tilted = x + y  # 45° to x: t = 2·cos/(1 + cos)
    cosine = 1 / math.sqrt(2)
    expected = 2 * cosine / (1 + cosine) * (x + tilted) / 2
    torch.testing.assert_close(merge_one("model-stock", base, x, tilted), expected)
    torch.testing.assert_close(merge_one("model-stock", base, x, -x), base)


def test_ties_by_hand() -> None:
    base = torch.tensor([[1.0, 1, 1, 1, 1]]).double()
    changes = [[5.0, -4, 1, 0.1, 3], [-1.0, -6, 0.2, 4, 2], [0.3, 5, -2, 0.4, -9]]
    # two fifths of each are kept: [5, −4, ·, ·, ·], [·, −6, ·, 4, ·], [·, 5, ·, ·, −9]; the second column elects minus
    expected = base + torch.tensor([[5.0, -5, 0, 4, -9]]).double()
    models = [base + torch.tensor([one]).double() for one in changes]
    torch.testing.assert_close(merge_one("ties", base, *models, density=0.4), expected)
    torch.testing.assert_close(merge_one("ties", base, *models, density=0.4, scale=0.5), (base + expected) / 2)


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=40), st.data())
def test_the_edge_of_trimming_is_the_one_that_sorting_finds(numbers: list[int], data: st.DataObject) -> None:
    values = torch.tensor(numbers).double()
    place = data.draw(st.integers(1, len(numbers)))
    assert find_largest(values, place) == sorted(numbers, reverse=True)[place - 1]


@pytest.mark.parametrize("place", [1, 2, 1000, 700_000, 1_399_999, 1_400_000])
@pytest.mark.parametrize("levels", [3, 1_000_000])
def test_the_edge_among_very_many_is_exact_too(place: int, levels: int) -> None:
    values = torch.randint(0, levels, (1_400_000,), generator=torch.Generator().manual_seed(1)).float()
    assert find_largest(values, place) == float(values.sort(descending=True).values[place - 1])


def test_dare_drops_a_share_and_keeps_the_mean() -> None:
    base, change = torch.zeros(400, 500).double(), torch.full((400, 500), 2.0).double()
    merged = merge_one("dare", base, change, drop=0.9, scale=1)
    assert sorted(set(merged.flatten().tolist())) == pytest.approx([0, 20])
    assert float((merged == 0).double().mean()) == pytest.approx(0.9, abs=0.005)
    assert float(merged.mean()) == pytest.approx(2, rel=0.05)
    torch.testing.assert_close(merge_one("dare", base, change, drop=0, scale=1), change)


def test_della_drops_small_changes_likelier_and_keeps_the_mean() -> None:
    base = torch.zeros(600, 200).double()
    change = torch.linspace(1, 2, 200).double().expand(600, 200)
    merged = merge_one("della", base, change, drop=0.5, epsilon=0.4)
    dropped = (merged == 0).double().mean(0)
    expected = 0.5 - 0.2 + 0.4 * torch.arange(199, -1, -1) / 200  # the largest of a row stands last
    torch.testing.assert_close(dropped, expected.double(), rtol=0, atol=0.12)
    assert float(dropped[:20].mean() - dropped[-20:].mean()) == pytest.approx(0.36, abs=0.03)
    torch.testing.assert_close(merged.mean(0), change[0], rtol=0.35, atol=0)
    assert float(merged.mean()) == pytest.approx(1.5, rel=0.03)


@pytest.mark.parametrize("method", ["dare", "della"])
def test_chance_is_the_seeds_and_each_models_and_tensors_own(method: MergeMethod) -> None:
    sources = draw_sources(8, 3)
    one, same, other = (merge(method, sources, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one["fc.weight"], same["fc.weight"])
    assert not torch.equal(one["fc.weight"], other["fc.weight"])
    base, states = sources.base or {}, sources.states
    twins: list[State] = [{"a": states[0]["fc.weight"], "b": states[0]["fc.weight"]}]
    pair = merge(method, Sources(states=twins, base={"a": base["fc.weight"], "b": base["fc.weight"]}))
    assert not torch.equal(pair["a"], pair["b"])


def test_fisher_minimises_its_quadratic() -> None:
    """Σ_t F_t (θ − θ_t)² is smallest at the merge, and what no prediction moves is averaged."""
    sources = draw_sources(9, 3)
    merged = merge("fisher", sources)
    theta = merged["fc.weight"].clone().requires_grad_()
    loss = torch.stack(
        [
            (fisher["fc.weight"] * (theta - state["fc.weight"]).square()).sum()
            for fisher, state in zip(sources.fishers, sources.states, strict=True)
        ]
    ).sum()
    (gradient,) = torch.autograd.grad(loss, theta)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    blind = replace(sources, fishers=[{"fc.weight": torch.zeros(6, 9).double()}] * 3)
    mean = merge("average", sources)["fc.weight"]
    torch.testing.assert_close(merge("fisher", blind)["fc.weight"], mean)


def test_the_fisher_of_a_softmax_layer_is_the_closed_form() -> None:
    """For logits Wx + b: F = E_x p_c(1 − p_c)·x_i² for W and E_x p_c(1 − p_c) for b."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    model.requires_grad_(False)  # noqa: FBT003 - torch's name for it is positional
    x = torch.randn(11, 4).double()
    found = measure_fisher(model, (x,), samples=100)
    chances = model(x).softmax(-1)
    spread = chances * (1 - chances)
    torch.testing.assert_close(found["0.bias"], spread.mean(0))
    torch.testing.assert_close(found["0.weight"], torch.einsum("bc,bi->ci", spread, x.square()) / 11)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_regmean_minimises_its_objective_and_joint_is_regmean_with_whole_grams() -> None:
    sources = draw_sources(10, 3)
    for shrink in (1.0, 0.7):
        theta = merge("regmean", sources, {"off_diagonal": shrink})["fc.weight"].requires_grad_()
        loss = torch.zeros(()).double()
        for state, grams in zip(sources.states, sources.grams, strict=True):
            gram = shrink * grams["fc"] + (1 - shrink) * grams["fc"].diagonal().diag()
            change = theta - state["fc.weight"]
            loss = loss + (change @ gram * change).sum()
        (gradient,) = torch.autograd.grad(loss, theta)
        assert float(gradient.abs().max()) < 1e-3 * float(sources.grams[0]["fc"].abs().max())
    whole = merge("regmean", sources, {"off_diagonal": 1})
    torch.testing.assert_close(merge("joint", sources)["fc.weight"], whole["fc.weight"])
    assert fill_settings("regmean", {}) == {"off_diagonal": 0.9}


def test_wudi_minimises_its_loss_without_data() -> None:
    base, states = draw_states(11, 2)
    changes = [state["fc.weight"] - base["fc.weight"] for state in states]
    merged = merge_one("wudi", base["fc.weight"], *(state["fc.weight"] for state in states))
    delta = (merged - base["fc.weight"]).requires_grad_()
    loss = torch.stack([((delta - one) @ one.T).square().sum() / one.square().sum() for one in changes]).sum()
    (gradient,) = torch.autograd.grad(loss, delta)
    assert float(gradient.abs().max()) < 1e-9
    # where the models moved along directions of their own, each gets all of its change
    left, right = torch.zeros(4, 6).double(), torch.zeros(4, 6).double()
    left[:, :3], right[:, 3:] = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    torch.testing.assert_close(merge_one("wudi", torch.zeros(4, 6).double(), left, right), left + right)
    assert torch.equal(proxy_gram(torch.zeros(2, 3).double()), torch.zeros(3, 3).double())


def test_tsv_of_changes_in_directions_of_their_own_is_their_sum() -> None:
    """Each keeps r/T directions, orthonormal already: nothing is lost or turned."""
    base = torch.zeros(4, 4).double()
    left, right = base.clone(), base.clone()
    left[:2, :2], right[2:, 2:] = torch.randn(2, 2).double(), torch.randn(2, 2).double()
    torch.testing.assert_close(merge_one("tsv-m", base, left, right), left + right)


def test_tsv_has_the_concatenated_singular_values() -> None:
    """Û and V̂ are orthonormal, so the merged change has the kept σ as its own."""
    base, states = draw_states(12, 3)
    changes = [state["fc.weight"] - base["fc.weight"] for state in states]
    expected = torch.cat([torch.linalg.svdvals(one)[:2] for one in changes]).sort(descending=True).values
    merged = merge_one("tsv-m", base["fc.weight"], *(state["fc.weight"] for state in states))
    torch.testing.assert_close(torch.linalg.svdvals(merged - base["fc.weight"]), expected)


def test_iso_has_a_flat_spectrum_of_the_same_sum() -> None:
    base, states = draw_states(13, 3)
    weights = [state["fc.weight"] for state in states]
    total = sum((one - base["fc.weight"] for one in weights), torch.zeros(6, 9).double())
    merged = merge_one("iso-c", base["fc.weight"], *weights) - base["fc.weight"]
    torch.testing.assert_close(
        torch.linalg.svdvals(merged), torch.linalg.svdvals(total).mean().expand(6).contiguous(), rtol=1e-9, atol=0
    )
    assert float((merged * total).sum()) == pytest.approx(float(torch.linalg.svdvals(total).sum() ** 2 / 6))


@pytest.mark.parametrize("method", ["knots", "ctm"])
def test_adapters_merge_within_their_own_directions(method: MergeMethod) -> None:
    """Rank-2 changes of 6 × 9: the merge lies in the span of all; CtM's rank is the adapters' own."""
    random = torch.Generator().manual_seed(14)
    base = torch.randn(6, 9, generator=random).double()
    changes = [
        torch.randn(6, 2, generator=random).double() @ torch.randn(2, 9, generator=random).double() for _ in "ab"
    ]
    merged = merge_one(method, base, *(base + one for one in changes)) - base
    directions = torch.linalg.svd(torch.cat(changes, 1))[0][:, :4]
    torch.testing.assert_close(directions @ (directions.T @ merged), merged)
    rank = int(torch.linalg.matrix_rank(merged, atol=1e-6))
    assert rank == 2 if method == "ctm" else 2 <= rank <= 4
    once = merge_one(method, base, base + changes[0], density=1)
    torch.testing.assert_close(once - base, changes[0])  # one adapter, nothing trimmed: itself


def test_knots_of_one_direction_elects_in_its_coordinates() -> None:
    """Two adapters on one output direction: V's are merged by TIES, the direction stays."""
    base = torch.zeros(2, 3).double()
    first, second = torch.tensor([[3.0, 1, 0], [0, 0, 0]]).double(), torch.tensor([[1.0, -2, 0], [0, 0, 0]]).double()
    merged = merge_one("knots", base, first, second, density=1)
    torch.testing.assert_close(merged, torch.tensor([[2.0, -2, 0], [0, 0, 0]]).double())


@pytest.mark.parametrize(
    ("methods", "given", "has_base", "complaint"),
    [
        (["average"], {"scale": 0.3}, False, "merge.scale is not used by 'average': it belongs to task-a"),
        (["ties"], {}, False, "ties.* needs the base"),
        (["ties"], {"density": 1.2}, True, r"merge.density must lie in \[0, 1\], got 1.2"),
        (["ties"], {"density": 0}, True, "keeps nothing"),
        (["dare"], {"drop": 1.0}, True, r"merge.drop must lie in \[0, 1\), got 1.0"),
        (["della"], {"drop": 0.05}, True, "merge.drop ± merge.epsilon / 2 must lie in"),
        (["joint", "slerp"], {"core_rank": 4}, False, "merge.core_rank is not used by 'joint', 'slerp'"),
    ],
)
def test_keys_that_mean_nothing_are_refused(
    methods: list[MergeMethod],
    given: dict[str, float],
    has_base: bool,  # noqa: FBT001 - parametrised
    complaint: str,
) -> None:
    (found,) = check_settings([(name, name) for name in methods], given, has_base=has_base)
    assert re.search(complaint, found)


def test_keys_that_hold_for_any_merge_of_the_recipe_are_taken() -> None:
    assert check_settings([("merge", "joint"), ("row", "ties")], {"density": 0.3, "scale": 2}, has_base=True) == []
    assert check_count([("row", "slerp")], 3) == ["row: 'slerp' merges exactly two models, got 3"]
