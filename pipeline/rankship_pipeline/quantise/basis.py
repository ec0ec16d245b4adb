"""Chooses the basis between a chain's operators in which rounding loses less.

Between two operators any invertible matrix may stand with its inverse. An orthogonal one spreads the energy of the
components over all of them, so that no single component sets the scale of a row (QuaRot, arXiv 2404.00456).
"""

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from rankship_pipeline.factors.rebuild import Chain
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import is_factorable
from rankship_pipeline.models.watch import watch
from rankship_pipeline.quantise.grid import Grid, read_rows, write_rows
from rankship_pipeline.quantise.rounding import round_matrix

_SAMPLES = 16


def rotate(size: int, like: Tensor) -> Tensor:
    """A fixed random orthogonal matrix (size, size) of this tensor's type."""
    draws = torch.randn(size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    Q, R = torch.linalg.qr(draws)
    turn: Tensor = (Q * R.diagonal().sign()).to(like)
    return turn


def turn_link(first: Tensor, second: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Two neighbours' weights (k, …) and (rows, k, …) with an orthogonal `turn` (k, k) between, and its inverse."""
    turned = (turn @ first.flatten(1)).reshape(first.shape)
    return turned, torch.einsum("ok...,jk->oj...", second, turn)


@torch.no_grad()
def choose_bases(model: nn.Module, chains: Sequence[str], grids: Mapping[str, Grid], inputs: Inputs) -> None:
    """Rotate the links of every named chain, in place, if its outputs on some samples are then rounded better."""
    rounded = [name for name in chains if all(f"{name}.{at}" in grids for at in range(len(_get(model, name))))]
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        seen.setdefault(name, (x.clone(), y.clone()))

    with watch(model, rounded, see):
        model(*(tensor[:_SAMPLES] for tensor in inputs))
    for name, (x, y) in seen.items():
        chain = _get(model, name)
        turned = copy.deepcopy(chain)
        _turn_all(turned)
        of_each = [grids[f"{name}.{at}"] for at in range(len(chain))]
        if _measure(turned, of_each, x, y) < _measure(chain, of_each, x, y):
            chain.load_state_dict(turned.state_dict())


def _measure(chain: Chain, grids: Sequence[Grid], x: Tensor, y: Tensor) -> float:
    """The squared error of a chain's output, its weights rounded to the nearest."""
    rounded = copy.deepcopy(chain)
    for module, grid in zip(rounded.children(), grids, strict=True):
        if is_factorable(module):
            write_rows(module, round_matrix(read_rows(module), grid.precision, None, grid.block))
    return float((rounded(x) - y).square().sum())


def _turn_all(chain: Chain) -> None:
    for first, second in pairwise(chain.children()):
        assert is_factorable(first) and is_factorable(second)  # noqa: S101, PT018 - made by factors/forms
        weight = first.weight.T if isinstance(first, nn.Embedding) else first.weight
        turned, after = turn_link(weight, second.weight, rotate(len(weight), weight))
        first.weight.copy_(turned.T if isinstance(first, nn.Embedding) else turned)
        second.weight.copy_(after)


def _get(model: nn.Module, name: str) -> Chain:
    chain = model.get_submodule(name)
    assert isinstance(chain, Chain)  # noqa: S101 - the caller's names are those of chains
    return chain
