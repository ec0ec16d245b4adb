"""A recipe: one TOML file that says everything about one run. Unknown keys are refused."""

from dataclasses import replace
from typing import Literal

from rankship_pipeline.foundation.records import FORMATS, CostUnit, Form, Format, record
from rankship_pipeline.recipe.merge_methods import KEYS, MergeMethod
from rankship_pipeline.recipe.normalisation import Normalisation
from rankship_pipeline.recipe.rank_methods import RankMethod

Whitening = Literal["plain", "cholesky", "eigen", "swift"]
Sensitivity = Literal["relative", "gradient", "kl"]
GramSource = Literal["sources", "merged"]
BatchNormMode = Literal["auto", "reestimate", "keep"]
Task = Literal["sequence-classification", "image-classification"]

_BASE = "base"  # the name of the model that adapters are added to
TIMES = ("latency_ms", "latency_us")
AMOUNTS = ("kept_parameters", "parameters", "size_bytes", "kept_flops", "flops", *TIMES, "energy_uj")


@record
class Source:
    """One trained model: either `factory` with `weights` or `train`, or `huggingface` with `task` and `inputs`.

    `adapter` is the folder of a LoRA adapter (peft's adapter_config.json and adapter_model.safetensors) to add to it.

    `factory` and `train` are "file.py:function" beside the recipe; `factory()` returns a torch module, `train(module,
    seed)` trains it in place. Its result is cached under the hash of these files and the seed: what else it reads is
    not seen. `weights` is a safetensors state dict; `$NAME` in its path is an environment variable. `huggingface` is
    a directory or a hub id; `inputs` names the forward arguments in the order in which the data loader gives them.
    `normalise` is what its training images went through, `labels` are the names of its classes in its own order;
    left out, both are read from a Hugging Face folder, and a factory's model is taken to be like the first.
    """

    name: str
    factory: str | None = None
    weights: str | None = None
    train: str | None = None
    huggingface: str | None = None
    revision: str | None = None
    adapter: str | None = None
    task: Task | None = None
    inputs: tuple[str, ...] = ()
    normalise: Normalisation | None = None
    labels: tuple[str, ...] = ()


@record
class DataChoice:
    """`loader` is "file.py:function"; see data.py for what it returns.

    `normalise` is what the loader's images went through; models trained on others are folded to it (normalise.py).
    """

    loader: str
    normalise: Normalisation | None = None


@record
class MergeChoice:
    """How the models become one; which method takes which key, and its default, stands in merge_methods.METHODS.

    `head` names the module that gives the logits, where every model keeps its own: the rest becomes one backbone for
    all tasks (see heads.py); without it all models share one head. `base` is the model that all were trained from; for
    adapters of one model it need not be given. `scale` is λ (or α); `density` the share of each change that trimming
    keeps, `drop` and `epsilon` how likely a change is dropped; `position` where SLERP stops between the two models;
    `off_diagonal` scales the Grams' off-diagonals as RegMean does (1 = not at all); `core_rank` is that of CtM's cores
    (0: the adapters' own), `samples` how many inputs of each model
    Fisher, and solving layer by layer, see.
    `batchnorm` says what becomes of batch-norm statistics after merging and after compressing; "auto" keeps or
    re-estimates them, whichever matches the sources' own outputs better (see batchnorm.py).
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
class Budget:
    """Exactly one of: size (a share of the merged model's parameters, a count, or bytes), operations, time or energy.

    `size_bytes` counts 4 bytes a parameter; a file adds its graph and buffers, some kilobytes, which are reported.
    Operations, time and energy are those of one sample. The last two need a table of costs measured on a device (see
    records.CostTable): `costs` names one, relative to the recipe. With `on`, a device of the inventory, the whole model
    is measured there too and the allocation corrected until the time is met, in `format` (None: the first that is
    exported); without `costs` the table is measured on the way.
    """

    kept_parameters: float | None = None
    parameters: int | None = None
    size_bytes: int | None = None
    kept_flops: float | None = None
    flops: int | None = None
    latency_ms: float | None = None
    latency_us: int | None = None
    energy_uj: int | None = None
    costs: str | None = None
    on: str | None = None
    format: Format | None = None

    @property
    def amounts(self) -> dict[str, float]:
        """What is given, by its key; a valid budget holds exactly one."""
        return {key: value for key in AMOUNTS if (value := getattr(self, key)) is not None}

    @property
    def unit(self) -> CostUnit:
        """What the budget is counted in."""
        if any(key in self.amounts for key in TIMES):
            return "ns"
        if self.energy_uj is not None:
            return "uj"
        return "parameters" if self.flops is None and self.kept_flops is None else "flops"


@record
class RankChoice:
    """How ranks are allocated; `step` is the hardware-friendly multiple, `threshold` ARP's fixed τ (then no budget).

    `sensitivity` says what an error in a layer counts: "relative", its share of the layer's output energy; "gradient",
    its second-order effect on the model's predictions (needs factorise.curvature); "kl", its measured effect on
    `probes` calibration samples, after which `passes` more rounds measure around the plan (knapsack only). `forms`
    are offered to every method but ARP and ARA, which know matrices only; ARA trains for `steps`. `exclude` are
    shell-style patterns of layer names that stay dense.
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

    `whitening` weighs inputs by the activations of the `sources` on their own data, or of the `merged` model;
    `curvature` weighs outputs by what they move in the predictions; `reconstruct` refits every layer to what the
    compressed layers before it produce.
    """

    whitening: Whitening = "eigen"
    grams: GramSource = "sources"
    curvature: bool = True
    reconstruct: bool = False


@record
class Comparison:
    """Another way to the same budget, evaluated on the host for the report and not exported.

    What is not given is the plain way, not the recipe's: a row shows its method and not our extras.
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
    """The formats to export."""

    formats: tuple[Format, ...] = FORMATS


@record
class ParityChoice:
    """What an artifact must reach against torch on `samples` test inputs (see records.Verified for the measures)."""

    samples: int = 64
    max_relative_error: float = 1e-4
    min_cosine: float = 0.9999
    min_top1_agreement: float = 1.0


Augmentation = Literal["none", "flip-and-shift"]


@record
class QualityChoice:
    """How many points a specialist may lose: of test accuracy where the loader gives its `tests`, else of agreement.

    `max_merge_loss_points` judges the merged model, `max_loss_points` what is exported after it. None: measured and
    reported, never refused.
    """

    max_merge_loss_points: float | None = None
    max_loss_points: float | None = None


@record
class RefineChoice:
    """Label-free refinement of the compressed model (recover/refine/), for exactly one of: processor time or steps.

    Only `steps` give the same bytes on every run; `augment` is what may be done to the inputs. `step_size` is Adam's at
    the top of its cycle: as METHODS §1 found it for convolutions; transformers want a fifth of it or less.
    """

    cpu_seconds: float | None = None
    steps: int | None = None
    augment: Augmentation = "none"
    step_size: float = 3e-3


@record
class Recipe:
    """One run, from trained models to verified artifacts."""

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
