"""Runs the dense and the compressed model side by side from layer to layer, and sums what each layer is to make up for.

Both run on from one layer to the next, so that the whole takes about as long as two passes over the samples. Where that
is not exact, or the records would take too much memory, every layer takes passes from the beginning.
"""

from collections import Counter, deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.calibrate import find_dtype, split
from rankship_pipeline.evaluate.masks import find_masks, pick_mask
from rankship_pipeline.evaluate.rows import as_outputs, as_rows
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import Layer, get_layer
from rankship_pipeline.models.outputs import call
from rankship_pipeline.models.restart import DivergedError, Restart
from rankship_pipeline.models.watch import Ended, watch

_BYTES = 2**32  # of both models' records of all samples
_RECENT = 48  # inputs and outputs among which what is carried past a layer is looked for
_CLOSE = 1e-4  # of the largest number


@dataclass
class Lack:
    """Sums over positions of a layer's inputs x̂ in the compressed model and of what its outputs lack, d; float64.

    Products are those of the even and of the odd samples.
    """

    grams: Tensor  # X̂ᵀX̂ (2, columns, columns)
    cross: Tensor  # DᵀX̂ (2, rows, columns)
    read: Tensor  # of x̂ (columns,)
    lacked: Tensor  # of d (rows,)
    positions: int = 0

    def add(self, own: Tensor, D: Tensor, half: int) -> None:
        """Add rows of x̂ (positions, columns) and of d (positions, rows)."""
        own, D = (one.to(find_dtype(own.shape[1])) for one in (own, D))
        self.grams[half] += own.T @ own
        self.cross[half] += D.T @ own
        self.read += own.double().sum(0)
        self.lacked += D.double().sum(0)
        self.positions += len(own)


class SideBySide:
    """Both models on two halves of all samples."""

    def __init__(self, dense: nn.Module, student: nn.Module, names: Sequence[str], inputs: Inputs) -> None:
        self._models = (dense, student)
        halves = [(half, tuple(one[half::2] for one in inputs)) for half in range(min(2, len(inputs[0])))]
        self._batches = [(half, batch) for half, some in halves for batch in split(some)]
        held = _measure_held(dense, names, tuple(one[:1] for one in inputs))
        runs_on = held is not None and 2 * held * len(inputs[0]) <= _BYTES
        self._passes = [
            tuple(Restart(model, batch) if runs_on else None for model in self._models) for _, batch in self._batches
        ]

    @torch.inference_mode()
    def look(self, layer: Layer, weight: Tensor, sum_at: str | None) -> Lack:
        """Run on to a layer, and sum up what its outputs W·x̂ lack there, W being `weight` (rows, columns).

        It is W·(x − x̂), x being the dense model's inputs; or, with `sum_at`, the module that reads the outputs added
        to what is carried past the layer, the difference of these sums: what is carried lacks something too.
        """
        rows, columns = weight.shape
        lack = Lack(
            torch.zeros(2, columns, columns, dtype=torch.float64),
            torch.zeros(2, rows, columns, dtype=torch.float64),
            torch.zeros(columns, dtype=torch.float64),
            torch.zeros(rows, dtype=torch.float64),
        )
        module = get_layer(self._models[0], layer.name)
        for (half, batch), passes in zip(self._batches, self._passes, strict=True):
            masks = find_masks(self._models[0], batch)
            (x, s), (own, own_sum) = (
                _read(model, one, batch, layer.name, sum_at) for model, one in zip(self._models, passes, strict=True)
            )
            X, changed = (as_rows(module, one, pick_mask(masks, one.shape)) for one in (x, own))
            if sum_at is None:
                D = (X - changed).to(find_dtype(columns)) @ weight.to(find_dtype(columns)).T
            else:
                D = as_outputs(module, s - own_sum, pick_mask(masks, s.shape))
            lack.add(changed, D, half)
        return lack


def _read(
    model: nn.Module, restart: Restart | None, batch: Inputs, name: str, sum_at: str | None
) -> tuple[Tensor, Tensor]:
    """The inputs of a layer and of the module that reads the sum, at their first calls; without one, the layer's."""
    found: dict[str, Tensor] = {}
    last = sum_at or name

    def see(which: str, x: Tensor, _y: Tensor) -> None:
        found.setdefault(which, x)
        if which == last:
            raise Ended

    try:
        if restart is not None:
            restart.advance([model.get_submodule(name)])
    except DivergedError:  # this batch takes another way through the model
        restart = None
    with watch(model, {name, last}, see), suppress(Ended):
        if restart is None:
            model(*batch)
        else:
            restart.run()
    return found[name], found[last]


def _measure_held(model: nn.Module, names: Sequence[str], sample: Inputs) -> int | None:
    """The most bytes of one sample's record on the way through these layers; None where a pass cannot begin at one."""
    restart, most = Restart(model, sample), 0
    try:
        for name in names:
            restart.advance([model.get_submodule(name)])
            most = max(most, restart.held_bytes)
        found, full = restart.run(), call(model, sample)
    except Exception:  # noqa: BLE001 - a model with a state of its own may raise anything
        return None
    same = all(
        torch.allclose(found[name].double(), one.double(), rtol=_CLOSE, equal_nan=True) for name, one in full.items()
    )
    return most if same else None


@torch.inference_mode()
def find_sums(model: nn.Module, names: Collection[str], sample: Inputs) -> dict[str, str]:
    """The module that reads a layer's outputs added to what is carried past it, by the layer's name.

    Such a sum is the layer's output and another tensor that a module has read or given before. Modules that run several
    times are left out.
    """
    calls, earlier = Counter[str](), deque[Tensor](maxlen=_RECENT)
    waiting: tuple[str, Tensor] | None = None
    found: dict[str, str] = {}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        nonlocal waiting
        calls[name] += 1
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return
        if waiting is not None and waiting[0] not in found and _is_sum(x, waiting[1], earlier):
            found[waiting[0]] = name
        earlier.extend(one for one in (x, y) if isinstance(one, Tensor))
        if name in names:
            waiting = name, y

    leaves = [name for name, one in model.named_modules() if name and not any(True for _ in one.children())]
    with watch(model, leaves, see):
        model(*sample)
    return {layer: reader for layer, reader in found.items() if calls[layer] == calls[reader] == 1}


def _is_sum(x: Tensor, y: Tensor, earlier: Collection[Tensor]) -> bool:
    """Whether x is y and one of the tensors before it."""
    if x.shape != y.shape or not bool(y.any()):
        return False
    rest = x - y
    size = _CLOSE * float(x.abs().max())
    return float(rest.abs().max()) > size and any(
        one.shape == rest.shape and bool(((one - rest).abs() <= size).all()) for one in earlier
    )
