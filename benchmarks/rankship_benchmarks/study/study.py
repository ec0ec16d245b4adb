"""A study: compression methods at several budgets on several models; each combination is a cell, kept as a JSON line.

    <results>/<study>/cells.jsonl

Each cell is keyed by all that it depends on, so an interrupted or changed study computes only what is missing. Models
whose data is missing are skipped with a note.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from rankship_benchmarks.study.choices import Row, Study, Subject
from rankship_benchmarks.study.effort import describe_conditions, watch_effort
from rankship_benchmarks.study.journal import append_line, cut_torn_line, read_lines
from rankship_pipeline.evaluate.accuracy import measure_accuracy, pool_accuracies
from rankship_pipeline.factors.analysis import analyse
from rankship_pipeline.flow.preflight import prepare, redraw
from rankship_pipeline.flow.prepared import Budgeted, Prepared
from rankship_pipeline.flow.scores import Scores
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import BudgetInfeasible, InputError
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.quality import Score
from rankship_pipeline.foundation.records import RankPlan
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.foundation.toolchain import hash_code
from rankship_pipeline.ranks.price import price_parameters
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import Recipe, RefineChoice
from rankship_pipeline.recipe.rules import read_recipe
from rankship_pipeline.recover.refine import refine

CELLS = "cells.jsonl"


@record
class Cell:
    """The result of one method on one model at one budget, with its conditions.

    `language` says that the model's answers are tokens, so that perplexity is its measure. `dense` is the merged model
    before it was compressed. If models were merged, `tasks` are the accuracies on every specialist's own test data and
    `specialists` those of the specialists themselves, if the loader provides such tests.

    `refine_steps` is how many steps fitted into `refine_cpu_seconds`; it depends on the machine's load.
    `seconds` (wall clock) and `cpu_seconds` cover factorising, allocating, filling and refining, but not calibration,
    which rows share. `peak_bytes` is the process's highest resident memory meanwhile.
    """

    key: str
    subject: str
    kept: float
    of: str
    row: str
    ours: bool
    seed: int
    plan: RankPlan
    size_bytes: int
    dense_parameters: int
    language: bool
    accuracy: Score
    dense: Score
    batchnorm_reestimated: bool
    refine_cpu_seconds: float
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    conditions: dict[str, str]
    tasks: tuple[Score, ...] = ()
    specialists: tuple[Score, ...] = ()
    refine_steps: int = 0


def read_cells(results: Path) -> list[Cell]:
    """Read all complete cells of a study's results."""
    return read_lines(Cell, results / CELLS)


def run_study(study: Study, folder: Path, results: Path, store: Store, steps: Steps) -> list[Cell]:
    """Compute every missing cell; returns all cells. `folder` is the study file's folder."""
    results.mkdir(parents=True, exist_ok=True)
    cut_torn_line(results / CELLS)
    known = {cell.key: cell for cell in read_cells(results)}
    torch.set_num_threads(study.threads)
    cells = []
    for subject in study.subjects:
        try:
            prepared = prepare_subject(subject, folder)
        except InputError as missing:
            steps.note(f"skipped {subject.recipe}: {missing}")
            continue
        for seed in study.seeds:
            bench = _Bench(subject, Stages(redraw(prepared, seed), store, steps), seed)
            for kept in subject.kept:
                for row in study.rows:
                    for seconds in row.list_refinements(kept):
                        key = bench.make_key(kept, row, seconds)
                        if key not in known:
                            try:
                                known[key] = bench.measure(key, kept, row, seconds)
                            except BudgetInfeasible as refused:
                                steps.note(f"no {row.way.name} at {kept:.3g}: {refused}")
                                continue
                            append_line(known[key], results / CELLS)
                        cells.append(known[key])
    return cells


@dataclass
class _Bench:
    """One model with one calibration subset, and what all rows share: the merged model and its accuracy."""

    subject: Subject
    stages: Stages
    seed: int

    def make_key(self, kept: float, row: Row, seconds: float) -> str:
        """Return the hash of all that a cell's numbers depend on, including our own code."""
        prepared = self.stages.prepared
        return digest(
            {
                "sources": prepared.source_sha256,
                "data": [prepared.calibration_sha256, prepared.test_sha256],
                "recipe": digest(prepared.recipe),
                "subject": [kept, self.subject.of, self.subject.exclude, self.subject.augment, self.subject.step_size],
                "way": digest(row.way),
                "seconds": seconds,
                "seed": self.seed,
                "code": hash_code(),
            }
        )

    def measure(self, key: str, kept: float, row: Row, seconds: float) -> Cell:
        """Compress with one row's method, settle batch-norm (as for every row), refine for `seconds`, and test."""
        stages, prepared = self.stages, self.stages.prepared
        budgeted = Budgeted(prepared, price_parameters(prepared.fixed_parameters), self._find_budget(kept))
        merged, interference = stages.merge(row.way.merge)
        (dense,) = Scores(stages).evaluate(merged, "merged")
        metrics, _ = stages.choose_metrics(merged, row.way)
        title = f"{prepared.recipe.name} {kept:.3g} seed {self.seed}: {row.way.name}{' refined' if seconds else ''}"
        with stages.steps.step(title):
            with watch_effort() as effort:
                analysis = analyse(merged.module, prepared.layers, metrics, row.way.whitening)
                module, plan = stages.make_compressed(budgeted, analysis, row.way, interference)
                module, reestimated = stages.settle(module)
                refine_steps = 0
                if seconds:
                    choice = RefineChoice(
                        cpu_seconds=seconds, augment=self.subject.augment, step_size=self.subject.step_size
                    )
                    module, refinement = refine(module, stages.list_teachers(), choice, self.seed)
                    refine_steps = refinement.steps
            tasks, accuracy = _test(module, prepared)
        return Cell(
            key=key,
            subject=prepared.recipe.name,
            kept=kept,
            of=self.subject.of,
            row=row.way.name,
            ours=row.ours,
            seed=self.seed,
            plan=plan,
            size_bytes=sum(tensor.nbytes for tensor in module.state_dict().values()),
            dense_parameters=prepared.dense_parameters,
            language=prepared.court.judging.kind == "language-model",
            accuracy=accuracy,
            dense=dense,
            batchnorm_reestimated=reestimated,
            refine_cpu_seconds=seconds,
            seconds=effort.seconds,
            cpu_seconds=effort.cpu_seconds,
            peak_bytes=effort.peak_bytes,
            conditions=describe_conditions(),
            tasks=tasks,
            specialists=self._test_specialists(),
            refine_steps=refine_steps,
        )

    def _test_specialists(self) -> tuple[Score, ...]:
        """Test each specialist on its own test data, if they share one backbone; else ()."""
        prepared = self.stages.prepared
        if not prepared.data.tasks:
            return ()
        return tuple(
            replace(one, stage=one.stage.removeprefix("source:")) for one in Scores(self.stages).evaluate_sources()
        )

    def _find_budget(self, kept: float) -> int:
        prepared = self.stages.prepared
        if self.subject.of == "model":
            return int(kept * prepared.dense_parameters)
        fixed = prepared.fixed_parameters
        return fixed + int(kept * (prepared.dense_parameters - fixed))


def _test(module: nn.Module, prepared: Prepared) -> tuple[tuple[Score, ...], Score]:
    """Return the score by task, if there are tasks with a head each, and over all tests."""
    data = prepared.data
    if not data.tasks:
        return (), prepared.court.score(module, data.test_inputs, data.labels, "test")
    tasks = tuple(measure_accuracy(module, *data.tests[name], stage=name) for name in data.tasks)
    return tasks, pool_accuracies(tasks, stage="test")


def prepare_subject(
    subject: Subject, folder: Path, change: Callable[[Recipe], Recipe] = lambda recipe: recipe
) -> Prepared:
    """Prepare the recipe with the subject's dense layers; its own budget is replaced in every cell."""
    path = folder / subject.recipe
    recipe = change(read_recipe(path))
    ranks = replace(recipe.ranks, exclude=(*recipe.ranks.exclude, *subject.exclude))
    return prepare(replace(recipe, ranks=ranks, budget=Budget(kept_parameters=1.0)), path.resolve().parent)
