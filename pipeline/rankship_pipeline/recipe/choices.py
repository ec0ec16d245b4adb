"""The records of a recipe: one TOML file that defines one run. Unknown keys are refused."""

from dataclasses import replace
from typing import Literal, get_args

from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.quality import QualityKind
from rankship_pipeline.foundation.records import CostUnit, Form
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.export_choices import ExportChoice, ParityChoice
from rankship_pipeline.recipe.merge_methods import KEYS, MergeMethod
from rankship_pipeline.recipe.normalisation import Normalisation
from rankship_pipeline.recipe.precision import PrecisionChoice
from rankship_pipeline.recipe.rank_methods import RankMethod

Whitening = Literal["plain", "cholesky", "eigen", "swift"]
Sensitivity = Literal["auto", "relative", "gradient", "kl"]
GramSource = Literal["sources", "merged"]
BatchNormMode = Literal["auto", "reestimate", "keep"]
Alignment = Literal["weights"]
Task = Literal[
    "sequence-classification",
    "image-classification",
    "token-classification",
    "question-answering",
    "causal-lm",
    "text-generation",
    "fill-mask",
    "text2text-generation",
    "feature-extraction",
    "semantic-segmentation",
]
DataKind = Literal["loader", "images", "text", "csv"]

DATA_KINDS: tuple[DataKind, ...] = get_args(DataKind)
_BASE = "base"  # the name of the model that adapters are added to


@record
class Source:
    """One trained model: either `factory` with `weights` or `train`, or `huggingface`.

    The result of `train` is cached by the hash of these files and the seed; other files that it reads do not count.

    Keys:
        name: its name in reports
        factory: "file.py:function" beside the recipe; `factory()` returns a torch module
        weights: a safetensors state dict; `$NAME` in its path is an environment variable
        train: "file.py:function" beside the recipe; `train(module, seed)` trains the module in place
        huggingface: a folder or a hub id
        revision: the hub's branch, tag or commit
        adapter: the folder of a LoRA adapter to add: peft's adapter_config.json and adapter_model.safetensors
        task: what a Hugging Face model was trained for; left out, it is read from the model's own files. A "causal-lm"
            is exported with a cache, so that its files generate text; "text-generation" gives the logits of a whole
            text of fixed length, and is what a language model is taken for whose data come from a loader
        inputs: the names of its forward arguments, in the order in which the data loader gives them; left out, they
            are read from the model's own files
        held: the model is a trained module of a Python session; not for recipe files
        normalise: the normalisation of its training images; left out, it is read from a Hugging Face folder, and a
            factory's model is assumed to have the first model's
        labels: the names of its classes in its own order; left out, treated like `normalise`
    """

    name: str
    factory: str | None = None
    weights: str | None = None
    train: str | None = None
    huggingface: str | None = None
    revision: str | None = None
    adapter: str | None = None
    held: bool = False
    task: Task | None = None
    inputs: tuple[str, ...] = ()
    normalise: Normalisation | None = None
    labels: tuple[str, ...] = ()


@record
class DataChoice:
    """Where calibration and test data come from: exactly one of `loader`, `images`, `text` and `csv`.

    Keys:
        loader: "file.py:function" beside the recipe; what it returns is described above
        images: a folder with a subfolder of pictures for each class
        text: a file of texts with their labels (.txt or .tsv: label, tab, text; .csv and .jsonl: by column name); for
            a "causal-lm" one running text, or a table's texts one after the other
        csv: a table of features, or of texts if the model reads text
        label: the name of the column of labels; left out, "label"
        columns: the names of the columns of features, or of the one with texts
        tokens: the length to which texts are padded or cut; the length of a "causal-lm" model's windows of text
        size: height and width in pixels of the model's input images; a Hugging Face model has its own
        channels: 1 for grey images, 3 for colour; a Hugging Face model has its own
        calibration_samples: the number of samples drawn for calibration
        test_samples: the number of samples drawn for testing, none of them a calibration sample
        held: the data are tensors of a Python session; not for recipe files
        normalise: the normalisation of the loader's images, or the one to apply to a folder's images and a table's
            columns; a model trained with another one is changed to take this one
    """

    loader: str | None = None
    images: str | None = None
    text: str | None = None
    csv: str | None = None
    label: str | None = None
    columns: tuple[str, ...] = ()
    tokens: int | None = None
    size: int | tuple[int, int] | None = None
    channels: Literal[1, 3] | None = None
    calibration_samples: int | None = None
    test_samples: int | None = None
    held: bool = False
    normalise: Normalisation | None = None

    @property
    def given(self) -> dict[DataKind, str]:
        """The data's origin by kind; a valid recipe gives exactly one."""
        return {kind: value for kind in DATA_KINDS if (value := getattr(self, kind)) is not None}

    @property
    def origin(self) -> str:
        """Its name in errors: "data loader 'data.py:load'", "images 'photos'"."""
        if self.held:
            return "the data of this session"
        kind, path = next(iter(self.given.items()))
        return f"data loader {path!r}" if kind == "loader" else f"{kind} {path!r}"


@record
class MergeChoice:
    """How the models are merged; the table of methods lists the keys that each method takes, and their defaults.

    Keys:
        method: the merge method
        head: the module that gives the logits; every model then keeps its own head, and the rest becomes one backbone
        base: the model that all were trained from; not needed for adapters of one model
        scale: λ (or α), the factor on the changes
        density: the share of each change that trimming keeps
        drop: the probability that a change is dropped
        epsilon: how far that probability varies with the size of the change
        position: the position of SLERP between the two models, 0 to 1
        off_diagonal: the factor on the Gram matrices' off-diagonals, as in RegMean; 1 leaves them unchanged
        core_rank: the rank of CtM's cores; 0 takes the adapters' own
        samples: the number of inputs of each model for Fisher and for solving layer by layer
        align: "weights" puts every model's neurons in the first model's order before merging, for models that were
            trained from different starts (git re-basin); left out, they stay as they are
        batchnorm: whether to re-estimate batch-norm statistics after merging and after compressing; "auto" takes what
            matches the sources' own outputs better
    """

    method: MergeMethod = "joint"
    head: str | None = None
    base: Source | None = None
    scale: float | None = None
    density: float | None = None
    drop: float | None = None
    epsilon: float | None = None
    position: float | None = None
    off_diagonal: float | None = None
    core_rank: int | None = None
    samples: int | None = None
    align: Alignment | None = None
    batchnorm: BatchNormMode = "auto"

    @property
    def given(self) -> dict[str, float]:
        """The methods' keys that the recipe gives; they apply to every merge of the recipe that takes them."""
        return {key: value for key in KEYS if (value := getattr(self, key)) is not None}


@record
class RankChoice:
    """How ranks are allocated.

    Keys:
        method: the allocation method
        step: ranks are multiples of this, which hardware runs fast
        threshold: ARP's fixed τ; it replaces the budget
        sensitivity: how an error in a layer is counted. "relative": its share of the layer's output energy; "gradient":
            its second-order effect on the model's predictions (needs `factorise.curvature`); "auto": by the better of
            both plans; "kl": its measured effect, or "gradient" where measuring takes more than 2e14 operations
        probes: the most samples that "auto" and "kl" measure on; "kl" takes 8, and twice as many until they suffice
        passes: how many more times "kl" measures around the plan and solves again (knapsack only)
        steps: the number of ARA's training steps
        forms: the forms that a layer may take; ARP and ARA always use "svd". "width" leaves out neurons between linear
            layers (knapsack only)
        exclude: shell-style patterns of layer names that stay dense
    """

    method: RankMethod = "knapsack"
    step: int = 8
    threshold: float | None = None
    sensitivity: Sensitivity = "auto"
    probes: int = 128
    passes: int = 0
    steps: int = 2560
    forms: tuple[Form, ...] = ("svd", "spatial", "tucker")
    exclude: tuple[str, ...] = ()


@record
class FactoriseChoice:
    """How a layer's factors are found, all from unlabelled calibration data and without training.

    Keys:
        whitening: how inputs are weighed by the activations that a layer receives; "plain" does not weigh them
        grams: whose activations: those of the sources on their own data, or of the merged model
        shrink: whether these weights count only as far as two halves of the calibration samples agree; in papers: false
        curvature: whether outputs are weighed by their effect on the predictions
        reconstruct: whether every layer is refitted to the outputs of the compressed layers before it; one whose
            outputs are added to what is carried past it makes up for that too
    """

    whitening: Whitening = "swift"
    grams: GramSource = "sources"
    shrink: bool = True
    curvature: bool = True
    reconstruct: bool = False


@record
class Comparison:
    """Another way to the same budget, evaluated on the host for the report and not exported.

    Its keys mean the same as in the tables `merge`, `ranks` and `factorise`. A key that is left out has the plain
    default here, not the recipe's value, so that a row shows its method without extras.
    """

    name: str
    merge: MergeMethod
    ranks: RankMethod
    whitening: Whitening
    sensitivity: Sensitivity = "relative"
    passes: int = 0
    forms: tuple[Form, ...] = ("svd",)
    shrink: bool = True
    curvature: bool = False
    reconstruct: bool = False


Augmentation = Literal["none", "flip-and-shift"]


@record
class QualityChoice:
    """How a model's outputs are judged, and how many points a specialist may lose: of the tests that the loader gives.

    Without tests they are points of agreement, or of the outputs' error. Without a limit the loss is only measured and
    reported. `quality = "KIND"` and `quality = "file.py:function"` abbreviate a table with one key.

    Keys:
        kind: what the model's answers are; left out, it follows from its task, its outputs and the test labels
        function: "file.py:function" beside the recipe: function(outputs, labels) gives one number, the score
        output: the name of the output that the labels belong to; left out, the first whose shape fits
        lower_is_better: whether a lower score of `function` is better
        max_merge_loss_points: the most that the merged model may lose
        max_loss_points: the most that the exported model may lose in total
    """

    kind: QualityKind | None = None
    function: str | None = None
    output: str | None = None
    lower_is_better: bool = False
    max_merge_loss_points: float | None = None
    max_loss_points: float | None = None


@record
class RefineChoice:
    """Label-free training of the compressed model, limited by exactly one of processor time and steps.

    Keys:
        cpu_seconds: seconds of processor time; how many steps fit depends on the machine
        steps: number of steps; only this limit gives the same bytes on every run
        augment: how inputs are augmented
        by: what is compared with the dense model: "outputs" trains the whole network at once, "blocks" each block of a
            transformer for itself, in a fraction of the time and memory; what is outside the blocks then stays
        step_size: Adam's largest step size; the default suits convolutions, transformers need a fifth or less
        rounding: of the types that a budget chose: "after" rounds the refined model by its data; "through" begins with
            the rounded one and learns through the rounding
    """

    cpu_seconds: float | None = None
    steps: int | None = None
    augment: Augmentation = "none"
    by: Literal["outputs", "blocks"] = "outputs"
    step_size: float = 3e-3
    rounding: Literal["after", "through"] = "after"


@record
class Recipe:
    """One run, from trained models to verified artifacts.

    Keys:
        name: the name of the build and its reports
        models: the trained models, one or more
        data: calibration and test data
        budget: how small or fast the model must be
        merge: how several models become one
        ranks: how ranks are allocated
        factorise: how a layer's factors are found
        compare: other ways to the same budget, for the report
        precision: the types of the compressed weights and activations
        export: the files to write
        parity: how closely they must agree with torch
        quality: how answers are judged, and how much a specialist may lose
        refine: label-free training after compressing; left out, there is none
        seed: the seed of everything random
    """

    name: str
    models: tuple[Source, ...]
    data: DataChoice
    budget: Budget = Budget()
    merge: MergeChoice = MergeChoice()
    ranks: RankChoice = RankChoice()
    factorise: FactoriseChoice = FactoriseChoice()
    compare: tuple[Comparison, ...] = ()
    precision: PrecisionChoice = PrecisionChoice()
    export: ExportChoice = ExportChoice()
    parity: ParityChoice = ParityChoice()
    quality: QualityChoice = QualityChoice()
    refine: RefineChoice | None = None
    seed: int = 0


def find_base(recipe: Recipe) -> Source | None:
    """The model that all were trained from: the recipe's merge.base, or the common model of all its adapters."""
    if recipe.merge.base is not None:
        return recipe.merge.base
    bare = {replace(source, name=_BASE, adapter=None) for source in recipe.models}
    return bare.pop() if len(bare) == 1 and all(source.adapter for source in recipe.models) else None


def list_sources(recipe: Recipe) -> tuple[Source, ...]:
    """The models to merge, and the base if there is one."""
    base = find_base(recipe)
    return recipe.models if base is None else (*recipe.models, base)


def choose(recipe: Recipe) -> Comparison:
    """The recipe's own way of merging, whitening and allocating, as a Comparison."""
    ranks, factorise = recipe.ranks, recipe.factorise
    return Comparison(
        name=ranks.method,
        merge=recipe.merge.method,
        ranks=ranks.method,
        whitening=factorise.whitening,
        sensitivity=ranks.sensitivity,
        passes=ranks.passes,
        forms=ranks.forms,
        shrink=factorise.shrink,
        curvature=factorise.curvature and factorise.whitening != "plain",
        reconstruct=factorise.reconstruct,
    )


def find_unit(recipe: Recipe) -> CostUnit:
    """The unit of the recipe's budget: bytes where weights of other types than float32 are chosen by their bytes."""
    is_rounded = recipe.budget.size_bytes is not None and recipe.precision.weights != ("float32",)
    return "bytes" if is_rounded else recipe.budget.unit


def rank_choice(recipe: Recipe, way: Comparison) -> RankChoice:
    """The rank choice of one way to the budget; all ways share the recipe's step and excluded layers."""
    return replace(recipe.ranks, method=way.ranks, sensitivity=way.sensitivity, passes=way.passes, forms=way.forms)
