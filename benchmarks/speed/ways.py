"""Rows of a study with all costs counted, calibration too: seconds and quality of several ways in one run."""

import tempfile
from dataclasses import replace
from pathlib import Path

from rankship_benchmarks.study.choices import Study, Subject, read_study
from rankship_pipeline.factors.analysis import analyse
from rankship_pipeline.flow.preflight import prepare, redraw
from rankship_pipeline.flow.prepared import Budgeted, Prepared
from rankship_pipeline.flow.scores import Scores
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.ranks.price import price_parameters
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import Comparison
from rankship_pipeline.recipe.rules import read_recipe
from speed.records import ROOT, Figure, Measured, make_figure
from speed.timing import CPU_EFFECT, spend

STUDIES = ROOT / "benchmarks/studies"
DENSE, OURS = "dense", "Rankship"


def measure_ways(rounds: int, *, study: str, recipe: str, kept: float, ways: str) -> Measured:
    """Take each way of a study from the trained model to a compressed one; `rounds` are its calibration subsets.

    `ways` are names of the study's rows, separated by semicolons. Where they are "uniform, whitened" and others, the
    share of the loss that uniform adds and a way removes is a figure too; every way's seconds over Rankship's as well.
    """
    plan = read_study(STUDIES / f"{study}.toml")
    subject = next(one for one in plan.subjects if one.recipe == f"{recipe}.toml")
    whole = _prepare(subject)
    names = ways.split(";")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    scores: dict[str, list[float]] = {name: [] for name in (DENSE, *names)}
    unit = ""
    for seed in range(rounds):
        prepared = redraw(whole, seed)
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                run = _Run(prepared, Stages(prepared, Store(Path(folder)), Steps(quiet=True)), subject, kept)
                seconds[name].append(run.compress(_find_way(plan, name)))
                dense, score, unit = run.score()
            scores[name].append(score)
        scores[DENSE].append(dense)
    return Measured(
        figures=tuple(_list_figures(seconds, scores, unit)),
        parameters={"study": study, "recipe": recipe, "kept": str(kept), "of": subject.of},
    )


class _Run:
    """One way on one calibration subset, with an empty store."""

    def __init__(self, prepared: Prepared, stages: Stages, subject: Subject, kept: float) -> None:
        fixed, dense = prepared.fixed_parameters, prepared.dense_parameters
        budget = int(kept * dense) if subject.of == "model" else fixed + int(kept * (dense - fixed))
        self.prepared, self.stages = prepared, stages
        self.budgeted = Budgeted(prepared, price_parameters(fixed), budget)

    def compress(self, way: Comparison) -> float:
        """Compress and return the CPU seconds: of merging, which calibrates, of calibrating and all that follows."""

        def work() -> None:
            self.merged, interference = self.stages.merge(way.merge)
            metrics, _ = self.stages.choose_metrics(self.merged, way)
            analysis = analyse(self.merged.module, self.prepared.layers, metrics, way.whitening)
            module, _ = self.stages.make_compressed(self.budgeted, analysis, way, interference)
            self.module, _ = self.stages.settle(module)

        return spend(work).cpu_s

    def score(self) -> tuple[float, float, str]:
        """Return the dense model's score and the compressed one's, and their unit."""
        data = self.prepared.data
        (dense,) = Scores(self.stages).evaluate(self.merged, "merged")
        mine = self.prepared.court.score(self.module, data.test_inputs, data.labels, "test")
        scale = mine.measure.scale
        return scale(dense.value), scale(mine.value), mine.measure.unit or mine.measure.name


def _prepare(subject: Subject) -> Prepared:
    path = STUDIES / subject.recipe
    recipe = read_recipe(path)
    ranks = replace(recipe.ranks, exclude=(*recipe.ranks.exclude, *subject.exclude))
    return prepare(replace(recipe, ranks=ranks, budget=Budget(kept_parameters=1.0)), path.parent)


def _find_way(plan: Study, name: str) -> Comparison:
    for row in plan.rows:
        if row.way.name == name:
            return row.way
    known = "; ".join(row.way.name for row in plan.rows)
    raise InputError(f"the study {plan.name} has no row {name!r}", hint=f"it has {known}")


def _list_figures(seconds: dict[str, list[float]], scores: dict[str, list[float]], unit: str) -> list[Figure]:
    figures = [make_figure(f"{name}_quality", unit, values) for name, values in scores.items()]
    for name, values in seconds.items():
        figures.append(make_figure(f"{name}_cpu_s", "s", values, CPU_EFFECT if name == OURS else None))
        if name != OURS and OURS in seconds:
            shares = [mine / max(other, 1e-9) for mine, other in zip(seconds[OURS], values, strict=True)]
            figures.append(make_figure(f"over_{name}", "×, CPU", shares))
    uniform = scores.get("uniform, whitened")
    if uniform and OURS in scores:
        removed = [
            100 * (high - mine) / (high - dense)
            for high, mine, dense in zip(uniform, scores[OURS], scores[DENSE], strict=True)
        ]
        figures.append(make_figure("removed", "% of what uniform adds", removed))
    return figures
