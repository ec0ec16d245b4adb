"""Runs the model twice before long work: to see that its answers are the same, and how fast and large it is here."""

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.models.watch import watch

T = TypeVar("T")

_SAMPLES = 8  # in each run
_SIDE = 320  # of the matrices by which this machine's arithmetic is timed
_TRIES = 3  # the fastest counts: others may be at work here


@record
class Pace:
    """How fast this machine runs one model, and what of its size no layer's shape tells.

    `forward_seconds`, `activation_bytes` and `output_bytes` are of one sample, `positions` the rows of one sample's
    input to each module that computes with a layer's weight, by its name. `operators` counts the nodes of the traced
    graph, None for a model without one. The rates are floating-point operations a second: products of float64 and of
    float32 matrices, and 9·n³ for an eigen-decomposition of n × n.
    """

    forward_seconds: float
    activation_bytes: int
    output_bytes: int
    positions: dict[str, int]
    product64_flops: float
    product32_flops: float
    eigen_flops: float
    operators: int | None = None


def measure_pace(model: nn.Module, inputs: Inputs, layers: Sequence[Layer]) -> Pace:
    """Run the model twice on a few samples; InputError where its outputs differ: no file could be compared with it."""
    sample = tuple(tensor[:_SAMPLES] for tensor in inputs)
    uses = {use.name: use for layer in layers for use in layer.uses}
    positions, written = dict.fromkeys(uses, 0), _Written()

    def count(name: str, x: Tensor, y: Tensor) -> None:
        use = uses[name]
        if use.kind == "convolution":
            positions[name] += y.numel() // use.rows
        else:
            positions[name] += x.numel() if use.kind == "embedding" else x.numel() // use.channels

    with torch.inference_mode():
        with watch(model, uses, count), written:
            first = tree_leaves(model(*sample))
        seconds, second = _time(lambda: tree_leaves(model(*sample)))
    _refuse_different(first, second)
    rows = len(sample[0])
    return Pace(
        forward_seconds=seconds / rows,
        activation_bytes=written.bytes // rows,
        output_bytes=sum(one.nbytes for one in second if isinstance(one, Tensor)) // rows,
        positions={name: max(1, count // rows) for name, count in positions.items()},
        product64_flops=_rate_product(torch.float64),
        product32_flops=_rate_product(torch.float32),
        eigen_flops=_rate_eigen(),
    )


class _Written(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Counts the bytes of every tensor that an operator writes; a view of its inputs is none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - torch's own
        """Run the operator and count."""
        output = function(*args, **(kwargs or {}))
        read = set(map(_find_storage, tree_leaves((args, kwargs))))
        for one in tree_leaves(output):
            if isinstance(one, Tensor) and _find_storage(one) not in read:
                self.bytes += one.numel() * one.element_size()
        return output


def _find_storage(value: object) -> int | None:
    """Where a tensor's numbers are; None for what is no tensor, or one without such a place, as a sparse one."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return None
    return value.untyped_storage().data_ptr()


def _refuse_different(first: Sequence[object], second: Sequence[object]) -> None:
    pairs = [(one, other) for one, other in zip(first, second, strict=False) if isinstance(one, Tensor)]
    if len(first) != len(second) or not all(_agree(one, other) for one, other in pairs):
        raise InputError(
            "the model's outputs differ from run to run on the same samples: it draws random numbers",
            hint="let dropout follow the module's mode (training=self.training), and draw no noise in evaluation mode",
        )


def _agree(one: Tensor, other: object) -> bool:
    """Whether two outputs are equal, but for what threads may sum in another order."""
    return (
        isinstance(other, Tensor)
        and one.shape == other.shape
        and torch.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True)
    )


def _rate_product(dtype: torch.dtype) -> float:
    matrix = torch.randn(_SIDE, _SIDE, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return 2 * _SIDE**3 / min(_time(lambda: matrix @ matrix)[0] for _ in range(_TRIES))


def _rate_eigen() -> float:
    matrix = torch.randn(_SIDE, _SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return 9 * _SIDE**3 / min(_time(lambda: torch.linalg.eigh(matrix + matrix.T))[0] for _ in range(_TRIES))


def _time(run: Callable[[], T]) -> tuple[float, T]:
    """The seconds that a call takes where nothing else runs, and its result.

    On one thread that is its processor time, on several the time that passes.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return min(time.perf_counter() - wall, time.process_time() - cpu), result
