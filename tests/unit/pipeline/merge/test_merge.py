from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankship_pipeline.evaluate.calibrate import Grams
from rankship_pipeline.factors.decompose import decompose_eigen, decompose_plain, truncate
from rankship_pipeline.merge import Sources, merge_states
from rankship_pipeline.merge.grams import measure_interference, shrink_off_diagonal
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.models.weights import State
from rankship_pipeline.recipe.merge_methods import MergeMethod, fill_settings


@dataclass(frozen=True)
class Problem:
    """One layer of several models, each with the inputs that it was trained on."""

    weights: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]

    @property
    def layer(self) -> Layer:
        rows, columns = self.weights[0].shape
        return Layer(name="fc", rows=rows, columns=columns)

    @property
    def states(self) -> list[State]:
        return [{"fc.weight": W} for W in self.weights]

    @property
    def grams(self) -> list[Grams]:
        return [{"fc": X.T @ X} for X in self.inputs]

    @property
    def total_gram(self) -> Tensor:
        return torch.stack([X.T @ X for X in self.inputs]).sum(0)

    def merge(self, method: MergeMethod, **given: float) -> Tensor:
        sources = Sources(states=self.states, grams=self.grams, layers=[self.layer], base=self.states[0])
        return merge_states(method, sources, fill_settings(method, given))["fc.weight"]

    def measure_loss(self, W: Tensor) -> float:
        """The joint objective Σ_t ‖(W − W_t)X_tᵀ‖², straight from its definition."""
        pairs = zip(self.weights, self.inputs, strict=True)
        return sum(float(((W - W_t) @ X.T).square().sum()) for W_t, X in pairs)

    @property
    def scale(self) -> float:
        """The objective of the zero weight."""
        return self.measure_loss(torch.zeros_like(self.weights[0]))


def draw(seed: int, rows: int, columns: int, samples: int, models: int = 2, spread: float = 1) -> Problem:
    """Inputs of standard normal entries, their columns scaled by up to 10^±spread."""
    random = np.random.default_rng(seed)
    return Problem(
        weights=tuple(torch.tensor(random.normal(size=(rows, columns))) for _ in range(models)),
        inputs=tuple(
            torch.tensor(random.normal(size=(samples, columns)) * 10.0 ** random.uniform(-spread, spread, columns))
            for _ in range(models)
        ),
    )


problems = st.builds(
    draw, st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(1, 7), st.integers(1, 20), st.integers(1, 3)
)
# where the merge's small ridge is far below every eigenvalue of the Gram
well_conditioned = st.builds(
    draw, st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(1, 7), st.just(40), st.integers(1, 3), st.just(0)
)
# a problem with what the ridge may cost it, as a share of the zero weight's loss
cases = st.tuples(well_conditioned, st.just(1e-9)) | st.tuples(problems, st.just(1e-4))


@given(cases, st.integers(0, 2**32 - 1), st.floats(-3, 1))
def test_no_change_of_the_joint_merge_lowers_its_objective(
    case: tuple[Problem, float], seed: int, exponent: float
) -> None:
    problem, tolerance = case
    W = problem.merge("joint")
    change = torch.tensor(np.random.default_rng(seed).normal(size=W.shape)) * 10.0**exponent
    best = problem.measure_loss(W)
    for sign in (1, -1):
        assert problem.measure_loss(W + sign * change) >= best - tolerance * problem.scale


@given(well_conditioned)
def test_the_joint_merge_is_the_least_squares_solution(problem: Problem) -> None:
    X = np.concatenate([x.numpy() for x in problem.inputs])
    Y = np.concatenate([(x @ W.T).numpy() for W, x in zip(problem.weights, problem.inputs, strict=True)])
    solution = np.linalg.lstsq(X, Y, rcond=None)[0].T
    assert problem.measure_loss(problem.merge("joint")) == pytest.approx(
        problem.measure_loss(torch.tensor(solution)), abs=1e-9 * problem.scale
    )


@given(cases)
def test_joint_and_whitened_is_never_worse_than_average_then_svd_at_any_rank(case: tuple[Problem, float]) -> None:
    problem, tolerance = case
    joint = decompose_eigen(problem.merge("joint"), problem.total_gram)
    average = problem.merge("average")
    rivals = [decompose_plain(average, None), decompose_eigen(average, problem.total_gram)]
    for rank in range(1, min(average.shape) + 1):
        A, B = truncate(joint, rank)
        ours = problem.measure_loss(A @ B)
        for rival in rivals:
            A, B = truncate(rival, rank)
            assert ours <= problem.measure_loss(A @ B) + tolerance * problem.scale


@given(well_conditioned)
def test_the_loss_of_a_rank_is_interference_plus_the_tail(problem: Problem) -> None:
    """Loss(k) = the constant + Σ_{j>k} σ_j²."""
    W = problem.merge("joint")
    spectrum = decompose_eigen(W, problem.total_gram)
    share = measure_interference({"fc.weight": W}, problem.states, problem.grams, problem.layer)
    assert share * problem.scale == pytest.approx(problem.measure_loss(W), rel=1e-9, abs=1e-12 * problem.scale)
    for rank in range(1, min(W.shape) + 1):
        A, B = truncate(spectrum, rank)
        expected = problem.measure_loss(W) + float(spectrum.energy[rank:].sum())
        assert problem.measure_loss(A @ B) == pytest.approx(expected, abs=1e-5 * problem.scale)


@pytest.mark.parametrize("method", ["average", "joint", "regmean", "model-stock", "ties", "task-arithmetic"])
def test_merging_a_model_with_itself_changes_nothing(method: MergeMethod) -> None:
    problem = draw(0, 4, 5, 20, 1)
    twins = Problem(weights=problem.weights * 3, inputs=problem.inputs * 3)
    torch.testing.assert_close(twins.merge(method), problem.weights[0])
    share = measure_interference({"fc.weight": twins.merge(method)}, twins.states, twins.grams, twins.layer)
    assert share == pytest.approx(0, abs=1e-20)


def test_joint_beats_average_where_models_see_different_inputs() -> None:
    """Each model uses an input of its own: the joint merge serves both, the average halves both."""
    eye = torch.eye(2, dtype=torch.float64)
    problem = Problem(weights=(eye * 1, eye * 3), inputs=(eye[:1], eye[1:]))
    torch.testing.assert_close(problem.merge("joint"), torch.diag(torch.tensor([1.0, 3]).double()), rtol=1e-5, atol=0)
    torch.testing.assert_close(problem.merge("average"), 2 * eye)


@pytest.mark.parametrize("blank", [0, 1, 2])
def test_directions_that_no_data_excites_keep_the_average(blank: int) -> None:
    problem = draw(7, 4, 3, 20)
    for X in problem.inputs:
        X[:, blank] = 0
    torch.testing.assert_close(problem.merge("joint")[:, blank], problem.merge("average")[:, blank])


def test_no_data_at_all_gives_the_average() -> None:
    problem = draw(8, 4, 3, 20)
    for X in problem.inputs:
        X.zero_()
    torch.testing.assert_close(problem.merge("joint"), problem.merge("average"))
    assert measure_interference({"fc.weight": problem.weights[0]}, problem.states, problem.grams, problem.layer) == 0


def test_shrinking_off_diagonals_leaves_the_diagonal() -> None:
    gram = torch.tensor([[4.0, 2], [2, 8]])
    assert torch.equal(shrink_off_diagonal(gram, 1), gram)
    assert torch.equal(shrink_off_diagonal(gram, 0.5), torch.tensor([[4.0, 1], [1, 8]]))
    assert torch.equal(shrink_off_diagonal(gram, 0), torch.diag(torch.tensor([4.0, 8])))


def test_without_off_diagonals_the_joint_merge_is_a_mean_weighted_by_each_inputs_energy() -> None:
    problem = draw(9, 4, 3, 20)
    merged = problem.merge("joint", off_diagonal=0)
    energies = torch.stack([X.square().sum(0) for X in problem.inputs])  # (models, columns)
    expected = (torch.stack(problem.weights) * energies[:, None]).sum(0) / energies.sum(0)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def test_a_convolutions_weight_keeps_its_shape_and_type() -> None:
    random = np.random.default_rng(0)
    states = [{"c.weight": torch.tensor(random.normal(size=(3, 2, 2, 2)), dtype=torch.float32)} for _ in range(2)]
    X = torch.tensor(random.normal(size=(30, 8)))
    sources = Sources(states=states, grams=[{"c": X.T @ X}] * 2, layers=[Layer(name="c", rows=3, columns=8)])
    merged = merge_states("joint", sources, {"off_diagonal": 1})
    assert (merged["c.weight"].shape, merged["c.weight"].dtype) == ((3, 2, 2, 2), torch.float32)
    torch.testing.assert_close(merged["c.weight"], (states[0]["c.weight"] + states[1]["c.weight"]) / 2)


def test_an_embeddings_vectors_are_averaged_by_how_often_each_model_sees_the_token() -> None:
    layer = Layer(name="e", rows=2, columns=3, kind="embedding")
    tables = [torch.tensor([[0.0, 0], [1, 1], [2, 4]]), torch.tensor([[2.0, 2], [1, 1], [4, 0]])]
    counts = [torch.tensor([3.0, 5, 0]).double(), torch.tensor([1.0, 0, 0]).double()]
    states: list[State] = [{"e.weight": table} for table in tables]
    grams: list[Grams] = [{"e": one} for one in counts]
    merged = merge_states("joint", Sources(states=states, grams=grams, layers=[layer]), {"off_diagonal": 1})
    expected = torch.tensor([[0.5, 0.5], [1, 1], [3, 2]])  # a token that nobody sees keeps the average
    torch.testing.assert_close(merged["e.weight"], expected, rtol=1e-4, atol=1e-4)
    dense = Layer(name="e", rows=2, columns=3)
    turned: list[State] = [{"e.weight": table.T} for table in tables]
    full: list[Grams] = [{"e": one.diag()} for one in counts]
    assert measure_interference(merged, states, grams, layer) == pytest.approx(
        measure_interference({"e.weight": merged["e.weight"].T}, turned, full, dense)
    )


def test_tensors_outside_the_layers_are_averaged_and_integers_come_from_the_first() -> None:
    states: list[State] = [
        {"b": torch.tensor([1.0, 2.0]), "n": torch.tensor(5), "flags": torch.tensor([True, False])},
        {"b": torch.tensor([3.0, 6.0]), "n": torch.tensor(9), "flags": torch.tensor([False, False])},
    ]
    merged = merge_states("average", Sources(states=states), {})
    assert merged["b"].tolist() == [2.0, 4.0]
    assert merged["n"].item() == 5
    assert merged["flags"].tolist() == [True, False]
    merged["n"] += 1
    assert states[0]["n"].item() == 5  # no storage is shared with the sources
