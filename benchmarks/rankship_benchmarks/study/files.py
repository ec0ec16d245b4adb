"""Small files beside each other: each is made, run in its own runtime on this machine, and kept with its score.

    <results>/<study>/files.jsonl       a line for each file
    <results>/<study>/files/<key>.onnx  the files themselves, and the first test sample of each model

Ours are proven before they are scored. Each is made from the trained models alone, so that its seconds are whole.
"""

import importlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from rankship_benchmarks.costs.probes import prove
from rankship_benchmarks.measure.exam import set_whole_exam
from rankship_benchmarks.study.choices import FileRow, Study
from rankship_benchmarks.study.effort import Effort, describe_conditions, watch_effort
from rankship_benchmarks.study.journal import append_line, cut_torn_line, read_lines
from rankship_benchmarks.study.study import prepare_subject
from rankship_benchmarks.study.toolchains import TOOLCHAINS, Given
from rankship_pipeline.export import keep_stdout_clean
from rankship_pipeline.export.runner import Runner
from rankship_pipeline.flow.artifacts import Shipped, export_variants
from rankship_pipeline.flow.budget import check_budget, price_recipe
from rankship_pipeline.flow.cached_stage import Form, Kept, cached_stage
from rankship_pipeline.flow.preflight import redraw
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.flow.rounded import list_precisions, round_model
from rankship_pipeline.flow.scores import Scores
from rankship_pipeline.flow.stage_model import Model
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import BudgetInfeasible, InputError
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.formats import FACTS, Format
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.quality import Score
from rankship_pipeline.foundation.records import RankPlan
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.foundation.toolchain import find_version, hash_code, list_versions
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import Recipe, choose
from rankship_pipeline.recipe.export_choices import ExportChoice
from rankship_pipeline.recipe.precision import PrecisionChoice

T = TypeVar("T")

FILES, FOLDER = "files.jsonl", "files"
_SAMPLES = 300  # that toolchains have for ranges of activations: what nncf takes by itself
_TOLD = 200  # characters of another's error
_SHARED = {"source", "merged"}  # stages before any choice: read from the user's store


@record
class FileCell:
    """One file: what it is, how large, and how good its answers are in its own runtime.

    `smaller` is the size that was asked for; None for a file of one size. `weight_bytes` is what its plan counts: all
    weights with their scales; None for a toolchain's. `dense_bytes` is the float32 file of the dense model in the same
    format, `dense` that model's score in torch. `precision` is the type of fewest bits. `seconds` and `cpu_seconds`
    cover calibrating, choosing, rounding and exporting, not proving, running and imports of a toolchain.
    """

    key: str
    subject: str
    row: str
    ours: bool
    seed: int
    format: Format
    precision: Precision
    smaller: float | None
    plan: RankPlan | None
    weight_bytes: int | None
    size_bytes: int
    dense_bytes: int
    sha256: str
    accuracy: Score
    dense: Score
    language: bool
    runtime: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    conditions: dict[str, str]


def find_file(cell: FileCell, results: Path) -> Path:
    """Find a cell's file."""
    return results / FOLDER / f"{cell.key}.{FACTS[cell.format].suffix}"


def find_samples(cell: FileCell, results: Path) -> list[Path]:
    """Find the inputs of one sample, with which a file is timed."""
    return sorted((results / FOLDER).glob(f"{cell.subject}.*.npy"))


def read_files(results: Path) -> list[FileCell]:
    """Read all complete cells of a study's files."""
    return read_lines(FileCell, results / FILES)


def run_files(study: Study, folder: Path, results: Path, store: Store, steps: Steps, runner: Runner) -> list[FileCell]:
    """Make, run and score every file that is missing; returns all. `folder` is the study file's folder."""
    (results / FOLDER).mkdir(parents=True, exist_ok=True)
    cut_torn_line(results / FILES)
    known = {cell.key: cell for cell in read_files(results) if find_file(cell, results).is_file()}
    torch.set_num_threads(study.threads)
    rows, cells = _keep_installed(study.files, steps), []
    for subject in study.subjects:
        try:
            prepared = prepare_subject(subject, folder, _plan_files)
        except InputError as missing:
            steps.note(f"skipped {subject.recipe}: {missing}")
            continue
        if prepared.data.tasks:
            raise InputError(f"{subject.recipe} has tasks with heads of their own", hint="compare [[rows]] instead")
        for seed in study.seeds:
            bench = _Bench(redraw(prepared, seed), seed, store, steps, runner, results)
            for row in rows:
                for smaller in subject.smaller if row.is_sized else (None,):
                    key = bench.make_key(row, smaller)
                    if key not in known:
                        found = bench.try_row(key, row, smaller)
                        if found is None:
                            continue
                        known[key] = found
                        append_line(found, results / FILES)
                    cells.append(known[key])
    return cells


def _keep_installed(rows: tuple[FileRow, ...], steps: Steps) -> list[FileRow]:
    """Keep the rows whose toolchain is there, and say which is not."""
    found = []
    for row in rows:
        distribution = TOOLCHAINS[row.toolchain].distribution if row.toolchain else None
        if distribution is None or find_version(distribution):
            found.append(row)
        else:
            steps.note(f"no {row.name}: {distribution} is not installed")
    return found


def _name_version(row: FileRow) -> dict[str, str]:
    """Return the version of a row's toolchain, by its name among the conditions; empty for ours."""
    if row.toolchain is None:
        return {}
    name = TOOLCHAINS[row.toolchain].distribution
    return {f"version {name}": find_version(name) or ""}


def _plan_files(recipe: Recipe) -> Recipe:
    """A recipe as it is prepared for all rows: with weights that may be rounded, in a format that needs no more."""
    return replace(
        recipe,
        precision=PrecisionChoice(weights=("int8",), activations="float32"),
        export=ExportChoice(formats=("onnx",)),
    )


def _fit(prepared: Prepared, row: FileRow, smaller: float | None) -> Prepared:
    """The prepared recipe for one file: its format, types and size; without ranks only the types are chosen."""
    recipe = prepared.recipe
    ranks = recipe.ranks if row.ranks else replace(recipe.ranks, forms=())
    recipe = replace(
        recipe,
        precision=PrecisionChoice(weights=row.weights, activations=row.activations),
        export=ExportChoice(formats=(row.format,)),
        budget=Budget(size_bytes=int(4 * prepared.dense_parameters / (smaller or 1))),
        ranks=ranks,
    )
    return replace(prepared, recipe=recipe, recipe_sha256=digest(recipe))


@dataclass(frozen=True)
class _Made:
    """A file that was made, and what is known of it."""

    path: Path
    precision: Precision
    plan: RankPlan | None
    weight_bytes: int | None
    effort: Effort


@dataclass(frozen=True)
class _Bench:
    """One model with one calibration subset."""

    prepared: Prepared
    seed: int
    store: Store
    steps: Steps
    runner: Runner
    results: Path

    def make_key(self, row: FileRow, smaller: float | None) -> str:
        """Return the hash of all that a file and its score depend on."""
        prepared = self.prepared
        return digest(
            {
                "sources": prepared.source_sha256,
                "data": [prepared.calibration_sha256, prepared.test_sha256],
                "recipe": digest(prepared.recipe),
                "row": digest(row),
                "smaller": smaller,
                "seed": self.seed,
                "code": hash_code(),
                "versions": [list_versions(row.format), _name_version(row)],
            }
        )

    def try_row(self, key: str, row: FileRow, smaller: float | None) -> FileCell | None:
        """Make, run and score one file; None, and a line that says why, where it cannot be made."""
        size = "" if smaller is None else f" {smaller:g} times smaller"
        title = f"{self.prepared.recipe.name} seed {self.seed}: {row.name}{size}"
        try:
            with self.steps.step(title), tempfile.TemporaryDirectory() as folder:
                return self._measure(key, row, smaller, Path(folder))
        except (BudgetInfeasible, InputError) as refused:
            self.steps.note(f"no {title}: {refused}")
        except Exception as failure:
            if row.toolchain is None:
                raise
            self.steps.note(f"no {title}: {type(failure).__name__}: {str(failure)[:_TOLD]}")
        return None

    def _measure(self, key: str, row: FileRow, smaller: float | None, folder: Path) -> FileCell:
        prepared = _fit(self.prepared, row, smaller)
        stages = Stages(prepared, self.store, self.steps)
        merged, _ = stages.merge(prepared.recipe.merge.method)
        (dense,) = Scores(stages).evaluate(merged, "merged")
        bare = _fit(self.prepared, FileRow(name="dense", format=row.format), None)  # the same for all rows
        (plain,) = export_variants(bare, self.store, self.steps, [("dense", merged, None, None)])
        if row.toolchain is not None:
            made = self._round_by(row.toolchain, prepared, merged, folder)
        elif row.is_sized:
            made = self._compress(prepared, Store(folder))
        else:
            path, _, _ = prove(plain, self.store, self.runner, prepared.recipe.parity)
            made = _Made(path, "float32", None, 4 * prepared.dense_parameters, Effort())
        accuracy, runtime = self._score(made.path, row.format)
        cell = FileCell(
            key=key,
            subject=prepared.recipe.name,
            row=row.name,
            ours=row.ours,
            seed=self.seed,
            format=row.format,
            precision=made.precision,
            smaller=smaller,
            plan=made.plan,
            weight_bytes=made.weight_bytes,
            size_bytes=made.path.stat().st_size,
            dense_bytes=plain.size_bytes,
            sha256=hash_file(made.path),
            accuracy=accuracy,
            dense=dense,
            language=prepared.court.judging.kind == "language-model",
            runtime=runtime,
            seconds=made.effort.seconds,
            cpu_seconds=made.effort.cpu_seconds,
            peak_bytes=made.effort.peak_bytes,
            conditions={**describe_conditions(), **_name_version(row)},
        )
        shutil.copyfile(made.path, find_file(cell, self.results))
        for place, tensor in enumerate(prepared.data.test_inputs):
            np.save(self.results / FOLDER / f"{cell.subject}.{place}.npy", tensor[:1].contiguous().numpy())
        return cell

    def _compress(self, prepared: Prepared, own: Store) -> _Made:
        """Our file, made in a store of its own from the trained models on, and proven."""

        def keep(
            store: Store,
            kind: str,
            made_from: Mapping[str, object],
            form: Form[T],
            compute: Callable[[], T],
            /,
            *,
            steps: Steps | None = None,
            title: str = "",
        ) -> Kept[T]:
            where = store if kind in _SHARED else own
            return cached_stage(where, kind, made_from, form, compute, steps=steps, title=title)

        quiet = Steps(quiet=True)
        check_budget(prepared)
        with watch_effort() as effort:
            stages = Stages(prepared, self.store, quiet, keep)
            budgeted = price_recipe(prepared)
            model, plan = stages.compress(budgeted, choose(prepared.recipe))
            (precision,) = list_precisions(prepared.recipe, plan)
            shipped: Shipped = ("compressed", model, plan, None)
            if precision != "float32":
                rounded = round_model(stages, model, plan, precision)
                shipped = ("compressed", rounded.exported, plan, rounded.bits)
            (artifact,) = export_variants(prepared, own, quiet, [shipped])
        path, _, _ = prove(artifact, own, self.runner, prepared.recipe.parity)
        bytes_ = plan.total_cost if plan.unit == "bytes" else 4 * plan.total_parameters
        return _Made(path, precision, plan, bytes_, effort)

    def _round_by(self, toolchain: str, prepared: Prepared, merged: Model, folder: Path) -> _Made:
        """A toolchain's file of the dense model."""
        tool, judging = TOOLCHAINS[toolchain], prepared.court.judging
        importlib.import_module(tool.module)
        path = folder / f"model.{FACTS[tool.format].suffix}"
        given = Given(
            module=merged.module,
            samples=tuple(one[:_SAMPLES] for one in prepared.data.pool_calibration()),
            outputs=() if len(judging.outputs) == 1 and judging.bare else judging.outputs,
            activations=prepared.activations,
        )
        with watch_effort() as effort, keep_stdout_clean():
            tool.write(given, path)
        return _Made(path, "int8", None, None, effort)

    def _score(self, path: Path, format_: Format) -> tuple[Score, str]:
        """The score of a file's answers to all test inputs, and the name and version of what ran it."""
        exam = set_whole_exam(self.prepared)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            inputs = [folder / f"input.{place}.npy" for place in range(len(exam.inputs))]
            for place, tensor in zip(inputs, exam.inputs, strict=True):
                np.save(place, tensor.contiguous().numpy())
            found = self.runner.run(format_, path, inputs, folder)
            outputs = [torch.from_numpy(np.load(one, allow_pickle=False)) for one in found.outputs]
        return exam.score(outputs, "file"), f"{found.runtime} {found.runtime_version}"
