"""A study: compression methods at several budgets on several models; each combination is a cell, kept as a JSON line.

    <results>/<study>/cells.jsonl

Each cell is keyed by all that it depends on, so an interrupted or changed study computes only what is missing. Models
whose data is missing are skipped with a note.
"""

import os
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import nn

from rankship_pipeline import __version__
from rankship_pipeline.evaluate.accuracy import measure_accuracy, pool_accuracies
from rankship_pipeline.factors.analysis import analyse
from rankship_pipeline.flow.preflight import prepare, redraw
from rankship_pipeline.flow.prepared import Budgeted, Prepared
from rankship_pipeline.flow.scores import Scores
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.codec import decode, digest, encode, read_toml
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import BudgetInfeasible, InputError
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.quality import Score
from rankship_pipeline.foundation.records import RankPlan
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.foundation.toolchain import hash_code, list_versions
from rankship_pipeline.ranks.price import price_parameters
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import Augmentation, Comparison, RefineChoice
from rankship_pipeline.recipe.rules import check_way, read_recipe
from rankship_pipeline.recover.refine import refine

CELLS = "cells.jsonl"


@record
class Subject:
    """A recipe's models at some budgets: shares `kept` of the whole model, or of its factorable layers `of` "layers".

    `exclude` keeps more layers dense than the recipe does. `augment` and `step_size` are those of refinement (see
    choices.RefineChoice).
    """

    recipe: str
    kept: tuple[float, ...]
    of: str = "model"
    exclude: tuple[str, ...] = ()
    augment: Augmentation = "none"
    step_size: float = 3e-3


@record
class Row:
    """One method; `refine_cpu_seconds` of label-free training follow it and are reported as a separate row.

    With `refine_at`, only at these shares kept, because training is slow.
    """

    way: Comparison
    ours: bool = False
    refine_cpu_seconds: float = 0.0
    refine_at: tuple[float, ...] | None = None

    def list_refinements(self, kept: float) -> tuple[float, ...]:
        """List the seconds of refinement to report at a budget: 0, then the row's own."""
        trained = self.refine_cpu_seconds if self.refine_at is None or kept in self.refine_at else 0.0
        return (0.0, trained) if trained else (0.0,)


@record
class Study:
    """A study: subjects × budgets × rows × seeds; each seed draws another calibration subset."""

    name: str
    subjects: tuple[Subject, ...]
    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (0,)
    threads: int = 1


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


def read_study(path: Path) -> Study:
    """Read and check a study file."""
    study = read_toml(Study, path, "study")
    for subject in study.subjects:
        if subject.of not in {"model", "layers"}:
            raise InputError(f"{path}: subject {subject.recipe}: of = {subject.of!r}", hint='of is "model" or "layers"')
    complaints = [one for row in study.rows for one in check_way(row.way, f"row {row.way.name!r}")]
    if complaints:
        raise InputError(f"{path}: " + "; ".join(complaints), hint="correct the study and run again")
    return study


def read_cells(folder: Path) -> list[Cell]:
    """Read all complete lines of a study's results; a partial last line of an interruption is left out."""
    path = folder / CELLS
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    return [decode(Cell, line, where=str(path)) for line in lines[:-1] if line]


def run_study(study: Study, folder: Path, results: Path, store: Store, steps: Steps) -> list[Cell]:
    """Compute every missing cell; returns all cells. `folder` is the study file's folder."""
    results.mkdir(parents=True, exist_ok=True)
    _cut_torn_line(results / CELLS)
    known = {cell.key: cell for cell in read_cells(results)}
    torch.set_num_threads(study.threads)
    cells = []
    for subject in study.subjects:
        try:
            prepared = _prepare(subject, folder)
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
                            with (results / CELLS).open("ab") as stream:
                                stream.write(encode(known[key]).encode() + b"\n")
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
            _reset_peak()
            start, begun = time.monotonic(), time.process_time()
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
            took, worked, peak = time.monotonic() - start, time.process_time() - begun, _read_peak()
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
            seconds=took,
            cpu_seconds=worked,
            peak_bytes=peak,
            conditions=_describe_conditions(),
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


def _prepare(subject: Subject, folder: Path) -> Prepared:
    """Prepare the recipe with the subject's dense layers; its own budget is replaced in every cell."""
    path = folder / subject.recipe
    recipe = read_recipe(path)
    ranks = replace(recipe.ranks, exclude=(*recipe.ranks.exclude, *subject.exclude))
    return prepare(replace(recipe, ranks=ranks, budget=Budget(kept_parameters=1.0)), path.resolve().parent)


def _cut_torn_line(path: Path) -> None:
    """Cut off the partial last line of a killed writer, so that the next line starts clean."""
    if path.is_file():
        whole = path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            write_atomic(path, whole[:end])


def _reset_peak() -> None:
    """Reset the kernel's peak of resident memory to what is resident now (proc(5), clear_refs)."""
    mark = Path("/proc/self/clear_refs")
    if not mark.exists():
        raise InputError("a study records its peak memory, which this system does not show", hint="run it on Linux")
    mark.write_text("5", encoding="ascii")


def _read_peak() -> int:
    """Return the peak of resident memory (VmHWM) in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def _describe_conditions() -> dict[str, str]:
    return {
        "rankship": __version__,
        "code": hash_code(),
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "load before": f"{psutil.getloadavg()[0]:.1f}",
        **{f"version {name}": version for name, version in list_versions().items()},
    }
