"""Models of any outputs through every stage: units, several outputs, no labels, scores of one's own."""

from pathlib import Path

import torch
from torch import Tensor, nn

from rankship_pipeline.flow.landed_budget import settle_budget
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.flow.scores import Scores
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.quality import Fidelity, Score
from rankship_pipeline.foundation.records import RankPlan
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.models.data import Held, make_data
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import (
    DataChoice,
    ExportChoice,
    QualityChoice,
    Recipe,
    RefineChoice,
    Source,
    choose,
)

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
