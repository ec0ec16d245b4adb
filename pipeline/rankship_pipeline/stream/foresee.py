"""Says before a stream how much memory and disk it will take, and refuses one that this machine cannot hold."""

import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path

from rankship_pipeline.evaluate.calibrate import find_dtype
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.spare import find_free_bytes
from rankship_pipeline.foundation.units import show_bytes
from rankship_pipeline.models.decoder import Decoder
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.stream.choice import StreamChoice

# Refused where even this part of the estimate is more than is free.
_CERTAIN = 2 / 3
_FLOAT, _DOUBLE = 4, 8
# Matrices in float64 that one decomposition holds at once: of the weight's shape, and of its smaller side's.
_WHOLE, _SQUARE = 3, 8
_ACTIVATIONS = 24  # tensors of a block that a backward pass keeps, of the width or a quarter of the MLP's
_LOGITS = 6  # copies of 256 MB of logits
_PROCESS_BYTES = 600_000_000  # torch and transformers themselves


@record
class Needs:
    """About how much memory and disk a stream takes at its peak; disk beside the checkpoint itself."""

    memory_bytes: int
    disk_bytes: int


def foresee_stream(
    decoder: Decoder, layers: Sequence[Layer], choice: StreamChoice, samples: int, tests: int, length: int
) -> Needs:
    """The needs of analysis, written model and perplexity, of so many windows of `length` tokens."""
    config = decoder.model.config.get_text_config()
    headers = decoder.checkpoint.read_headers()
    in_block = [prod(one.shape) for name, one in headers.items() if decoder.find_block(name) == 0]
    first = [one for one in layers if decoder.find_block(one.name) == 0]
    sides = [min(one.rows, one.columns) for one in first]
    grams = sum(2 * _DOUBLE * side**2 for side in sides)
    curvatures = sum(2 * find_dtype(side).itemsize * side**2 for side in sides) if choice.curvature else 0
    works = [one.parameters * _WHOLE + min(one.rows, one.columns) ** 2 * _SQUARE for one in first]
    apart = _DOUBLE * sum(sorted(works)[-choice.threads :]) if choice.scheduler is None else 0
    tokens = max(choice.chunk_tokens, length)
    running = _FLOAT * tokens * config.hidden_size * _ACTIVATIONS + _FLOAT * tokens * max(
        (one.rows for one in first), default=0
    )
    block = _FLOAT * sum(in_block) + grams + curvatures + max(running, apart + 2 * _FLOAT * sum(in_block))
    head = _FLOAT * config.vocab_size * config.hidden_size + _LOGITS * 2**28
    hidden = _FLOAT * length * config.hidden_size
    kept = hidden * samples * (decoder.count + 3 if choice.curvature else 2)
    stored = sum(path.stat().st_size for path in decoder.checkpoint.files)
    return Needs(
        memory_bytes=_PROCESS_BYTES + max(block, head),
        disk_bytes=max(kept + hidden * 2 * tests + stored, 2 * stored + hidden * 2 * tests),
    )


def refuse_lack(needs: Needs, place: Path, used_bytes: int) -> str | None:
    """InputError where disk or memory will not do; else a sentence of doubt, or None.

    `used_bytes` of the disk are what an earlier run of the same command has left.
    """
    free = shutil.disk_usage(place).free
    if needs.disk_bytes - used_bytes > free:
        raise InputError(
            f"the stream needs about {show_bytes(needs.disk_bytes)} of disk, and {place} has {show_bytes(free)} free",
            hint="name another folder with --to, or another one for intermediate files with --work; or take fewer"
            " samples",
        )
    memory = find_free_bytes()
    if needs.memory_bytes * _CERTAIN > memory:
        raise InputError(
            f"the stream needs about {show_bytes(needs.memory_bytes)} of memory and {show_bytes(memory)} are free",
            hint="take fewer --workers, or let those of a Dask cluster do it (--scheduler)",
        )
    return (
        f"that is more memory than the {show_bytes(memory)} that are free: it may not fit"
        if needs.memory_bytes > memory
        else None
    )
