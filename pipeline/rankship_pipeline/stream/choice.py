"""How a checkpoint is streamed, and what each block took."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.spare import count_cores

_MOST_WORKERS = 4  # by default: each holds a layer's matrices


@record
class StreamChoice:
    """How a checkpoint is streamed; `whitening` is a key of decompose.WHITENINGS, "swift" the fastest by far.

    With `curvature` errors are also weighed by their effect on the model's own predictions, from one backward pass
    (see backwards.py): as in memory, by the same code. Without it `precision` is that of the decompositions: float32
    takes half the time, but a layer whose spectrum is too steep for it (one massive activation is enough) is repeated
    in float64. Factors are stored as `dtype`, None for the weight's own. `workers` decompositions run at once, each on
    one thread, so that their number changes no byte; None: one per core, at most four. With a `scheduler` ("tcp://…")
    they run on the workers of a Dask cluster, with rankship installed on each. Dask runs any code that it receives: use
    it only on a network you trust. Layers that match a pattern in `exclude` stay dense. `shrink` is that of a recipe.
    """

    whitening: str = "swift"
    shrink: bool = True
    curvature: bool = False
    precision: Literal["float64", "float32"] = "float64"
    dtype: Literal["float32"] | None = None
    exclude: tuple[str, ...] = ()
    workers: int | None = None
    scheduler: str | None = None
    chunk_tokens: int = 2048
    seed: int = 0

    @property
    def threads(self) -> int:
        """How many decompositions run at once on this machine."""
        return self.workers or min(count_cores(), _MOST_WORKERS)


@record
class BlockTimes:
    """One block's wall times; `forward_seconds` does not include the Grams, which are computed during the same pass.

    With curvature it is the block's forward and backward pass together.
    """

    index: int
    load_seconds: float
    forward_seconds: float
    gram_seconds: float
    decompose_seconds: float
    write_seconds: float


def time_block(index: int, marks: Sequence[float], gram_seconds: float) -> BlockTimes:
    """A block's times by the clock: read before it was loaded, and after it was loaded, run, decomposed and written."""
    load, forward, decompose, write = (after - before for before, after in pairwise(marks))
    return BlockTimes(
        index=index,
        load_seconds=load,
        forward_seconds=forward - gram_seconds,
        gram_seconds=gram_seconds,
        decompose_seconds=decompose,
        write_seconds=write,
    )
