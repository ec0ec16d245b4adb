"""Reads a recipe and checks its rules: every mistake is reported with its key before anything is loaded."""

import re
from math import inf
from pathlib import Path
from typing import Any

from rankship_pipeline.foundation.codec import read_toml
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.recipe.budget import AMOUNTS, TIMES, TOKEN_TIMES
from rankship_pipeline.recipe.choices import (
    DATA_KINDS,
    Comparison,
    QualityChoice,
    Recipe,
    RefineChoice,
    Source,
    choose,
    find_base,
    find_unit,
    list_sources,
)
from rankship_pipeline.recipe.export_choices import BATCH_AXIS, ExportChoice
from rankship_pipeline.recipe.merge_methods import METHODS, MergeMethod, check_count, check_settings
from rankship_pipeline.recipe.normalisation import Normalisation
from rankship_pipeline.recipe.precision import TYPES
from rankship_pipeline.recipe.rank_methods import RANK_METHODS

_LEAST_MS = 0.001


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe; InputError lists every mistake with the file and the key."""
    recipe = read_toml(Recipe, path, "recipe", _expand)
    refuse_held(recipe, str(path), "name files: `factory` with `weights` or `train`, `huggingface`; `loader`")
    check_recipe(recipe, str(path))
    return recipe


def _expand(table: dict[str, Any]) -> dict[str, Any]:
    """A recipe's table with an abbreviated `quality` written out."""
    given = table.get("quality")
    return table if not isinstance(given, str) else {**table, "quality": expand_quality(given)}


def expand_quality(given: str) -> dict[str, str]:
    """The table that `quality = "KIND"` or `quality = "file.py:function"` stands for."""
    return {"function" if ":" in given else "kind": given}


def refuse_held(recipe: Recipe, where: str, hint: str) -> None:
    """InputError, with this hint, for a recipe file whose models or data only a Python session holds."""
    held = [f"model {source.name!r}" for source in list_sources(recipe) if source.held]
    held += ["data"] if recipe.data.held else []
    if held:
        raise InputError(
            f"{where}: {', '.join(held)}: `held` is for models and data of a Python session, not for a recipe file",
            hint=hint,
        )


def check_recipe(recipe: Recipe, where: str) -> None:
    """Check the rules between the recipe's keys; InputError lists every mistake after `where`, the recipe's name."""
    complaints = [*_check_models(recipe), *_check_data(recipe), *_check_numbers(recipe), *_check_ways(recipe)]
    if complaints:
        raise InputError(f"{where}: " + "; ".join(complaints), hint="correct the recipe and run again")


def _check_models(recipe: Recipe) -> list[str]:
    complaints = []
    if not recipe.models:
        complaints.append("no [[models]]: name at least one trained model")
    sources = list_sources(recipe)
    names = [source.name for source in sources]
    complaints += [f"two models are called {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
    if not re.fullmatch(r"[\w][\w .-]*", recipe.name):
        complaints.append(f"name {recipe.name!r} names folders: use letters, digits, '_', '-', '.' and spaces")
    return [*complaints, *(complaint for source in sources for complaint in _check_source(source))]


def _check_source(source: Source) -> list[str]:
    """Complaints about one model's keys."""
    held, factory, hub = source.held, source.factory is not None, source.huggingface is not None
    weights, train, adapter = source.weights is not None, source.train is not None, source.adapter is not None
    files = factory or hub or weights or train or adapter
    rules = [
        (hub or source.task != "causal-lm", ': task "causal-lm" belongs to `huggingface`'),
        (len(set(source.labels)) == len(source.labels), ": two of its `labels` have the same name"),
        (not hub or not (weights or train), ": `weights` and `train` belong to a factory, not to `huggingface`"),
        (not (adapter and train), ": an adapter belongs to a model that is loaded, not to `train`"),
        (not (held and files), " is a module of a Python session (`held`): it takes no files"),
        (held or factory != hub, " needs exactly one of `factory` and `huggingface`"),
        (not factory or hub or weights != train, " needs exactly one of `weights` and `train` beside its factory"),
    ]
    complaints = [f"model {source.name!r}{complaint}" for kept, complaint in rules if not kept]
    return [*check_normalisation(source.normalise, f"model {source.name!r}"), *complaints]


def _check_data(recipe: Recipe) -> list[str]:
    """Complaints about [data]: several origins, a key of another origin, a number below one."""
    choice, factories = recipe.data, [source.name for source in recipe.models if source.huggingface is None]
    if choice.held:
        return ["data of a Python session (`held`) take no files"] if choice.given else []
    if len(choice.given) != 1:
        return [f"[data] needs exactly one of {', '.join(DATA_KINDS)}"]
    kind = next(iter(choice.given))
    belongs = {
        "size": {"images"},
        "channels": {"images"},
        "tokens": {"text", "csv"},
        "columns": {"text", "csv"},
        "label": {"text", "csv"},
        "calibration_samples": {"images", "text", "csv"},
        "test_samples": {"images", "text", "csv"},
    }
    complaints = [
        f"data.{key} belongs to {' and '.join(sorted(kinds))}, not to {kind}"
        for key, kinds in belongs.items()
        if getattr(choice, key) not in {None, ()} and kind not in kinds
    ]
    sides = choice.size if isinstance(choice.size, tuple) else (choice.size,)
    numbers = {"tokens": (choice.tokens,), "size": sides}
    numbers |= {key: (getattr(choice, key),) for key in ("calibration_samples", "test_samples")}
    complaints += [
        f"data.{key} must be at least 1, got {value}"
        for key, values in numbers.items()
        for value in values
        if value is not None and value < 1
    ]
    if kind == "text" and factories:
        complaints.append(
            f"data.text is for Hugging Face models, which have a tokenizer; {factories[0]!r} comes from a factory:"
            " give it a loader"
        )
    if kind != "loader" and recipe.merge.head is not None:
        complaints.append("with merge.head every model has its own task: the data must come from data.loader")
    return complaints


def _check_ways(recipe: Recipe) -> list[str]:
    """Complaints about the recipe's own way and about every [[compare]]."""
    ways = [("ranks", choose(recipe)), *((f"compare {way.name!r}", way) for way in recipe.compare)]
    complaints = [complaint for where, way in ways for complaint in check_way(way, where)]
    merges = [("merge", recipe.merge.method), *((where, way.merge) for where, way in ways[1:])]
    complaints += check_settings(merges, recipe.merge.given, has_base=find_base(recipe) is not None)
    if recipe.merge.base is not None and not any(METHODS[method].base for _, method in merges):
        complaints.append("no merge of this recipe uses merge.base: leave it out")
    complaints += check_count(merges, len(recipe.models))
    complaints += _check_alignment(recipe, [method for _, method in merges])
    unit, weights = find_unit(recipe), recipe.precision.weights
    if unit != "parameters":
        complaints += [
            f"{where}: the method {way.ranks!r} counts parameters, the budget is in {unit}: take one of"
            f" {', '.join(name for name, traits in RANK_METHODS.items() if traits.any_unit)}"
            for where, way in ways
            if not RANK_METHODS[way.ranks].any_unit
        ]
    if len(weights) > 1 and unit in {"bytes", "ns", "uj"}:
        complaints += [
            f"{where}: the method {way.ranks!r} takes one type of weights, precision.weights are {', '.join(weights)}:"
            ' take "knapsack", which chooses ranks and types together'
            for where, way in ways
            if way.ranks != "knapsack"
        ]
    return complaints


def check_precision(recipe: Recipe) -> list[str]:
    """Complaints about [precision], also beside the heads and formats of the recipe."""
    weights, activations = recipe.precision.weights, recipe.precision.activations
    floats, is_whole = activations == "float32", weights == ("float32",)
    rules = [
        (bool(weights), "precision.weights is empty"),
        (len(set(weights)) == len(weights), "precision.weights names a type twice"),
        (set(weights) <= set(TYPES), f"precision.weights must be of {', '.join(TYPES)}"),
        (activations != "static" or "int4" not in weights, "precision: int4 has no static activations in any format"),
        (
            is_whole or not floats or "executorch" not in recipe.export.formats,
            "precision: ExecuTorch runs no rounded weights with float32 activations: leave it out of export.formats",
        ),
        (
            recipe.refine is None
            or recipe.refine.rounding == "after"
            or not (is_whole or find_unit(recipe) in {"parameters", "flops"}),
            'refine.rounding = "through" needs types that the budget chooses: size_bytes, a time or an energy',
        ),
        (
            is_whole or recipe.merge.head is None,
            "precision: models with heads of their own (merge.head) are exported in float32 only",
        ),
    ]
    return [complaint for kept, complaint in rules if not kept]


def _check_alignment(recipe: Recipe, methods: list[MergeMethod]) -> list[str]:
    """Complaints about merge.align beside what it cannot help or does not know."""
    if recipe.merge.align is None:
        return []
    based = sorted({method for method in methods if METHODS[method].base})
    rules = [
        (len(recipe.models) > 1, "merge.align is for several models: leave it out for one"),
        (recipe.merge.head is None, "merge.align permutes whole models: leave merge.head out"),
        (not based, f"merge.align: {', '.join(based)} merge what was trained from one base, which needs no alignment"),
    ]
    return [complaint for kept, complaint in rules if not kept]


def check_way(way: Comparison, where: str) -> list[str]:
    """Complaints about one way, each beginning with `where`, its place in the recipe."""
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
        (
            "width" not in way.forms or (way.ranks == "knapsack" and "svd" in way.forms and way.whitening != "plain"),
            'the form "width" stands beside "svd", with the method "knapsack" and a whitening other than "plain"',
        ),
    ]
    return [f"{where}: {complaint}" for kept, complaint in rules if not kept]


def _rule_measured(recipe: Recipe) -> list[tuple[bool, str]]:
    """Rules on the keys that a time or energy budget needs and no other may have."""
    budget, formats = recipe.budget, recipe.export.formats
    costs, on, measured = budget.costs is not None, budget.on is not None, budget.unit in {"ns", "uj"}
    both, both_times = len(budget.limits) > 1, " and ".join(TOKEN_TIMES)
    return [
        (
            costs or on or both if measured else not costs,
            "budget.costs, a table measured on the device, belongs to latency and energy, which need it (or budget.on)",
        ),
        (
            not both or (on and not costs),
            f"budget: {both_times} need `on`, where both are measured, and no `costs`: a table is of one phase",
        ),
        (not on or budget.unit == "ns", f"budget.on belongs to {', '.join(TIMES)}"),
        *(
            (value >= _LEAST_MS, f"budget.{key} must be at least {_LEAST_MS}")
            for key, value in budget.amounts.items()
            if key in TIMES and key.endswith("_ms")
        ),
        (
            budget.prompt_tokens is None or bool(budget.amounts.keys() & TOKEN_TIMES),
            f"budget.prompt_tokens belongs to {both_times}",
        ),
        (budget.prompt >= 1, f"budget.prompt_tokens must be at least 1, got {budget.prompt_tokens}"),
        (budget.format is None or on, "budget.format belongs to budget.on"),
        (budget.format in {None, *formats}, f"budget.format is {budget.format}, export.formats {', '.join(formats)}"),
    ]


def _check_numbers(recipe: Recipe) -> list[str]:
    budget, ranks, threshold = recipe.budget, recipe.ranks, recipe.ranks.threshold
    given = budget.amounts
    rules = [
        (threshold is None or ranks.method == "arp", "ranks.threshold belongs to method 'arp' only"),
        (
            len(given) == (1 if threshold is None else 0) or (threshold is None and given.keys() == set(TOKEN_TIMES)),
            f"[budget] needs exactly one of {', '.join(AMOUNTS)}, or both times of tokens (none with ranks.threshold)",
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
                ("max_rounded_error", recipe.parity.max_rounded_error, 0, 0.5),
                ("min_rounded_cosine", recipe.parity.min_rounded_cosine, 0.9, 1),
                ("min_top1_agreement", recipe.parity.min_top1_agreement, 0.9, 1),
            )
        ),
        (bool(recipe.export.formats) or recipe.data.held, "export.formats is empty"),
        (recipe.merge.head is None or len(recipe.models) > 1, "merge.head is for several models: leave it out for one"),
        (len({one.name for one in recipe.compare}) == len(recipe.compare), "two [[compare]] have the same name"),
    ]
    return [
        *(complaint for kept, complaint in rules if not kept),
        *check_normalisation(recipe.data.normalise, "data"),
        *check_export(recipe.export),
        *check_quality(recipe.quality),
        *check_refinement(recipe.refine),
        *check_precision(recipe),
    ]


def check_normalisation(given: Normalisation | None, where: str) -> list[str]:
    """Complaints about one normalisation, beginning with `where`, its place in the recipe."""
    if given is None or (len(given.mean) == len(given.std) >= 1 and all(std > 0 for std in given.std)):
        return []
    return [
        f"{where}: normalise needs one positive std per mean, got mean {list(given.mean)} and std {list(given.std)}"
    ]


def check_export(choice: ExportChoice) -> list[str]:
    """Complaints about the ranges of [export]."""
    ranges = {f"export.axes {axis.name!r}": axis.range for axis in choice.axes}
    ranges |= {} if choice.batch is None else {"export.batch": choice.batch}
    complaints = [
        f"{where}: a range is two lengths, the smaller first, from 1 on, got {list(span)}"
        for where, span in ranges.items()
        if not 1 <= span[0] < span[1]
    ]
    if choice.batch is not None and choice.batch[0] != 1:
        complaints.append(f"export.batch must begin at 1, with which files are timed, got {list(choice.batch)}")
    names = [axis.name for axis in choice.axes]
    complaints += [
        f"export.axes: {name!r} is no name: use letters, digits and '_', and not 'batch'"
        for name in dict.fromkeys(names)
        if not name.isidentifier() or name == BATCH_AXIS
    ]
    complaints += [
        f"export.axes {axis.name!r}: axis must be at least 1, got {axis.axis}; axis 0 is export.batch"
        for axis in choice.axes
        if axis.axis < 1
    ]
    spans = {(axis.name, axis.range) for axis in choice.axes}
    complaints += [
        f"export.axes: {name!r} has two ranges" for name in set(names) if sum(n == name for n, _ in spans) > 1
    ]
    return complaints


def check_quality(choice: QualityChoice) -> list[str]:
    """Complaints about [quality]: the limits, and keys that exclude each other."""
    gates = {
        "max_merge_loss_points": choice.max_merge_loss_points,
        "max_loss_points": choice.max_loss_points,
    }
    rules = [
        (choice.kind is None or choice.function is None, "quality.kind and quality.function: give one"),
        (choice.function is None or ".py:" in choice.function, 'quality.function must be "file.py:function"'),
        (
            not choice.lower_is_better or choice.function is not None,
            "quality.lower_is_better belongs to quality.function",
        ),
    ]
    return [complaint for kept, complaint in rules if not kept] + [
        f"quality.{key} must lie in [0, 100], got {points}"
        for key, points in gates.items()
        if points is not None and not 0 <= points <= 100  # noqa: PLR2004 - points of a hundred
    ]


def check_refinement(choice: RefineChoice | None) -> list[str]:
    """Complaints about [refine]."""
    if choice is None:
        return []
    if not 0 < choice.step_size <= 1:
        return [f"refine.step_size must lie in (0, 1], got {choice.step_size}"]
    if choice.by == "blocks" and choice.augment != "none":
        return ['refine.augment changes images; with by = "blocks" it must be "none"']
    amounts = [one for one in (choice.cpu_seconds, choice.steps) if one is not None]
    if len(amounts) == 1 and amounts[0] > 0:
        return []
    return ["[refine] needs exactly one of cpu_seconds and steps, above zero"]
