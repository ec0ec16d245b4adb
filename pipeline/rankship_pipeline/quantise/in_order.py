"""Rounds a model's weights operator by operator, in the order in which they run, by the inputs that they then have.

Each operator is refitted to the float model's inputs before it is rounded, so that it makes up for what was rounded
before it: the second factor of a chain for the first, a layer for all layers before. Both models run on from operator
to operator, so that the whole takes about as long as two passes over the samples.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.calibrate import fit_batch, share_rows, split, thin
from rankship_pipeline.evaluate.masks import find_masks, pick_mask
from rankship_pipeline.evaluate.rows import as_rows, sample_rows
from rankship_pipeline.factors.rebuild import Chain
from rankship_pipeline.foundation import profile
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import describe, find_kind, get_layer, is_factorable
from rankship_pipeline.models.restart import DivergedError, Restart
from rankship_pipeline.models.watch import Ended, watch
from rankship_pipeline.quantise.basis import choose_bases
from rankship_pipeline.quantise.grid import Grid, find_block, is_on_grid, read_rows, write_rows
from rankship_pipeline.quantise.rounding import round_matrix
from rankship_pipeline.quantise.sizes import OFFERED, Offered

_SAMPLES = 512  # at most; positions of images and texts are many more
HELD_BYTES = 2**31  # of both models' records of all samples
_BATCH_BYTES = 2**28  # of an operator's outputs in a batch
_RIDGE = 1e-3  # added to the Gram as a share of its diagonal, and as much again as there are columns to a position
_LOWER: dict[Precision, Precision] = {"int4": "int8", "int8": "float32"}  # what a weight has that cannot have a type


def find_grids(model: nn.Module, weights: Mapping[str, Precision], offered: Offered = OFFERED) -> dict[str, Grid]:
    """The grid of every operator that is rounded, by its torch name; `weights` are the types of layers, by name.

    A layer that is a chain has all its operators rounded. An operator that cannot have its type has the next one: int8
    for int4, and float32 for int8.
    """
    grids = {}
    for layer, wanted in weights.items():
        module = model.get_submodule(layer)
        names = [f"{layer}.{at}" for at in range(len(module))] if isinstance(module, Chain) else [layer]
        for name in names:
            grid = _find_grid(model.get_submodule(name), wanted, offered)
            if grid is not None:
                grids[name] = grid
    return grids


def _find_grid(module: nn.Module, wanted: Precision, offered: Offered) -> Grid | None:
    kind = find_kind(module)
    columns = read_rows(module).shape[1] if is_factorable(module) else 0
    while kind is not None and wanted != "float32":
        if offered.allows(kind, columns, wanted):
            return Grid(precision=wanted, block=find_block(kind, columns, wanted))
        wanted = _LOWER[wanted]
    return None


def round_layers(
    model: nn.Module,
    weights: Mapping[str, Precision],
    inputs: Inputs,
    offered: Offered = OFFERED,
    begin: Callable[[str], None] = lambda _name: None,
) -> nn.Module:
    """A copy of the model with the layers' weights on the grids of `find_grids`; `inputs` are calibration samples.

    `begin` gets the name of each operator before it is rounded.
    Weights stay float tensors. The basis between two factors is the one that loses less (see basis.py), and a bias
    takes up what is left of the difference of the means. Batch-norm statistics are not changed: settle them after.
    An embedding, what runs several times as a recurrent network's layers do, and what is too wide for a Gram is rounded
    to the nearest. A model all of whose weights are on their grids stays as it is: all float32, or refined through the
    rounding.
    """
    student, grids = copy.deepcopy(model).eval(), find_grids(model, weights, offered)
    rows = ((read_rows(get_layer(model, name)), one) for name, one in grids.items())
    if all(is_on_grid(matrix, one.precision, one.block) for matrix, one in rows):
        return student
    choose_bases(student, [name for name in weights if isinstance(student.get_submodule(name), Chain)], grids, inputs)
    teacher = copy.deepcopy(student)
    calls, widest = _count_calls(student, grids, inputs)
    held = _measure_held(student, [name for name, count in calls.items() if count == 1], inputs)
    taken = thin(inputs, fit_batch(2 * held, HELD_BYTES, _SAMPLES))
    run = _Run(teacher, student, split(taken, fit_batch(widest, _BATCH_BYTES)))
    for name in [*calls, *(one for one in grids if one not in calls)]:
        begin(name)
        with profile.layer(name):
            seen = run.look(name) if calls.get(name) == 1 and _has_gram(student, name) else None
            _round(student, name, grids[name], seen)
    return student


@torch.no_grad()
def round_nearest(model: nn.Module, weights: Mapping[str, Precision], offered: Offered = OFFERED) -> None:
    """Put the layers' weights on the grids of `find_grids`, in place, whatever the inputs are."""
    for name, grid in find_grids(model, weights, offered).items():
        _round(model, name, grid, None)


def _has_gram(model: nn.Module, name: str) -> bool:
    """Whether a Gram of the operator's inputs says anything, and has a place in memory."""
    layer = describe(name, get_layer(model, name))
    return layer.kind != "embedding" and not layer.is_wide


@dataclass
class Seen:
    """What an operator reads, summed over positions: x̂ in the rounded model and x in the float one, float64."""

    gram: Tensor  # X̂ᵀX̂ (columns, columns)
    cross: Tensor  # XᵀX̂ (columns, columns)
    mean: Tensor  # of x (columns,)
    own_mean: Tensor  # of x̂
    positions: int

    def damp(self) -> Tensor:
        """What is added to the Gram's diagonal (columns,): more where positions are few for the columns."""
        share = _RIDGE + len(self.gram) / max(1, self.positions)
        diagonal = self.gram.diagonal()
        return share * (diagonal + diagonal.mean())

    def refit(self, matrix: Tensor) -> Tensor:
        """The weights (rows, columns) that give on x̂ what the matrix gives on x, pulled towards the matrix."""
        ridge = self.damp().diag()
        solved: Tensor = torch.linalg.solve(self.gram + ridge, matrix @ (self.cross + ridge), left=False)
        return solved


@torch.no_grad()
def _round(student: nn.Module, name: str, grid: Grid, seen: Seen | None) -> None:
    module = get_layer(student, name)
    before = read_rows(module).double()
    if seen is None or not bool(seen.gram.any()):
        write_rows(module, round_matrix(before, grid.precision, None, grid.block))
        return
    gram = seen.gram + seen.damp().diag()
    found = round_matrix(seen.refit(before), grid.precision, gram, grid.block).to(module.weight.dtype).double()
    write_rows(module, found)
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        bias += (before @ seen.mean - found @ seen.own_mean).to(bias.dtype)


class _Run:
    """Both models on all samples, batch by batch, each batch stopped at the operator that is looked at."""

    def __init__(self, teacher: nn.Module, student: nn.Module, batches: list[Inputs]) -> None:
        self._models = (teacher, student)
        self._batches = batches
        self._masks = [find_masks(teacher, batch) for batch in self._batches]
        self._passes = [tuple(Restart(model, batch) for model in self._models) for batch in self._batches]
        self._samples = sum(len(batch[0]) for batch in self._batches)

    def look(self, name: str) -> Seen | None:
        """Run on to the operator, and sum up what it reads; None where a batch does not call it."""
        seen: Seen | None = None
        module = get_layer(self._models[0], name)
        for turn, (passes, masks, batch) in enumerate(zip(self._passes, self._masks, self._batches, strict=True)):
            try:
                both = [_read(model, one, name) for model, one in zip(self._models, passes, strict=True)]
            except DivergedError:
                return None
            rows = [as_rows(module, x, pick_mask(masks, x.shape)) for x in both]
            share = share_rows(rows[0].shape[1], len(rows[0]), len(batch[0]), self._samples)
            X, own = (sample_rows(one, share, turn)[0].double() for one in rows)
            part = Seen(own.T @ own, X.T @ own, X.sum(0), own.sum(0), len(X))
            seen = part if seen is None else _add(seen, part)
        if seen is not None and seen.positions:
            seen.mean, seen.own_mean = seen.mean / seen.positions, seen.own_mean / seen.positions
        return seen


def _add(one: Seen, other: Seen) -> Seen:
    return Seen(
        one.gram + other.gram,
        one.cross + other.cross,
        one.mean + other.mean,
        one.own_mean + other.own_mean,
        one.positions + other.positions,
    )


def _read(model: nn.Module, restart: Restart, name: str) -> Tensor:
    """The operator's input at its first call."""
    restart.advance([model.get_submodule(name)])
    found: list[Tensor] = []

    def see(_name: str, x: Tensor, _y: Tensor) -> None:
        found.append(x)
        raise Ended

    with watch(model, [name], see), suppress(Ended):
        restart.run()
    return found[0]


def _measure_held(model: nn.Module, names: Sequence[str], inputs: Inputs) -> int:
    """The most bytes of one sample's record on the way through these operators."""
    restart, most = Restart(model, tuple(tensor[:1] for tensor in inputs)), 0
    for name in names:
        with suppress(DivergedError):
            restart.advance([model.get_submodule(name)])
        most = max(most, restart.held_bytes)
    return most


@torch.inference_mode()
def _count_calls(model: nn.Module, names: Mapping[str, Grid], inputs: Inputs) -> tuple[Counter[str], int]:
    """How often each operator runs on one sample, in the order of first calls; and the most bytes that one gives."""
    calls, sizes = Counter[str](), [0]

    def see(name: str, _x: Tensor, y: Tensor) -> None:
        calls[name] += 1
        sizes.append(y.nbytes)

    with watch(model, names, see):
        model(*(tensor[:1] for tensor in inputs))
    return calls, max(sizes)
