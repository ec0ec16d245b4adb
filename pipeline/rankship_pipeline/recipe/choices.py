"""A recipe: one TOML file that says everything about one run. Unknown keys are refused."""

from dataclasses import replace
from typing import Literal, get_args

from rankship_pipeline.foundation.records import FORMATS, Form, Format, record
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.merge_methods import KEYS, MergeMethod
from rankship_pipeline.recipe.normalisation import Normalisation
from rankship_pipeline.recipe.rank_methods import RankMethod

Whitening = Literal["plain", "cholesky", "eigen", "swift"]
Sensitivity = Literal["relative", "gradient", "kl"]
GramSource = Literal["sources", "merged"]
BatchNormMode = Literal["auto", "reestimate", "keep"]
Task = Literal["sequence-classification", "image-classification"]
DataKind = Literal["loader", "images", "text", "csv"]

DATA_KINDS: tuple[DataKind, ...] = get_args(DataKind)
_BASE = "base"  # the name of the model that adapters are added to


@record
class Source:
    """One trained model: either `factory` with `weights` or `train`, or `huggingface`.

    The result of `train` is cached under the hash of these files and the seed: what else it reads is not seen.

    Keys:
        name: what reports call it
        factory: "file.py:function" beside the recipe; `factory()` returns a torch module
        weights: a safetensors state dict; `$NAME` in its path is an environment variable
        train: "file.py:function" beside the recipe; `train(module, seed)` trains the module in place
        huggingface: a folder or a hub id
        revision: the hub's branch, tag or commit
        adapter: the folder of a LoRA adapter to add: peft's adapter_config.json and adapter_model.safetensors
        task: what a Hugging Face model was trained for; left out, its own files say it
        inputs: the names of its forward arguments, in the order in which the data loader gives them; left out, its own
            files say them
        held: stands for a trained module of a Python session; no recipe file can say it
        normalise: what its training images went through; left out, it is read from a Hugging Face folder, and a
            factory's model is taken to be like the first
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
        loader: "file.py:function" beside the recipe; what it returns stands above
        images: a folder with a subfolder of pictures for each class
        text: a file of texts with their labels (.txt or .tsv: label, tab, text; .csv and .jsonl: by names)
        csv: a table of features, or of texts where the model reads text
        label: the name of the column of labels; left out, "label"
        columns: the names of the columns of features, or of the one with texts
        tokens: the length to which texts are padded or cut
        size: height and width in pixels of the images that the model takes; a Hugging Face model brings its own
        channels: 1 for grey images, 3 for colour; a Hugging Face model brings its own
        calibration_samples: how many samples are drawn to calibrate by
        test_samples: how many are drawn to test on, others than those
        held: stands for tensors of a Python session; no recipe file can say it
        normalise: what the loader's images went through, or what a folder's images and a table's columns are put
            through; models trained on others are folded to it
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
        """Where the data come from, by kind; a valid recipe gives exactly one."""
        return {kind: value for kind in DATA_KINDS if (value := getattr(self, kind)) is not None}

    @property
    def origin(self) -> str:
        """What errors call it: "data loader 'data.py:load'", "images 'photos'"."""
        if self.held:
            return "the data of this session"
        kind, path = next(iter(self.given.items()))
        return f"data loader {path!r}" if kind == "loader" else f"{kind} {path!r}"


@record
class MergeChoice:
    """How the models become one; which method takes which key, and its default, stands in the table of methods.

    Keys:
        method: how the weights become one
        head: the module that gives the logits; with it every model keeps its own and the rest becomes one backbone
        base: the model that all were trained from; adapters of one model need not name it
        scale: λ (or α), by how much changes are scaled
        density: the share of each change that trimming keeps
        drop: how likely a change is dropped
        epsilon: how far that likelihood varies with the size of the change
        position: where SLERP stops between the two models
        off_diagonal: scales the Gram matrices' off-diagonals as RegMean does; 1 leaves them as they are
        core_rank: the rank of CtM's cores; 0 takes the adapters' own
        samples: how many inputs of each model Fisher, or solving layer by layer, sees
        batchnorm: what becomes of batch-norm statistics after merging and after compressing; "auto" keeps or
            re-estimates them, whichever matches the sources' own outputs better
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
    batchnorm: BatchNormMode = "auto"

    @property
    def given(self) -> dict[str, float]:
        """The methods' own keys as far as the recipe gives them; they hold for every merge of it that takes them."""
        return {key: value for key in KEYS if (value := getattr(self, key)) is not None}


@record
class RankChoice:
    """How ranks are allocated.

    Keys:
        method: who gets which rank
        step: ranks are multiples of this, as hardware likes them
        threshold: ARP's fixed τ; there is no budget then
        sensitivity: what an error in a layer counts. "relative": its share of the layer's output energy; "gradient":
            its second-order effect on the model's predictions (needs `factorise.curvature`); "kl": its measured
            effect on the predictions
        probes: the calibration samples that "kl" measures on
        passes: how many more rounds "kl" measures around the plan (knapsack only)
        steps: how long ARA trains
        forms: what a layer may become; offered to every method but ARP and ARA, which know matrices only
        exclude: shell-style patterns of layer names that stay dense
    """

    method: RankMethod = "knapsack"
    step: int = 8
    threshold: float | None = None
    sensitivity: Sensitivity = "relative"
    probes: int = 128
    passes: int = 0
    steps: int = 2560
    forms: tuple[Form, ...] = ("svd", "spatial", "tucker")
    exclude: tuple[str, ...] = ()


@record
class FactoriseChoice:
    """How a layer's factors are found, all from unlabelled calibration data and without training.

    Keys:
        whitening: how inputs are weighed by the activations that a layer sees; "plain" does not
        grams: whose activations: those of the sources on their own data, or of the merged model
        curvature: weighs outputs by what they move in the predictions
        reconstruct: refits every layer to what the compressed layers before it produce; slow
    """

    whitening: Whitening = "eigen"
    grams: GramSource = "sources"
    curvature: bool = True
    reconstruct: bool = False


@record
class Comparison:
    """Another way to the same budget, evaluated on the host for the report and not exported.

    Its keys mean what they mean in the tables `merge`, `ranks` and `factorise`. What is left out is the plain way, not
    the recipe's: a row shows its method and not our extras.
    """

    name: str
    merge: MergeMethod
    ranks: RankMethod
    whitening: Whitening
    sensitivity: Sensitivity = "relative"
    passes: int = 0
    forms: tuple[Form, ...] = ("svd",)
    curvature: bool = False
    reconstruct: bool = False


@record
class ExportChoice:
    """What to export.

    Keys:
        formats: the formats; all three where left out
    """

    formats: tuple[Format, ...] = FORMATS


@record
class ParityChoice:
    """What an artifact must reach against torch before it counts as verified.

    Keys:
        samples: how many test inputs are compared
        max_relative_error: largest difference of an output, over the largest output
        min_cosine: cosine of both outputs
        min_top1_agreement: share of inputs on which the largest output is the same one
    """

    samples: int = 64
    max_relative_error: float = 1e-4
    min_cosine: float = 0.9999
    min_top1_agreement: float = 1.0


Augmentation = Literal["none", "flip-and-shift"]


@record
class QualityChoice:
    """How many points a specialist may lose: of test accuracy where the loader gives its `tests`, else of agreement.

    What is left out is measured and reported, never refused.

    Keys:
        max_merge_loss_points: what the merged model may lose
        max_loss_points: what the exported model may lose in all
    """

    max_merge_loss_points: float | None = None
    max_loss_points: float | None = None


@record
class RefineChoice:
    """Label-free training of the compressed model, for exactly one of: processor time or steps.

    Keys:
        cpu_seconds: seconds of the processor; how many steps fit depends on the machine
        steps: number of steps; only these give the same bytes on every run
        augment: what may be done to the inputs
        step_size: Adam's at the top of its cycle; the default suits convolutions, transformers want a fifth or less
    """

    cpu_seconds: float | None = None
    steps: int | None = None
    augment: Augmentation = "none"
    step_size: float = 3e-3


@record
class Recipe:
    """One run, from trained models to verified artifacts.

    Keys:
        name: what the build and its reports are called
        models: the trained models, one or more
        data: calibration and test data
        budget: how small, how cheap or how fast
        merge: how several models become one
        ranks: who gets which rank
        factorise: how a layer's factors are found
        compare: other ways to the same budget, for the report
        export: which files are written
        parity: how closely they must agree with torch
        quality: what a specialist may lose
        refine: label-free training after compressing; none where left out
        seed: of everything random
    """

    name: str
    models: tuple[Source, ...]
    data: DataChoice
    budget: Budget = Budget()
    merge: MergeChoice = MergeChoice()
    ranks: RankChoice = RankChoice()
    factorise: FactoriseChoice = FactoriseChoice()
    compare: tuple[Comparison, ...] = ()
    export: ExportChoice = ExportChoice()
    parity: ParityChoice = ParityChoice()
    quality: QualityChoice = QualityChoice()
    refine: RefineChoice | None = None
    seed: int = 0


def find_base(recipe: Recipe) -> Source | None:
    """The model that all were trained from: as the recipe names it, or what all its adapters are added to."""
    if recipe.merge.base is not None:
        return recipe.merge.base
    bare = {replace(source, name=_BASE, adapter=None) for source in recipe.models}
    return bare.pop() if len(bare) == 1 and all(source.adapter for source in recipe.models) else None


def list_sources(recipe: Recipe) -> tuple[Source, ...]:
    """The models to merge, and the base where there is one."""
    base = find_base(recipe)
    return recipe.models if base is None else (*recipe.models, base)


def choose(recipe: Recipe) -> Comparison:
    """The recipe's own way of merging, whitening and allocating, in the form in which alternatives are given."""
    ranks, factorise = recipe.ranks, recipe.factorise
    return Comparison(
        name=ranks.method,
        merge=recipe.merge.method,
        ranks=ranks.method,
        whitening=factorise.whitening,
        sensitivity=ranks.sensitivity,
        passes=ranks.passes,
        forms=ranks.forms,
        curvature=factorise.curvature and factorise.whitening != "plain",
        reconstruct=factorise.reconstruct,
    )


def rank_choice(recipe: Recipe, way: Comparison) -> RankChoice:
    """How a way to the budget allocates ranks; the step and what stays dense are the recipe's for all."""
    return replace(recipe.ranks, method=way.ranks, sensitivity=way.sensitivity, passes=way.passes, forms=way.forms)
