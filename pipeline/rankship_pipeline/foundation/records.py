"""Records that rooms pass to each other: frozen, with units in the names of numbers; `None` means "not measured"."""

from html import escape
from typing import Literal

from rankship_pipeline.foundation.artifact_key import WHOLE, ArtifactKey, Precision
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.generation import Generation
from rankship_pipeline.foundation.landing import Landing
from rankship_pipeline.foundation.quality import ACCURACY, Fidelity, Measure, Score
from rankship_pipeline.foundation.units import show_count, show_percent

Form = Literal["svd", "spatial", "tucker", "width"]
CostUnit = Literal["parameters", "bytes", "flops", "ns", "uj"]  # of one sample, the last two measured on a device
Answers = Literal["labels", "predictions"]  # what counts as right: true labels, or the dense model's predictions


@record
class Dimension:
    """A dimension whose length may vary between `low` and `high`, both included.

    `example` is the length with which the file is timed.
    """

    name: str
    low: int
    high: int
    example: int | None = None


@record
class TensorSpec:
    """One input or output of an artifact; `shape` has the batch dimension first, `dtype` is numpy's name.

    `classes_axis` is the axis of an output that holds classes' scores; None for any other tensor.
    """

    name: str
    shape: tuple[int | Dimension, ...]
    dtype: str
    classes_axis: int | None = None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether this specification allows a tensor of this shape."""
        return len(shape) == len(self.shape) and all(
            side.low <= one <= side.high if isinstance(side, Dimension) else one == side
            for one, side in zip(shape, self.shape, strict=True)
        )


@record
class Artifact:
    """One exported file and everything that made it.

    `outputs` are in the order in which the runtime returns them. `parameters` counts every trainable parameter of the
    torch module in it (embeddings, norms, biases, heads); `factored_layers` are the layers stored as chains of smaller
    operators, by their torch names. Of rounded weights, `rounding_error` and `rounding_cosine` say how far rounding
    activations moves torch's outputs at all, in the measures of `Verified`; None for other files. Of those that
    generate, `rounding_agreement` is the share of likeliest tokens that stay.
    """

    key: ArtifactKey
    file: str
    size_bytes: int
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: int
    factored_layers: tuple[str, ...]
    recipe_sha256: str
    source_sha256: dict[str, str]
    toolchain: dict[str, str]
    rounding_error: float | None = None
    rounding_cosine: float | None = None
    rounding_agreement: float | None = None
    generation: Generation | None = None

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """The lengths of its inputs that may vary."""
        return tuple(dict.fromkeys(side for spec in self.inputs for side in spec.shape if isinstance(side, Dimension)))


@record
class Verified:
    """Proof that one artifact computes the torch model's function, on `samples` inputs, in its own runtime.

    Each figure is that of the worst output. `max_relative_error` is max|y - y_torch| / max|y_torch| over all samples;
    `min_cosine` is the worst per-sample cosine similarity; `top1_agreement` is the share of answers whose classes
    agree, None where no output holds classes' scores. A task's head is proven on the backbone's features.
    """

    artifact_sha256: str
    key: ArtifactKey
    runtime: str
    runtime_version: str
    samples: int
    max_relative_error: float
    min_cosine: float
    top1_agreement: float | None


@record
class Factors:
    """How a layer is stored as a chain of smaller operators; factors/forms/ defines what a form computes.

    `rank` is the width between the last two operators. `input_rank` is Tucker-2's other width. A layer of the form
    "width" is one operator of `rank` outputs, on the first `input_rank` inputs if that is not None. Other forms have no
    `input_rank`.
    """

    form: Form = "svd"
    rank: int
    input_rank: int | None = None

    def __str__(self) -> str:
        """The form and its widths, as tables show them: "svd 24", "spatial 40", "tucker 16→24"."""
        widths = str(self.rank) if self.input_rank is None else f"{self.input_rank}→{self.rank}"
        return f"{self.form} {widths}"


@record
class Stored:
    """How a layer is stored: as `factors` (None: dense), its operators' weights in one type."""

    factors: Factors | None = None
    weights: Precision = "float32"

    def __str__(self) -> str:
        """The factors, and the type unless it is float32, as tables show them: "svd 24", "dense, int8"."""
        shape = str(self.factors or "dense")
        return shape if self.weights == "float32" else f"{shape}, {self.weights}"


@record
class LayerCost:
    """The cost of one layer stored as `factors` (None: dense) with such `weights`, in the unit of its table.

    `low` and `high` are the 95 % interval over the table's rounds, None for a table that was not measured in rounds.
    """

    factors: Factors | None
    cost: int
    low: int | None = None
    high: int | None = None
    weights: Precision = "float32"

    @property
    def stored(self) -> Stored:
        """How the layer is stored at this cost."""
        return Stored(factors=self.factors, weights=self.weights)


@record
class CostTable:
    """Costs of single layers measured on a device, by layer name: dense, and the ranks worth offering.

    `dense` is the cost of the whole dense model on the device. `fixed` is the part of it that no factorable layer
    accounts for; it may be negative. The table is valid for models with this `model_sha256` (call_sites.hash_model):
    the weights may differ, the shapes may not. `device`, `format`, `runtime` (name and version), `threads` and
    `agent_sha256` are the conditions; `measured_utc` is the time (ISO 8601), `rounds` the interleaved rounds. Layers of
    fewer bits were measured with these `activations`, as precision.activations names them; None without such layers.
    `part` is what was timed, as a key's part: the whole model, or a phase of one that generates, with the prompt of
    `prompt_tokens` (None: without one).
    """

    unit: CostUnit
    device: str
    format: Format
    runtime: str
    threads: int
    agent_sha256: str
    measured_utc: str
    rounds: int
    model_sha256: str
    dense: int
    fixed: int
    layers: dict[str, tuple[LayerCost, ...]]
    activations: str | None = None
    part: str = WHOLE
    prompt_tokens: int | None = None


@record
class LayerRank:
    """The choice for one layer, seen as a matrix (`rows` out, `columns` in·kh·kw).

    `factors` is None where the layer stays dense. `operators` are the (rows, columns) of the linear or convolutional
    operators it runs as, in order; an embedding's table is not one of them. `relative_error` is the predicted share of
    the layer's output energy that the factors and their rounding lose (0 when dense in float32). `interference` is the
    share of output energy that merging loses, whatever the rank (None for one model or a merge without Grams).
    `held_out_error` is the share that float32 factors made from one half of the calibration samples lose on the other
    (None when dense, or without two halves), and `shrinkage` the share of the inputs' correlations that the samples do
    not bear out (None for a plain SVD). `weights` is the type of its operators' weights.
    """

    name: str
    rows: int
    columns: int
    factors: Factors | None
    operators: tuple[tuple[int, int], ...]
    dense_parameters: int
    chosen_parameters: int
    relative_error: float
    interference: float | None
    held_out_error: float | None = None
    shrinkage: float | None = None
    weights: Precision = "float32"

    @property
    def stored(self) -> Stored:
        """The choice itself."""
        return Stored(factors=self.factors, weights=self.weights)

    @property
    def lost(self) -> float:
        """The share of the output energy lost by the rank, on unseen samples where that was measured."""
        return self.relative_error if self.held_out_error is None else self.held_out_error

    @property
    def cells(self) -> tuple[str, ...]:
        """The layer's row in a table whose heading is PLAN_HEADING."""
        return (
            self.name,
            f"{self.rows}×{self.columns}",
            str(self.stored),
            show_count(self.chosen_parameters),
            "–" if self.factors is None else show_percent(self.lost),
            "–" if self.interference is None else show_percent(self.interference),
        )


PLAN_HEADING = ("layer", "matrix", "stored as", "parameters", "lost by rank", "lost by merging")


@record
class RankPlan:
    """Ranks for every layer that may be factored, and how exactly they meet the budget.

    `fixed_parameters` are the parameters outside those layers. `total_cost` and `budget_cost` are in `unit`; `gap` is
    budget minus total, never negative. `calibration_samples` are those that inputs were weighed by (None: plain SVD).
    """

    method: str
    layers: tuple[LayerRank, ...]
    fixed_parameters: int
    total_parameters: int
    unit: CostUnit
    total_cost: int
    budget_cost: int
    predicted_error: float
    calibration_samples: int | None = None

    @property
    def gap(self) -> int:
        """What is left of the budget, in its unit."""
        return self.budget_cost - self.total_cost

    @property
    def factors(self) -> dict[str, Factors]:
        """The factors of every layer that is stored factored, by layer name."""
        return {layer.name: layer.factors for layer in self.layers if layer.factors is not None}

    @property
    def weights(self) -> dict[str, Precision]:
        """The type of every layer's weights, by layer name."""
        return {layer.name: layer.weights for layer in self.layers}

    def _repr_html_(self) -> str:
        """The layers as an HTML table, which notebooks display."""
        lines = [("th", PLAN_HEADING), *(("td", layer.cells) for layer in self.layers)]
        rows = ("".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) for tag, cells in lines)
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


@record
class Alternative:
    """The result of another allocation method at the same budget, evaluated on the host, not exported."""

    method: str
    plan: RankPlan
    accuracy: Score


@record
class Refinement:
    """The steps and time that label-free refinement took; `cpu_seconds` add all threads, without interruptions.

    `by` says what was compared with the dense model: its outputs, or those of its blocks.
    """

    steps: int
    cpu_seconds: float
    augment: str
    by: str = "outputs"


@record
class Build:
    """Everything one recipe produced: a dense and a compressed artifact per format, and every stage's score.

    `batchnorm_reestimated` lists the stages after which batch-norm statistics were estimated again. `mended` lists
    how the models were made alike before merging. With a `refinement` the compressed artifacts hold the refined
    model. `landing` records how a latency budget was met on its device, None for other budgets. Where every task
    has a head of its own, `artifacts` are the backbones and `heads` their heads, one per task and artifact.
    `shapes` are the further files of formats that need one file for each shape. With `answers` = "predictions" the
    data have no labels, and every score (`accuracies`) is the agreement with the model before compressing.
    """

    recipe: str
    recipe_sha256: str
    artifacts: tuple[Artifact, ...]
    plan: RankPlan
    accuracies: tuple[Score, ...]
    alternatives: tuple[Alternative, ...]
    dense_parameters: int
    batchnorm_reestimated: tuple[str, ...] = ()
    fidelities: tuple[Fidelity, ...] = ()
    mended: tuple[str, ...] = ()
    refinement: Refinement | None = None
    landing: Landing | None = None
    heads: tuple[Artifact, ...] = ()
    shapes: tuple[Artifact, ...] = ()
    answers: Answers = "labels"

    @property
    def measure(self) -> Measure:
        """What its scores (`accuracies`) count."""
        if self.answers == "predictions":
            return Measure(name="agreement with the dense model")
        return self.accuracies[0].measure if self.accuracies else ACCURACY

    @property
    def files(self) -> tuple[Artifact, ...]:
        """Every exported file: all are proven and pushed, only `artifacts` are timed."""
        return (*self.artifacts, *self.heads, *self.shapes)


@record
class RunOutput:
    """What a runtime computed: one .npy file per output of the artifact, in order, with samples on axis 0."""

    outputs: tuple[str, ...]
    runtime: str
    runtime_version: str
