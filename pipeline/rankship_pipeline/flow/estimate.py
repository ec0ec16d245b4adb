"""Estimates what each stage of a build takes, from shapes, counts, the recipe's methods and this machine's pace alone.

Every formula counts the operations that a stage is made of; COSTS has what no count tells. The estimates are meant to
be right within a factor of two. `--profile` writes them beside what was measured, which is how COSTS is set.
"""

from collections.abc import Iterator, Mapping

from rankship_pipeline.evaluate.calibrate import fit_batch
from rankship_pipeline.factors.analysis import DECOMPOSED_BYTES
from rankship_pipeline.flow.pace import Pace
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.quantise.in_order import HELD_BYTES
from rankship_pipeline.recipe.choices import Comparison, Recipe, RefineChoice, choose, find_unit
from rankship_pipeline.recipe.merge_methods import METHODS, fill_settings
from rankship_pipeline.recipe.rank_methods import RANK_METHODS
from rankship_pipeline.recover.refine.by_blocks import HIDDEN_BYTES
from rankship_pipeline.recover.refine.draw import BATCH
from rankship_pipeline.recover.refine.teach import OUTPUT_BYTES

# What counting operations does not tell: set on x86-64 by `--profile` of small and middling models.
COSTS = {
    "backward": 2.0,  # forward passes that a backward pass takes
    "curvature samples": 256.0,
    "backward bytes": 1.1e9,  # that a backward pass keeps at most, of at most 32 samples
    "gram batch": 64.0,
    "rows per column": 128.0,  # of which a Gram is made, in both halves of the samples
    "least rows": 65_536.0,
    "patch seconds": 5e-9,  # an element of a layer's input as rows
    "svd": 20.0,  # × L·r² operations at an eigen-decomposition's pace, r the smaller side and L the larger
    "exact side": 640.0,  # beyond, an eigen-decomposition of the smaller side decomposes a weight
    "products": 6.0,  # of the weight and the Gram, for the errors of one form
    "solve": 7.0,  # how much slower than a product a Cholesky factor and a triangular solution are
    "eigens": 2.0,  # eigen-decompositions of a Gram that shrinking needs
    "exact columns": 1024.0,  # beyond, no eigen-decomposition of a Gram
    "probed columns": 2.0e4,  # operations for each of its n² elements instead
    "grid": 16.0,  # widths of a Tucker form that are tried
    "telling samples": 32.0,  # that tell two plans apart
    "candidates": 6.0,  # ways to store a layer whose divergence is measured
    "batch-norm": 2.0,  # passes over the calibration samples that settle the statistics: one, and parts of three
    "rounding": 10.0,  # rounding a layer over a product of its weight and its Gram
    "rounded samples": 512.0,
    "comparing": 2.0,  # passes over the calibration samples that compare a model with a source
    "blocks": 12.0,  # of a transformer
    "stage seconds": 0.1,  # reading, hashing and writing, whatever the size
    "byte seconds": 4e-9,  # the same for each byte of a model or a Gram
}
# Format: seconds until its toolchain is loaded, then for every file, for each node of its graph and for each byte of
# the model; bytes that the toolchain holds from then on.
EXPORTS: dict[Format, tuple[float, float, float, float, int]] = {
    "onnx": (0.5, 0.5, 0.008, 1e-8, 60_000_000),
    "tflite": (2.0, 2.0, 0.015, 2e-8, 300_000_000),
    "executorch": (5.0, 2.0, 0.025, 2e-8, 60_000_000),
}
_FLOAT64 = 512  # columns up to which a Gram's products are exact
_CHAINED = 1.5  # nodes of a compressed graph over those of the dense
_SPECTRAL = {"tsv-m", "iso-c", "knots", "ctm", "wudi"}  # merges that decompose every source's change


@record
class Work:
    """What a build is made of; `layers` without what is tied to others, `calibration` samples by source.

    `tests` are the test samples, `parameters` the model's, `has_norms` says that it has batch-norm statistics, and
    `resident_bytes` is what the process holds before the build.
    """

    recipe: Recipe
    pace: Pace
    layers: tuple[Layer, ...]
    calibration: Mapping[str, int]
    tests: int
    parameters: int
    has_norms: bool
    resident_bytes: int

    @property
    def samples(self) -> int:
        """All sources' calibration samples."""
        return sum(self.calibration.values())

    @property
    def uses(self) -> tuple[Layer, ...]:
        """Every module that has a Gram of its own."""
        return tuple(use for layer in self.layers for use in layer.uses)


@record
class StageEstimate:
    """What one stage takes: seconds where nothing else runs, resident bytes at its highest, and its costliest layers.

    `layer_seconds` are the parts of `seconds` that belong to a layer; `layer_bytes` are of what a layer adds to the
    memory.
    """

    name: str
    seconds: float
    peak_bytes: int
    layer_seconds: Mapping[str, float]
    layer_bytes: Mapping[str, int]


def estimate(work: Work) -> tuple[StageEstimate, ...]:
    """Every stage of a build from nothing, in order, by the titles that the stages show."""
    return tuple(_list_stages(work))


def _list_stages(work: Work) -> Iterator[StageEstimate]:
    recipe, way = work.recipe, choose(work.recipe)
    for source in recipe.models:
        yield _stage(work, f"{'train' if source.train else 'load'} {source.name}", 0.0, 2 * _model_bytes(work))
    for source in recipe.models:
        yield _calibrate(work, source.name, work.calibration[source.name])
    yield _merge(work, way)
    if way.whitening != "plain" and recipe.factorise.grams == "merged":
        yield _calibrate(work, "the merged model", work.samples)
    if way.curvature or any(one.curvature for one in recipe.compare):
        yield _weigh_outputs(work)
    yield _compress(work, way)
    if recipe.refine is not None:
        yield _refine(work, recipe.refine)
    models = 2 + (recipe.refine is not None)
    passes = (len(recipe.models) + models + len(recipe.compare)) * work.tests
    yield _stage(work, "score", passes * work.pace.forward_seconds, 2 * _model_bytes(work))
    alone = len(recipe.models) == 1  # the merged model is the source itself, which runs once
    compared = (models - alone / 2) * COSTS["comparing"] * work.samples
    yield _stage(work, "fidelity", compared * work.pace.forward_seconds, 2 * _model_bytes(work))
    types = recipe.precision.weights if find_unit(recipe) in {"parameters", "flops"} else recipe.precision.weights[:1]
    yield from (_round(work, one) for one in types if one != "float32")
    variants = ["dense", *map(_name_compressed, types)]
    yield from (_export(work, variant, name) for variant in variants for name in recipe.export.formats)
    done = {_merge(work, way).name}
    for other in recipe.compare:
        merged = _merge(work, other)
        if merged.name not in done:
            yield merged
        done.add(merged.name)
        yield _compress(work, other)


def _stage(
    work: Work,
    name: str,
    seconds: float,
    held_bytes: int,
    layer_seconds: Mapping[str, float] | None = None,
    layer_bytes: Mapping[str, int] | None = None,
) -> StageEstimate:
    """A stage of so many seconds and bytes besides those of its layers."""
    layer_seconds, layer_bytes = layer_seconds or {}, layer_bytes or {}
    return StageEstimate(
        name=name,
        seconds=COSTS["stage seconds"] + seconds + sum(layer_seconds.values()),
        peak_bytes=work.resident_bytes + held_bytes + sum(layer_bytes.values()),
        layer_seconds=layer_seconds,
        layer_bytes=layer_bytes,
    )


def _calibrate(work: Work, name: str, samples: int) -> StageEstimate:
    """Every layer's Gram on two halves of the samples, of some positions of a layer with many."""
    pace, batch = work.pace, min(samples, COSTS["gram batch"])
    seconds, patches = {}, 0
    for use in work.uses:
        rows = _count_rows(work, use, _side(use), samples)
        exact = _side(use) <= _FLOAT64
        products = 0.0 if use.kind == "embedding" else rows * _side(use) ** 2 * (2.0 if exact else 1.2)
        seconds[use.name] = rows * _width(use) * COSTS["patch seconds"]
        seconds[use.name] += products / (pace.product64_flops if exact else pace.product32_flops)
        patches = max(patches, int(batch / samples * rows * _width(use) * 12))
    grams = {use.name: int(1.5 * _gram_bytes(use)) for use in work.uses}  # one half in float64, one in float32
    written = sum(grams.values()) * COSTS["byte seconds"]
    held = patches + _model_bytes(work)
    return _stage(work, f"calibrate {name}", samples * pace.forward_seconds + written, held, seconds, grams)


def _weigh_outputs(work: Work) -> StageEstimate:
    pace, samples = work.pace, min(work.samples, COSTS["curvature samples"])
    seconds = {}
    for layer in work.layers:
        side = _curved_side(layer)
        seconds[layer.name] = 2.0 * _count_rows(work, layer, side, samples) * side**2 / pace.product32_flops
    matrices = {layer.name: 12 * _curved_side(layer) ** 2 for layer in work.layers}
    held = int(min(min(samples, 32) * pace.activation_bytes, max(COSTS["backward bytes"], pace.activation_bytes)))
    passes = (1 + COSTS["backward"]) * samples * pace.forward_seconds
    name = "weigh outputs by their effect on predictions"
    return _stage(work, name, passes, held + 2 * _model_bytes(work), seconds, matrices)


def _count_rows(work: Work, use: Layer, side: int, samples: float) -> float:
    """Rows of which a matrix of so many columns is made, of a layer's in all samples."""
    return min(samples * work.pace.positions[use.name], max(COSTS["rows per column"] * side, COSTS["least rows"]))


def _merge(work: Work, way: Comparison) -> StageEstimate:
    pace, sources = work.pace, len(work.recipe.models)
    needs, seconds = METHODS[way.merge], {}
    if sources == 1 and not needs.base:
        return _stage(work, "nothing to merge", 0.0, 3 * _model_bytes(work))
    for layer in work.layers:
        rows, columns = layer.rows, layer.columns
        wide = 1 if layer.kind == "embedding" else columns
        operations = sources * 4.0 * rows * columns * wide  # of what each source's inputs see
        if needs.data == "grams":
            operations += COSTS["solve"] * (2 / 3 * columns * wide**2 + 2 * rows * columns * wide)
        seconds[layer.name] = operations / pace.product64_flops
        if way.merge in _SPECTRAL:
            seconds[layer.name] += sources * _svd_seconds(work, layer)
        if way.merge == "sequential":
            asked = min(work.samples, fill_settings(way.merge, work.recipe.merge.given)["samples"])
            seconds[layer.name] += _refit_seconds(work, layer, int(asked))
    held = 2 * (sources + 2) * _model_bytes(work)
    grams = {use.name: 3 * sources * _gram_bytes(use) for use in work.uses}
    return _stage(work, f"merge by {way.merge}", _settle_seconds(work), held, seconds, grams)


def _compress(work: Work, way: Comparison) -> StageEstimate:
    recipe, pace = work.recipe, work.pace
    seconds, computed = {}, dict[str, int]()
    probes = min(recipe.ranks.probes, work.samples)
    rounds = (way.sensitivity == "kl") + way.passes
    weighed = way.whitening != "plain"
    for layer in work.layers:
        one = _metric_seconds(work, layer, way) if weighed else 0.0
        one += (3 if weighed else 1) * _svd_seconds(work, layer)  # of all samples and of each half
        one += _form_seconds(work, layer, way)
        one += rounds * COSTS["candidates"] * probes * pace.forward_seconds
        if way.reconstruct:
            one += _refit_seconds(work, layer, work.samples, 4 / len(work.layers))  # both models run on
        seconds[layer.name] = one
        sides = layer.rows + layer.columns
        computed[layer.name] = 8 * (2 * layer.parameters + min(layer.rows, layer.columns) * sides)
        computed[layer.name] += 16 * _curved_side(layer) ** 2 if way.curvature else 0
        computed[layer.name] += 2 * sum(map(_gram_bytes, layer.uses)) if weighed else 0  # halves, and what was shrunk
    kept = min(1.0, DECOMPOSED_BYTES / max(1, sum(computed.values())))
    held = {name: int(kept * nbytes) for name, nbytes in computed.items()}
    if weighed:
        largest = max(work.layers, key=_gram_bytes)
        held[largest.name] += (len(recipe.models) + 2) * _gram_bytes(largest)  # while its own is made
    trained = 0.0
    if RANK_METHODS[way.ranks].reads == "model":
        trained = recipe.ranks.steps * pace.forward_seconds * (1 + COSTS["backward"])
    elif way.sensitivity == "auto":
        trained = 3 * min(probes, COSTS["telling samples"]) * pace.forward_seconds  # two plans and the dense model
    return _stage(work, f"compress: {way.name}", trained + _settle_seconds(work), 3 * _model_bytes(work), seconds, held)


def _refine(work: Work, choice: RefineChoice) -> StageEstimate:
    """So many steps of a batch through all models, or of one through a block of two."""
    pace = work.pace
    batch = fit_batch(pace.output_bytes, OUTPUT_BYTES, BATCH)
    one = batch * pace.forward_seconds * (1 + COSTS["backward"] + len(work.recipe.models))
    held = int(batch * pace.activation_bytes)
    if choice.by == "blocks":
        one, held = one / COSTS["blocks"], int(held / COSTS["blocks"])
        held += min(HIDDEN_BYTES, int(work.samples * pace.activation_bytes / COSTS["blocks"]))
    seconds = choice.cpu_seconds if choice.cpu_seconds is not None else (choice.steps or 0) * one
    return _stage(work, "refine without labels", seconds, held + 6 * _model_bytes(work))


def _round(work: Work, precision: Precision) -> StageEstimate:
    """Every layer rounded by the Gram of its inputs, between two models that run on side by side."""
    pace = work.pace
    seconds = {
        layer.name: COSTS["rounding"] * (layer.rows + layer.columns) * layer.columns**2 / pace.product64_flops
        for layer in work.layers
        if layer.kind != "embedding"
    }
    samples = min(work.samples, COSTS["rounded samples"])
    records = min(2 * samples * pace.activation_bytes, HELD_BYTES)
    held = int(3 * _model_bytes(work) + records + pace.activation_bytes)
    return _stage(work, f"round weights to {precision}", 4 * samples * pace.forward_seconds, held, seconds)


def _name_compressed(precision: Precision) -> str:
    """The compressed model of a precision, as exports name it."""
    return "compressed" if precision == "float32" else f"compressed, {precision}"


def _export(work: Work, variant: str, name: Format) -> StageEstimate:
    loading, of_file, of_node, of_byte, _ = EXPORTS[name]
    first, formats = variant == "dense", work.recipe.export.formats
    nodes = (work.pace.operators or 0) * (1.0 if first else _CHAINED)
    seconds = (loading if first else 0.0) + of_file + of_node * nodes + of_byte * _model_bytes(work)
    loaded = formats[: formats.index(name) + 1] if first else formats
    held = 4 * _model_bytes(work) + sum(EXPORTS[one][-1] for one in loaded)
    return _stage(work, f"export {variant} to {name}", seconds, held)


def _metric_seconds(work: Work, layer: Layer, way: Comparison) -> float:
    """Shrinking the Gram and the curvature, and their roots."""
    pace, side = work.pace, _side(layer)
    seconds = COSTS["solve"] * _curved_side(layer) ** 3 / pace.product64_flops if way.curvature else 0.0
    if layer.kind == "embedding" or not way.shrink:
        return seconds
    if side > COSTS["exact columns"]:
        return seconds + COSTS["probed columns"] * side**2 / pace.product64_flops
    return seconds + COSTS["eigens"] * 9.0 * side**3 / pace.eigen_flops


def _form_seconds(work: Work, layer: Layer, way: Comparison) -> float:
    """The errors of the forms that take a convolution's kernel apart."""
    pace, size = work.pace, layer.kernel[0] * layer.kernel[1]
    if size == 1 or not RANK_METHODS[way.ranks].any_form:
        return 0.0
    seconds = 0.0
    for form, side in (("tucker", layer.channels), ("spatial", layer.channels * layer.kernel[0])):
        if form in way.forms:
            held = COSTS["solve"] * (layer.columns**3 / 3 + layer.rows * layer.columns**2) + 4.0 * layer.columns**3
            seconds += (held if form == "tucker" else held / 4) / pace.product64_flops
            seconds += 9.0 * side**3 / pace.eigen_flops
    if "tucker" in way.forms:
        seconds += COSTS["grid"] * 4.0 * layer.rows**3 / pace.eigen_flops
    return seconds


def _refit_seconds(work: Work, layer: Layer, samples: int, passes: float = 1.0) -> float:
    """Fitting one layer to what the layers before it give: passes through both models, three Grams, a solution.

    From the beginning to a layer in both models takes one pass on average.
    """
    pace, columns = work.pace, layer.columns
    products = 6.0 * samples * pace.positions[layer.name] * columns**2 + COSTS["solve"] * 2 / 3 * columns**3
    return passes * samples * pace.forward_seconds + products / pace.product64_flops + _svd_seconds(work, layer)


def _svd_seconds(work: Work, layer: Layer) -> float:
    """One whitened decomposition."""
    rows, columns = _curved_side(layer), _side(layer)
    short, long = sorted((rows, columns))
    if long <= COSTS["exact side"]:
        return (9.0 * columns**3 + COSTS["svd"] * long * short**2) / work.pace.eigen_flops
    products = COSTS["products"] * rows * columns * min(_width(layer), columns + rows)
    return 9.0 * short**3 / work.pace.eigen_flops + products / work.pace.product64_flops


def _settle_seconds(work: Work) -> float:
    return COSTS["batch-norm"] * work.samples * work.pace.forward_seconds if work.has_norms else 0.0


def _width(use: Layer) -> int:
    return 1 if use.kind == "embedding" else use.columns


def _side(use: Layer) -> int:
    """Columns of its Gram."""
    return use.rows if use.is_wide else use.columns


def _curved_side(layer: Layer) -> int:
    """Rows of its curvature."""
    return layer.columns if layer.is_tall else layer.rows


def _gram_bytes(use: Layer) -> int:
    return 8 * _side(use) * (1 if use.kind == "embedding" else _side(use))  # in float64


def _model_bytes(work: Work) -> int:
    return 4 * work.parameters
