"""A model whose planned layers are chains of smaller operators."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rankship_pipeline.foundation.errors import BuildError
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.layers import Factorable, get_layer


def rebuild(model: nn.Module, plan: Mapping[str, Factors]) -> nn.Module:
    """A copy in which every layer of `plan` is a Sequential of its form's operators, weights unset.

    Stride, padding and dilation go to the operators that hold the kernel; the bias belongs to the last one. The same
    call restores the structure for a saved state dict.
    """
    factored = copy.deepcopy(model)
    for name, factors in plan.items():
        parent, _, child = name.rpartition(".")
        setattr(factored.get_submodule(parent), child, chain(get_layer(factored, name), factors))
    return factored.eval()


def chain(module: Factorable, factors: Factors) -> nn.Sequential:
    """The operators that take a layer's place (see forms.py), with its bias."""
    if isinstance(module, nn.Embedding):
        table = nn.Embedding(module.num_embeddings, factors.rank, module.padding_idx)
        operators: list[nn.Module] = [table, nn.Linear(factors.rank, module.embedding_dim, bias=False)]
    elif isinstance(module, nn.Linear):
        operators = [
            nn.Linear(module.in_features, factors.rank, bias=False),
            nn.Linear(factors.rank, module.out_features, bias=module.bias is not None),
        ]
    else:
        operators = _chain_convolution(module, factors)
    bias = getattr(module, "bias", None)
    if bias is not None:
        operators[-1].bias = nn.Parameter(bias.detach().clone())
    return nn.Sequential(*operators)


@torch.no_grad()
def fill_factors(chained: nn.Module, weights: Sequence[Tensor]) -> None:
    """Write a form's operator weights, as forms.Decomposition.make_weights gives them, into `chain`'s Sequential."""
    for operator, weight in zip(chained.children(), weights, strict=True):
        target = operator.weight
        written = weight.T if isinstance(operator, nn.Embedding) else weight
        if not isinstance(target, Tensor) or target.numel() != written.numel():
            raise BuildError(f"a factor of shape {tuple(weight.shape)} does not fit {operator}")
        target.copy_(written.reshape(target.shape))


def _chain_convolution(module: nn.Conv2d, factors: Factors) -> list[nn.Module]:
    has_bias = module.bias is not None
    inputs, outputs, k = module.in_channels, module.out_channels, factors.rank
    if factors.form == "spatial":
        return [_cut(module, inputs, k, 0, bias=False), _cut(module, k, outputs, 1, bias=has_bias)]
    last = nn.Conv2d(k, outputs, 1, bias=has_bias)
    if factors.form == "svd":
        return [_cut(module, inputs, k, None, bias=False), last]
    inner = int(factors.input_rank or 0)
    return [nn.Conv2d(inputs, inner, 1, bias=False), _cut(module, inner, k, None, bias=False), last]


def _cut(module: nn.Conv2d, inputs: int, outputs: int, axis: int | None, *, bias: bool) -> nn.Conv2d:
    """A convolution with the module's kernel, stride, padding and dilation along one axis, or along both (None)."""

    def along(pair: Sequence[int], neutral: int) -> tuple[int, int]:
        height, width = (int(value) if axis in {None, place} else neutral for place, value in enumerate(pair))
        return height, width

    return nn.Conv2d(
        inputs,
        outputs,
        along(module.kernel_size, 1),
        along(module.stride, 1),
        module.padding if isinstance(module.padding, str) else along(module.padding, 0),
        along(module.dilation, 1),
        bias=bias,
    )
