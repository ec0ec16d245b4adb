"""Decomposes layers on threads of this machine or on the workers of a Dask cluster."""

import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rankship_pipeline.factors.decompose import (
    WHITENINGS,
    Spectrum,
    decompose_outputs,
    decompose_swift,
    fit_metric,
    truncate,
)
from rankship_pipeline.factors.decomposition import Decomposition
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.stream.choice import StreamChoice

Array = NDArray[np.floating[Any]]
# float32 is trusted only if the energy beyond the kept ranks exceeds this many float32 roundings of the largest, times
# the size: the tail is then accurate to 1e-4, measured on power-law spectra with and without an outlier.
_TRUSTED = 100
_TIMEOUT_S = 10  # for the scheduler to answer


@dataclass(frozen=True)
class Parts:
    """One layer taken apart: energy (r,) float64, B (keep, columns) and A (rows, keep) float32.

    `nats` is the divergence predicted from losing the layer, None without curvature; `shrinkage` the share of the
    inputs' correlations that the samples do not bear out, None where it was not found here.
    """

    energy: Array
    B: Array
    A: Array
    nats: float | None = None
    shrinkage: float | None = None


def take_apart(weight: Array, gram: Array, choice: StreamChoice, keep: int, *, by_output: bool) -> Parts:
    """One layer's energies and balanced factors; takes and returns arrays, so that it can run on any thread or machine.

    With `by_output` the Gram is that of the outputs.
    """
    for dtype in (torch.float32, torch.float64) if choice.precision == "float32" else (torch.float64,):
        W, G = torch.tensor(weight, dtype=dtype), torch.tensor(gram, dtype=dtype)
        if by_output:
            spectrum = decompose_outputs(W, G, keep)
        elif choice.whitening == "swift":
            spectrum = decompose_swift(W, G, keep)
        else:
            spectrum = WHITENINGS[choice.whitening](W, G)
        del W, G
        rounding = torch.finfo(dtype).eps * len(spectrum.sigma) * spectrum.energy[0]
        if spectrum.energy[keep:].sum() >= _TRUSTED * rounding:
            break
    return _cut(spectrum, keep)


def take_apart_curved(
    weight: Array, grams: Array, curvatures: Array, choice: StreamChoice, keep: int, *, samples: int
) -> Parts:
    """The same with errors weighed by their effect on the predictions too, from both matrices' halves (2, n, n).

    Either may be of the layer's smaller side (see decompose.fit_metric).
    """
    W = torch.tensor(weight)
    G, H = torch.from_numpy(grams), torch.from_numpy(curvatures)
    metric = fit_metric(W, G, H, samples, shrunk=choice.shrink)
    layer = Layer(name="", rows=W.shape[0], columns=W.shape[1])
    inner = metric.inner
    taken = Decomposition(layer, W.double() if inner is None else inner, metric, choice.whitening)
    taken = taken if inner is None else replace(taken, outer=W)
    found = taken.spectrum
    spectrum = replace(found, U=taken.restore_outputs(found.U), right=taken.restore_inputs(found.right))
    shrinkage = None if metric.evidence is None else metric.evidence.intensity
    return replace(_cut(spectrum, keep), nats=taken.total / 2 if bool(H.any()) else 0.0, shrinkage=shrinkage)


def _cut(spectrum: Spectrum, keep: int) -> Parts:
    A, B = truncate(spectrum, keep)
    return Parts(spectrum.energy.double().numpy(), B.float().numpy(), A.float().numpy())


@dataclass(frozen=True)
class Pool:
    """The workers that decompose layers: `hold` sends them an array, `submit` starts a call, whose `result()` waits."""

    hold: Callable[[Array], Any]
    submit: Callable[..., Any]


@contextmanager
def open_pool(choice: StreamChoice) -> Iterator[Pool]:
    """Open threads on this machine's cores (LAPACK releases the GIL; processes would copy), or a Dask cluster."""
    if choice.scheduler is None:
        with ThreadPoolExecutor(choice.threads) as executor:
            yield Pool(lambda array: array, lambda *given, **named: executor.submit(run_alone, *given, **named))
        return
    try:
        client = importlib.import_module("dask.distributed").Client(
            choice.scheduler, timeout=_TIMEOUT_S, set_as_default=False
        )
    except ImportError:
        raise InputError("scheduler: Dask is not installed", hint="pip install 'rankship[dask]'") from None
    except (OSError, ValueError) as failure:
        raise InputError(f"no Dask scheduler at {choice.scheduler}: {failure}", hint="run `dask scheduler`") from None
    with client:
        yield Pool(client.scatter, partial(client.submit, run_alone, pure=False))


def run_alone(function: Callable[..., Parts], *given: object, **named: object) -> Parts:
    """Call a function on one thread: how a product is shared among threads decides its last bits."""
    torch.set_num_threads(1)
    return function(*given, **named)
