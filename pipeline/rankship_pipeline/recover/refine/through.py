"""Refinement through the rounding: the student computes with rounded weights while their floats learn.

The gradient passes through the rounding as if it were not there (straight-through, Bengio et al. 2013, arXiv
1308.3432), and every row's or block's scale is learned by its logarithm, after LSQ (Esser et al. 2020, arXiv
1902.08153).
"""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankship_pipeline.models.layers import Factorable, get_layer, stores_inputs_first
from rankship_pipeline.quantise.grid import LARGEST, Grid, find_scales, read_rows

_LEAST = 1e-12  # the scale of a row of zeros


class RoundedWeights(nn.Module):
    """Rounds a module's weight to its grid with scales that are learned; gradients pass through.

    A scale is never so large that no weight of its row or block reaches the grid's largest integer (see grid.py).
    """

    def __init__(self, module: Factorable, grid: Grid) -> None:
        super().__init__()
        self.limit, self.block, self.is_turned = LARGEST[grid.precision], grid.block, stores_inputs_first(module)
        self.logs = nn.Parameter(find_scales(read_rows(module), grid.precision, grid.block).log())

    def forward(self, weight: Tensor) -> Tensor:
        """Map the float weight to the rounded one."""
        turned = weight.transpose(0, 1) if self.is_turned else weight
        cut = turned.reshape(*self.logs.shape, -1)
        most = (cut.detach().abs().amax(2) / self.limit).clamp_min(_LEAST)
        scales = torch.minimum(self.logs.exp(), most)[:, :, None]
        if self.block is not None:
            scales = _pass(scales.bfloat16().to(scales), scales)
        exact = (cut / scales).clamp(-self.limit, self.limit)
        rounded = (_pass(exact.round(), exact) * scales).reshape(turned.shape)
        return rounded.transpose(0, 1) if self.is_turned else rounded


def _pass(value: Tensor, like: Tensor) -> Tensor:
    """The value, with the gradient of another."""
    return like + (value - like).detach()


def begin_rounding(model: nn.Module, grids: Mapping[str, Grid]) -> None:
    """Let the named operators, whose weights are on these grids, compute with rounded weights from now on.

    An embedding and a weight that several operators share keep their rounded weights, and do not learn.
    """
    weights = (getattr(one, "weight", None) for one in model.modules())
    owners = Counter(id(one) for one in weights if isinstance(one, nn.Parameter))
    for name, grid in grids.items():
        module = get_layer(model, name)
        if isinstance(module, nn.Embedding) or owners[id(module.weight)] > 1:
            module.weight.requires_grad = False
        else:
            parametrize.register_parametrization(module, "weight", RoundedWeights(module, grid))


def end_rounding(model: nn.Module) -> None:
    """Leave every weight as it is rounded, a plain parameter again."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    model.requires_grad_()
