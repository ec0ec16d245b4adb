"""Models of any outputs through every stage: units, several outputs, no labels, scores of one's own."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.flow.judging import find_judging
from rankship_pipeline.flow.landed_budget import settle_budget
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.flow.scores import Scores
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.quality import Fidelity, Score
from rankship_pipeline.foundation.records import RankPlan
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.models.data import Held, make_data
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import DataChoice, QualityChoice, Recipe, RefineChoice, Source, choose
from rankship_pipeline.recipe.export_choices import ExportChoice

UNITS = torch.tensor([1.0, 1e3, 1e-3] * 8)


def make_regression(units: Tensor) -> nn.Module:
    """A network of 24 targets whose last layer is factored, too."""
    torch.manual_seed(0)
    last = nn.Linear(64, 24)
    net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), last).eval()
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Linear):  # a falling spectrum, as trained weights have
                U, sigma, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
                layer.weight.copy_((U * sigma * 0.8 ** torch.arange(len(sigma))) @ Vh * 3)
        last.weight.mul_(units[:, None])
        last.bias.mul_(units)
    return net


def run(
    folder: Path,
    model: nn.Module,
    labels: Tensor | None = None,
    quality: QualityChoice | None = None,
    refine: RefineChoice | None = None,
) -> tuple[RankPlan, list[Score], Fidelity, nn.Module, Tensor]:
    """Compress a model of 16 inputs, score it, and compare it with what it was."""
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
    recipe = Recipe(
        name="any",
        models=(Source(name="a", held=True),),
        data=DataChoice(held=True),
        budget=Budget(kept_parameters=0.5),
        export=ExportChoice(formats=()),
        quality=quality or QualityChoice(),
        refine=refine,
    )
    given = {"calibration": {"a": x}, "test_inputs": x, "test_labels": labels}
    prepared = prepare(recipe, folder, Held({"a": model}, make_data(given, recipe, "the call")))
    stages = Stages(prepared, Store(folder / "store"), Steps(quiet=True))
    compressed, plan = stages.compress(settle_budget(prepared, stages.store), choose(recipe))
    if refine is not None:
        compressed, _ = stages.refine(compressed, plan, refine)
    scores = Scores(stages)
    (fidelity,) = scores.judge(compressed, "compressed")
    return plan, scores.evaluate(compressed, "compressed"), fidelity, compressed.module, x


def test_targets_in_different_units_are_compressed_as_well_as_in_equal_ones(tmp_path: Path) -> None:
    plans, errors = [], []
    for number, units in enumerate((torch.ones(24), UNITS)):
        net = make_regression(units)
        with torch.no_grad():
            x = torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
            labels = net(x)
        plan, (score,), fidelity, small, _ = run(tmp_path / str(number), net, labels)
        with torch.no_grad():
            errors.append((small(x) - labels).square().mean(0).sqrt() / labels.std(0))
        plans.append(plan)
        assert score.measure.name == "R²"
        assert (fidelity.agreement, fidelity.answers) == (None, 400)
        assert 0 < (fidelity.relative_error or 0) < 1
    assert "4" in plans[0].factors, "the layer whose rows have units is factored"
    assert plans[0].factors == plans[1].factors
    torch.testing.assert_close(errors[0], errors[1], rtol=0.05, atol=1e-4)


class Two(nn.Module):
    """Scores of five classes, and three numbers, one of them in thousands; and what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.rest = nn.Linear(16, 64), nn.Linear(64, 64)
        self.classes, self.sizes = nn.Linear(64, 5), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> dict[str, object]:
        y = self.rest(self.body(x).tanh()).tanh()
        whole = y.mean(0, keepdim=True)  # one row for all samples
        return {"classes": self.classes(y), "sizes": self.sizes(y) * 1000, "whole": whole, "cache": None, "steps": 1}


def test_a_model_of_several_outputs_is_judged_by_the_one_that_labels_fit(tmp_path: Path) -> None:
    labels = torch.arange(400) % 5
    _, (score,), fidelity, _, _ = run(tmp_path, Two().eval(), labels)
    assert (score.measure.name, score.samples) == ("accuracy", 400)
    assert fidelity.agreement is not None
    numbers = torch.randn(400, 3)
    _, (other,), _, _, _ = run(tmp_path, Two().eval(), numbers)
    assert other.measure.name == "R²"


def test_refining_brings_numbers_of_any_unit_nearer_to_the_dense_models(tmp_path: Path) -> None:
    net = make_regression(UNITS)
    *_, before, _, _ = run(tmp_path, net)
    *_, after, _, _ = run(tmp_path, net, refine=RefineChoice(steps=150, step_size=3e-3))
    assert before.agreement is after.agreement is None
    assert (after.relative_error or 1) < 0.9 * (before.relative_error or 0)


def test_a_score_of_ones_own_is_a_function_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def worst_error(outputs, labels):\n    return (outputs - labels).abs().max()\n")
    choice = QualityChoice(function="own.py:worst_error", lower_is_better=True)
    net, labels = make_regression(torch.ones(24)), torch.zeros(400, 24)
    _, (score,), _, small, x = run(tmp_path, net, labels, choice)
    assert (score.measure.name, score.measure.higher_is_better) == ("worst error", False)
    with torch.no_grad():
        assert score.value == pytest.approx(float(small(x).abs().max()), rel=1e-5)
    (tmp_path / "own.py").write_text("def worst_error(outputs, labels):\n    return -1.0\n")
    assert run(tmp_path, net, labels, choice)[1][0].value == -1, "the file is part of what the score is made from"


class Boxes(nn.Module):
    """A detector: one dictionary for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [{"boxes": row.view(1, 4)} for row in self.body(x)]


def test_outputs_whose_parts_depend_on_the_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="returns a list whose parts depend on the number of samples"):
        run(tmp_path, Boxes().eval())


@pytest.mark.parametrize(("last", "family"), [(nn.Sigmoid(), "binary probabilities"), (nn.Identity(), "binary logits")])
def test_a_small_number_is_no_probability(last: nn.Module, family: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1), last).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.abs_().mul_(0.01)  # untrained, all outputs are small and positive
    x, labels = torch.rand(40, 16), torch.arange(40) % 2
    recipe = Recipe(name="any", models=(Source(name="a", held=True),), data=DataChoice(held=True))
    data = make_data({"calibration": {"a": x}, "test_inputs": x, "test_labels": labels}, recipe, "the call")
    assert find_judging(recipe, net, data).answer.family == family


class Words(nn.Module):
    """A language model by hand, or the features of one."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(40, width), nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.head(self.table(tokens))
        return scores


class Remembering(Words):
    """One that keeps what it computed at its first call."""

    turns: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        if self.turns is None:
            self.turns = torch.arange(16.0).cos()
        scores: Tensor = self.head(self.table(tokens) * self.turns)
        return scores


class Forecast(Words):
    """Numbers for each of the next 40 hours from the hours of 6."""

    def forward(self, tokens: Tensor) -> Tensor:
        hours: Tensor = self.head(self.table(tokens))[:, :3]
        return hours


@pytest.mark.parametrize(
    ("width", "outputs", "family"), [(16, 40, "logits"), (16, 32, "values"), (48, 40, "values")], ids=str
)
def test_as_many_numbers_for_each_token_as_there_are_words_are_their_scores(
    width: int, outputs: int, family: str
) -> None:
    tokens = torch.randint(0, 40, (12, 6), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(name="any", models=(Source(name="a", held=True),), data=DataChoice(held=True))
    data = make_data({"calibration": {"a": tokens}, "test_inputs": tokens}, recipe, "the call")
    judging = find_judging(recipe, Words(width, outputs).eval(), data)
    assert (judging.answer.family, judging.kind) == (family, "fidelity")
    assert find_judging(recipe, Remembering(16, 40).eval(), data).answer.family == "logits"
    assert find_judging(recipe, Forecast(16, 40).eval(), data).answer.family == "values", "no row for each token"
