"""Puts a model's neurons in the order of another's before merging: git re-basin's weight matching.

Networks trained from different starts have their neurons in different orders, and the mean of two weights of different
neurons is neither of them. Permuting a model's interchangeable neurons (interchange.py) changes
nothing that it computes; the permutations that bring its weights closest to the first model's are found by coordinate
descent, each by linear assignment (Ainsworth et al. 2022, §3.2).
"""

from collections.abc import Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from rankship_pipeline.align.interchange import Interchange, find_interchange
from rankship_pipeline.foundation.errors import MergeMismatch
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.weights import State

_PASSES = 100  # of the coordinate descent; it ends by itself, far earlier
_TOLERANCE = 1e-5  # of the largest output, in float64
_SAMPLES = 2
Orders = dict[int, Tensor]


def align_neurons(model: nn.Module, first: nn.Module, inputs: Inputs, *, name: str, seed: int = 0) -> nn.Module:
    """Permute the neurons of `model` in place to match the first model's, after a check of its outputs in float64.

    MergeMismatch where nothing in the model can be permuted, or where permuting would change what it computes.
    """
    sample = tuple(one[:_SAMPLES] for one in inputs)
    known = find_groups(model, sample, name=name)
    parameters = dict(model.named_parameters())
    orders = match_weights(known, parameters, dict(first.named_parameters()), seed)
    exact = tuple(one.double() if one.is_floating_point() else one for one in sample)
    model.double()
    expected = _answer(model, exact)
    model.load_state_dict(permute(model.state_dict(), known, orders))
    error = float((_answer(model, exact) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not error <= _TOLERANCE:
        raise MergeMismatch(
            f"model {name!r}: permuting its neurons moves its outputs by {error:.1e} of the largest",
            hint="leave merge.align out, and merge models that were trained from one",
        )
    return model.float()


def find_groups(model: nn.Module, sample: Inputs, *, name: str) -> Interchange:
    """What may be permuted in a model; MergeMismatch, with the operators in the way, where that is nothing."""
    try:
        known = find_interchange(model, sample)
    except Exception as failure:  # torch.export raises whatever it meets in a model's code
        raise _refuse(name, f"it cannot be traced: {type(failure).__name__}: {failure}") from failure
    if not known.free:
        raise _refuse(name, f"operators without a rule: {', '.join(known.unknown) or 'none'}")
    return known


def _refuse(name: str, reason: str) -> MergeMismatch:
    return MergeMismatch(
        f"merge.align: no neurons of model {name!r} are known to be interchangeable ({reason})",
        hint="leave merge.align out, and merge models that were trained from one",
    )


def match_weights(known: Interchange, ours: Mapping[str, Tensor], first: Mapping[str, Tensor], seed: int) -> Orders:
    """For each free atom its members' order that makes our weights most like the first model's, Σ ⟨first, permuted⟩."""
    views = {name: view for name, view in known.views.items() if name in ours and name in first}
    mine, theirs = (
        {name: state[name].detach().double().reshape(shape) for name, (_, shape) in views.items()}
        for state in (ours, first)
    )
    orders = {leaf: torch.arange(size) for leaf, size in known.free.items()}
    random = torch.Generator().manual_seed(seed)
    leaves = list(known.free)
    for _ in range(_PASSES):
        changed = False
        for place in torch.randperm(len(leaves), generator=random).tolist():
            leaf = leaves[place]
            likeness = torch.zeros(known.free[leaf], known.free[leaf], dtype=torch.float64)
            for name, (atoms, _) in views.items():
                for dim in (dim for dim, atom in enumerate(atoms) if atom == leaf):
                    moved = _move(mine[name], atoms, orders, but=dim)
                    likeness += _matricise(theirs[name], dim) @ _matricise(moved, dim).T
            found = torch.from_numpy(linear_sum_assignment(likeness.numpy(), maximize=True)[1])
            rows = torch.arange(len(found))
            if likeness[rows, found].sum() > likeness[rows, orders[leaf]].sum() + 1e-9 * likeness.abs().max():
                orders[leaf], changed = found, True
        if not changed:
            break
    return orders


def permute(state: Mapping[str, Tensor], known: Interchange, orders: Mapping[int, Tensor]) -> State:
    """A state with the members of every atom in these orders."""
    moved = dict(state)
    for name, (atoms, shape) in known.views.items():
        moved[name] = _move(state[name].reshape(shape), atoms, orders).reshape(state[name].shape)
    return moved


def _move(tensor: Tensor, atoms: tuple[int, ...], orders: Mapping[int, Tensor], but: int | None = None) -> Tensor:
    """A tensor in the shape of its atoms, permuted along every dimension but one."""
    for dim, atom in enumerate(atoms):
        if atom in orders and dim != but:
            tensor = tensor.index_select(dim, orders[atom])
    return tensor


def _matricise(tensor: Tensor, dim: int) -> Tensor:
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)


@torch.inference_mode()
def _answer(model: nn.Module, inputs: Inputs) -> Tensor:
    outputs: Tensor = model(*inputs)
    return outputs
