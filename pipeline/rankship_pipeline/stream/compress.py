"""Compresses a decoder far larger than memory: analyses, decomposes and writes one block at a time.

    analyse_stream   each block's Grams, and curvatures where asked (backwards.py; else forwards.py), and its layers'
                     factors up to the break-even rank, one file per block
    allocate_stream  ranks for every layer from the spectra only (see ranks/plan.py)
    write_stream     factors cut to the plan's ranks, and every other tensor unchanged, in shards (write.py)

Memory is bounded by the largest block in float32 with its Grams and curvatures of two halves of the samples and its
factors, or by the embedding or head if that is larger. Hidden states of the calibration set are on disk, float32, the
even samples before the odd ones. Only the blocks' linear layers are factored. job.py is the whole of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rankship_pipeline.factors.decompose import WHITENINGS
from rankship_pipeline.factors.forms import keep_efficient
from rankship_pipeline.foundation.codec import digest, encode
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.records import Factors, RankPlan, Stored
from rankship_pipeline.foundation.toolchain import hash_code, list_versions
from rankship_pipeline.models.decoder import Decoder, open_decoder
from rankship_pipeline.models.layers import Layer, count_parameters, find_layers
from rankship_pipeline.ranks.plan import allocate
from rankship_pipeline.ranks.stats import LayerStats, Offer
from rankship_pipeline.recipe.choices import RankChoice
from rankship_pipeline.recipe.rank_methods import RANK_METHODS
from rankship_pipeline.stream.analysis import StreamAnalysis
from rankship_pipeline.stream.backwards import Backwards
from rankship_pipeline.stream.choice import BlockTimes, StreamChoice
from rankship_pipeline.stream.forwards import Forwards
from rankship_pipeline.stream.progress import Begin, ignore
from rankship_pipeline.stream.workers import open_pool

_LEFT_BEHIND = ("inputs-*.f32", "gradients-*.f32", ".*.tmp")


def analyse_stream(
    checkpoint: Path,
    tokens: Tensor,
    folder: Path,
    choice: StreamChoice,
    tick: Callable[[BlockTimes], None] = lambda _times: None,
    begin: Begin = ignore,
) -> StreamAnalysis:
    """Decompose every block's linear layers, calibrated on unpadded ids (samples, positions).

    Finished blocks are in a subfolder of `folder`, named by a hash of the configuration, the checkpoint files' names,
    sizes and times, the ids, the choice and this package's code; none is done twice. `tick` is called after each
    new block.
    """
    decoder = open_decoder(checkpoint)
    _check(decoder, tokens, choice)
    layers = list_block_layers(decoder, choice.exclude)
    place = folder / f"analysis-{_make_key(decoder, tokens, choice)}"
    place.mkdir(parents=True, exist_ok=True)
    samples = None if choice.whitening == "plain" and not choice.curvature else len(tokens)
    analysis = StreamAnalysis(folder=place, decoder=decoder, layers=layers, samples=samples)
    if analysis.missing:
        kind = Backwards if choice.curvature else Forwards
        with open_pool(choice) as pool:
            kind(analysis, tokens, choice, begin, tick).run(pool)
        for path in [one for pattern in _LEFT_BEHIND for one in place.glob(pattern)]:
            path.unlink()
    return analysis


def list_block_layers(decoder: Decoder, exclude: Sequence[str] = ()) -> tuple[Layer, ...]:
    """The linear layers of the blocks that match no pattern."""
    found = [layer for layer in find_layers(decoder.model, tuple(exclude)) if layer.kind == "linear"]
    return tuple(layer for layer in found if decoder.find_block(layer.name) is not None)


def gather_stream_stats(analysis: StreamAnalysis, choice: RankChoice) -> tuple[LayerStats, ...]:
    """The stats that allocation needs; InputError for methods that need more than whitened spectra."""
    refuse_unstreamed(choice)
    stats = []
    for layer in (one for one in analysis.layers if not any(fnmatchcase(one.name, name) for name in choice.exclude)):
        bare = LayerStats(layer=layer, plain=np.zeros(0), energy=analysis.read_energy(layer.name), candidates=())
        offers = [Stored(factors=Factors(rank=rank)) for rank in bare.list_ranks(choice.step)]
        candidates = [Offer(one, bare.find_cost(one), bare.predict_error(one)) for one in offers]
        stats.append(replace(bare, nats=analysis.read_nats(layer.name), candidates=keep_efficient(candidates)))
    return tuple(stats)


def allocate_stream(analysis: StreamAnalysis, budget_parameters: int, choice: RankChoice) -> RankPlan:
    """Allocate ranks under a budget for the whole model, with embedding, head, norms and biases.

    The sensitivity "auto" is "gradient" where there is curvature, which suits language models, else "relative".
    Errors are those on the shrunk Grams: a loss on unseen samples would take two more decompositions of every layer.
    losses.list_doubts says of the plan where samples were few.
    """
    stats = gather_stream_stats(analysis, choice)
    curved = all(entry.nats is not None for entry in stats)
    if choice.sensitivity == "gradient" and not curved:
        raise InputError(
            'sensitivity "gradient" needs the curvature, and this analysis has none',
            hint='analyse with curvature = True, or choose the sensitivity "relative"',
        )
    if choice.sensitivity == "auto":  # trying both plans would stream the model twice more
        choice = replace(choice, sensitivity="gradient" if curved else "relative")
    factorable = sum(entry.layer.parameters for entry in stats)
    plan = allocate(stats, count_parameters(analysis.decoder.model) - factorable, budget_parameters, choice)
    ranks = tuple(replace(one, shrinkage=analysis.read_shrinkage(one.name)) for one in plan.layers)
    return replace(plan, layers=ranks, calibration_samples=analysis.samples)


def refuse_unstreamed(choice: RankChoice) -> None:
    """InputError for methods and sensitivities that run the whole model."""
    if RANK_METHODS[choice.method].reads != "spectra" or choice.sensitivity == "kl":
        raise InputError(
            f"ranks by {choice.method!r} with sensitivity {choice.sensitivity!r} need the whole model in memory",
            hint='a streamed model has only whitened spectra: choose "knapsack", "uniform" or "strs", and'
            ' "gradient" or "relative" as sensitivity',
        )


def _check(decoder: Decoder, tokens: Tensor, choice: StreamChoice) -> None:
    vocabulary = decoder.model.config.get_text_config().vocab_size
    is_table = tokens.ndim == 2 and tokens.dtype == torch.int64 and tokens.numel() > 0  # noqa: PLR2004
    if not is_table or int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise InputError(
            f"calibration tokens of {tokens.dtype}, shape {list(tokens.shape)}, do not fit",
            hint=f"give int64 (samples, positions), from 0 to {vocabulary - 1}",
        )
    if choice.whitening not in WHITENINGS:
        raise InputError(f"no whitening {choice.whitening!r}", hint=f"choose one of {', '.join(WHITENINGS)}")


def _make_key(decoder: Decoder, tokens: Tensor, choice: StreamChoice) -> str:
    """The first 16 characters of the hash of everything that affects the analysis."""
    ingredients = {
        "config": hash_file(decoder.checkpoint.folder / "config.json"),
        "files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in decoder.checkpoint.files},
        "tokens": [*tokens.shape, sha256(tokens.contiguous().numpy().tobytes()).hexdigest()],
        "choice": encode(replace(choice, workers=None, scheduler=None)),
        "code": [hash_code(), list_versions()],
    }
    return digest(ingredients)[:16]
