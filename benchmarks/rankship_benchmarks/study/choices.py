"""What a study file says: subjects, the rows of its table, and how often."""

from pathlib import Path

from rankship_benchmarks.study.toolchains import TOOLCHAINS
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.codec import read_toml
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.recipe.choices import Augmentation, Comparison
from rankship_pipeline.recipe.precision import Activations
from rankship_pipeline.recipe.rules import check_way


@record
class Subject:
    """A recipe's models at some budgets: shares `kept` of the whole model, or of its factorable layers `of` "layers".

    For rows of files, `smaller` says how many times fewer bytes all weights take with their scales than in float32.
    `exclude` keeps more layers dense than the recipe does. `augment` and `step_size` are those of refinement (see
    choices.RefineChoice).
    """

    recipe: str
    kept: tuple[float, ...] = ()
    smaller: tuple[float, ...] = ()
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
class FileRow:
    """A way to a small file, which is run in its own runtime: ours, or the dense model rounded by a `toolchain`.

    Ours takes every size of `smaller`: each layer's type is one of `weights` and, unless `ranks` is false, its ranks
    are chosen too, as the recipe says. A toolchain has the size that it has. With `weights = ["float32"]` and without
    `ranks` it is the dense model itself, in one size.
    """

    name: str
    format: Format = "onnx"
    activations: Activations = "auto"
    toolchain: str | None = None
    weights: tuple[Precision, ...] = ("float32",)
    ranks: bool = True
    ours: bool = False

    @property
    def is_sized(self) -> bool:
        """Whether it takes the sizes of the subject."""
        return self.toolchain is None and (self.ranks or self.weights != ("float32",))


@record
class Study:
    """A study: subjects × budgets × rows × seeds; each seed draws another calibration subset.

    It has rows of methods, whose parameters are counted, or of `files`, whose bytes are; these are timed in as many
    interleaved `rounds`.
    """

    name: str
    subjects: tuple[Subject, ...]
    rows: tuple[Row, ...] = ()
    files: tuple[FileRow, ...] = ()
    seeds: tuple[int, ...] = (0,)
    threads: int = 1
    rounds: int = 0


def read_study(path: Path) -> Study:
    """Read and check a study file."""
    study = read_toml(Study, path, "study")
    complaints = [one for row in study.rows for one in check_way(row.way, f"row {row.way.name!r}")]
    complaints += [one for row in study.files for one in _check_file(row)]
    if bool(study.rows) == bool(study.files):
        complaints.append("a study has [[rows]] or [[files]], one of the two")
    for subject in study.subjects:
        if subject.of not in {"model", "layers"}:
            complaints.append(f'subject {subject.recipe}: of = {subject.of!r}, it is "model" or "layers"')
        if bool(study.rows) != bool(subject.kept) or bool(study.files) != bool(subject.smaller):
            complaints.append(f"subject {subject.recipe}: [[rows]] need kept, [[files]] need smaller")
        if any(one < 1 for one in subject.smaller):
            complaints.append(f"subject {subject.recipe}: smaller is 1 or more")
    if complaints:
        raise InputError(f"{path}: " + "; ".join(complaints), hint="correct the study and run again")
    return study


def _check_file(row: FileRow) -> list[str]:
    """List what is wrong with a row of files."""
    where = f"file {row.name!r}"
    if row.toolchain is None:
        return [] if row.weights else [f"{where}: weights is empty"]
    if row.toolchain not in TOOLCHAINS:
        return [f"{where}: toolchain = {row.toolchain!r}, it is one of {', '.join(TOOLCHAINS)}"]
    own = TOOLCHAINS[row.toolchain].format
    return [] if row.format == own else [f"{where}: {row.toolchain} writes {own}"]
