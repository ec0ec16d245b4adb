"""A recipe: one TOML file that says everything about one run. Unknown keys are refused."""

import re
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Literal

from rankship_pipeline.codec import read_toml
from rankship_pipeline.errors import InputError
from rankship_pipeline.likeness import (
    Normalisation,
    QualityChoice,
    RefineChoice,
    check_normalisation,
    check_quality,
    check_refinement,
)
from rankship_pipeline.merge_methods import KEYS, METHODS, MergeMethod, check_count, check_settings
from rankship_pipeline.records import FORMATS, CostUnit, Form, Format, record

RankMethod = Literal["uniform", "arp", "strs", "ara", "ara-original", "knapsack"]
Whitening = Literal["plain", "cholesky", "eigen", "swift"]
Sensitivity = Literal["relative", "gradient", "kl"]
GramSource = Literal["sources", "merged"]
BatchNormMode = Literal["auto", "reestimate", "keep"]
Task = Literal["sequence-classification", "image-classification"]

_BASE = "base"  # the name of the model that adapters are added to
_LEAST_MS = 0.001
_TIMES = ("latency_ms", "latency_us")
_AMOUNTS = ("kept_parameters", "parameters", "size_bytes", "kept_flops", "flops", *_TIMES, "energy_uj")
PRICED_METHODS: tuple[RankMethod, ...] = ("uniform", "strs", "knapsack")  # these take a budget in any unit


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

    `base` is the model that all were trained from; for adapters of one model it need not be given. `scale` is λ (or α);
    `density` the share of each change that trimming keeps, `drop` and `epsilon` how likely a change is dropped;
    `position` where SLERP stops between the two models; `off_diagonal` scales the Grams' off-diagonals as RegMean does
    (1 = not at all); `core_rank` is that of CtM's cores (0: the adapters' own), `samples` how many inputs Fisher sees.
    `batchnorm` says what becomes of batch-norm statistics after merging and after compressing; "auto" keeps or
    re-estimates them, whichever matches the sources' own outputs better (see batchnorm.py).
    """

    method: MergeMethod = "joint"
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
        return {key: value for key in _AMOUNTS if (value := getattr(self, key)) is not None}

    @property
    def unit(self) -> CostUnit:
        """What the budget is counted in."""
        if any(key in self.amounts for key in _TIMES):
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


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe; every mistake is an InputError that names the file and the key."""
    recipe = read_toml(Recipe, path, "recipe")
    complaints = [*_check_models(recipe), *_check_numbers(recipe), *_check_ways(recipe)]
    if complaints:
        raise InputError(f"{path}: " + "; ".join(complaints), hint="correct the recipe and run again")
    return recipe


def _check_models(recipe: Recipe) -> list[str]:
    complaints = []
    if not recipe.models:
        complaints.append("no [[models]]: name at least one trained model")
    sources = list_sources(recipe)
    names = [source.name for source in sources]
    complaints += [f"two models are called {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
    if not re.fullmatch(r"[\w][\w .-]*", recipe.name):
        complaints.append(f"name {recipe.name!r} names folders: use letters, digits, '_', '-', '.' and spaces")
    for source in sources:
        complaints += check_normalisation(source.normalise, f"model {source.name!r}")
        if len(set(source.labels)) < len(source.labels):
            complaints.append(f"model {source.name!r}: two of its `labels` have one name")
        if source.huggingface is not None and (source.weights or source.train):
            complaints.append(f"model {source.name!r}: `weights` and `train` belong to a factory, not to `huggingface`")
        if source.adapter is not None and source.train is not None:
            complaints.append(f"model {source.name!r}: an adapter belongs to a model that is loaded, not to `train`")
        if (source.factory is None) == (source.huggingface is None):
            complaints.append(f"model {source.name!r} needs exactly one of `factory` and `huggingface`")
        elif source.factory is not None and (source.weights is None) == (source.train is None):
            complaints.append(f"model {source.name!r} needs exactly one of `weights` and `train` beside its factory")
        elif source.huggingface is not None and (source.task is None or not source.inputs):
            complaints.append(f"model {source.name!r} needs `task` and `inputs` beside `huggingface`")
    return complaints


def _check_ways(recipe: Recipe) -> list[str]:
    """What the recipe's own way, and every [[compare]], cannot mean."""
    ways = [("ranks", choose(recipe)), *((f"compare {way.name!r}", way) for way in recipe.compare)]
    complaints = [complaint for where, way in ways for complaint in check_way(way, where)]
    merges = [("merge", recipe.merge.method), *((where, way.merge) for where, way in ways[1:])]
    complaints += check_settings(merges, recipe.merge.given, has_base=find_base(recipe) is not None)
    if recipe.merge.base is not None and not any(METHODS[method].base for _, method in merges):
        complaints.append("merge.base means nothing to the merges of this recipe: leave it out")
    complaints += check_count(merges, len(recipe.models))
    if recipe.budget.unit != "parameters":
        complaints += [
            f"{where}: the method {way.ranks!r} counts parameters, the budget is in {recipe.budget.unit}: take one of"
            f" {', '.join(PRICED_METHODS)}"
            for where, way in ways
            if way.ranks not in PRICED_METHODS
        ]
    return complaints


def check_way(way: Comparison, where: str) -> list[str]:
    """Complaints about one way, each naming `where` it was written."""
    rules = [
        (bool(way.forms), "forms is empty"),
        (way.passes >= 0, f"passes must not be negative, got {way.passes}"),
        (
            way.passes == 0 or (way.sensitivity == "kl" and way.ranks == "knapsack"),
            'passes measure around a knapsack\'s plan: they need sensitivity = "kl" and the method "knapsack"',
        ),
        (
            way.sensitivity != "gradient" or (way.curvature and way.whitening != "plain"),
            'sensitivity = "gradient" needs curvature = true and a whitening other than "plain"',
        ),
        (not way.reconstruct or way.whitening != "plain", 'reconstruct needs a whitening other than "plain"'),
    ]
    return [f"{where}: {complaint}" for kept, complaint in rules if not kept]


def _rule_measured(recipe: Recipe) -> list[tuple[bool, str]]:
    """What a budget of time or energy needs, and no other may have."""
    budget, formats = recipe.budget, recipe.export.formats
    costs, on, measured = budget.costs is not None, budget.on is not None, budget.unit in {"ns", "uj"}
    return [
        (
            costs or on if measured else not costs,
            "budget.costs, a table measured on the device, belongs to latency and energy, which need it (or budget.on)",
        ),
        (not on or budget.unit == "ns", "budget.on belongs to latency_ms and latency_us"),
        (
            budget.latency_ms is None or budget.latency_ms >= _LEAST_MS,
            f"budget.latency_ms must be at least {_LEAST_MS}",
        ),
        (budget.format is None or on, "budget.format belongs to budget.on"),
        (budget.format in {None, *formats}, f"budget.format is {budget.format}, exported are {', '.join(formats)}"),
    ]


def _check_numbers(recipe: Recipe) -> list[str]:
    budget, ranks, threshold = recipe.budget, recipe.ranks, recipe.ranks.threshold
    given = budget.amounts
    rules = [
        (threshold is None or ranks.method == "arp", "ranks.threshold belongs to method 'arp' only"),
        (
            len(given) == (1 if threshold is None else 0),
            f"[budget] needs exactly one of {', '.join(_AMOUNTS)} (none with ranks.threshold)",
        ),
        (
            all(0 < value < inf for value in given.values()),
            f"the budget must be above zero, got {list(given.values())}",
        ),
        *(
            (share <= 1, f"budget.{key} is the fraction kept, 0 to 1, got {share}")
            for key, share in given.items()
            if key.startswith("kept_")
        ),
        *_rule_measured(recipe),
        (ranks.step >= 1, f"ranks.step must be at least 1, got {ranks.step}"),
        (ranks.probes >= 1, f"ranks.probes must be at least 1, got {ranks.probes}"),
        (ranks.passes >= 0, f"ranks.passes must not be negative, got {ranks.passes}"),
        (threshold is None or 0 < threshold <= 1, f"ranks.threshold must lie in (0, 1], got {threshold}"),
        (threshold is None or not recipe.compare, "[[compare]] needs a [budget]; with ranks.threshold there is none"),
        (recipe.parity.samples >= 1, f"parity.samples must be at least 1, got {recipe.parity.samples}"),
        *(
            (low <= limit <= high, f"parity.{name} must lie in [{low}, {high}], got {limit}")
            for name, limit, low, high in (
                ("max_relative_error", recipe.parity.max_relative_error, 0, 0.5),
                ("min_cosine", recipe.parity.min_cosine, 0.9, 1),
                ("min_top1_agreement", recipe.parity.min_top1_agreement, 0.9, 1),
            )
        ),
        (bool(recipe.export.formats), "export.formats is empty"),
        (len({one.name for one in recipe.compare}) == len(recipe.compare), "two [[compare]] have one name"),
    ]
    likeness = [
        *check_normalisation(recipe.data.normalise, "data"),
        *check_quality(recipe.quality),
        *check_refinement(recipe.refine),
    ]
    return [*(complaint for kept, complaint in rules if not kept), *likeness]
