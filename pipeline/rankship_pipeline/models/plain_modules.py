"""Rewrites modules whose weights are hidden from hooks into plain layers that compute the same.

What computes its weights from others (weight norm, spectral norm, pruning, parametrizations) gets the plain weight;
attention becomes four linear layers, a recurrent network two per layer and direction. Layers stay what they are
elsewhere, so the tensors of most models keep their names.
"""

import copy
from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from rankship_pipeline.models.plain_attention import PlainAttention, rewrite_attention
from rankship_pipeline.models.plain_recurrent import PlainCell, PlainRecurrent, rewrite_cell, rewrite_recurrent

# By exact type: a subclass may compute something else.
_REWRITES: Mapping[type[nn.Module], Callable[[nn.Module], nn.Module]] = {
    nn.MultiheadAttention: rewrite_attention,
    nn.LSTM: rewrite_recurrent,
    nn.GRU: rewrite_recurrent,
    nn.RNN: rewrite_recurrent,
    nn.LSTMCell: rewrite_cell,
    nn.GRUCell: rewrite_cell,
    nn.RNNCell: rewrite_cell,
}
REWRITTEN = (PlainAttention, PlainRecurrent, PlainCell)


def make_plain(model: nn.Module) -> nn.Module:
    """The model with every weight baked in and its odd modules rewritten; changes the model given, and returns it.

    The result computes the same up to rounding. A model that is itself one such module comes back as another module.
    """
    bake_weights(model)
    made: dict[int, nn.Module] = {}  # a module under two names stays one
    for name, module in list(model.named_modules(remove_duplicate=False)):
        rewrite = _REWRITES.get(type(module))
        if rewrite is None:
            continue
        if id(module) not in made:
            made[id(module)] = rewrite(module).train(module.training)
        if not name:
            return made[id(module)]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[id(module)])
    return model


def is_plain(model: nn.Module) -> bool:
    """Whether `make_plain` would change nothing."""
    return not any(
        type(module) in _REWRITES or parametrize.is_parametrized(module) or _find_computed(module)
        for module in model.modules()
    )


def bake_weights(model: nn.Module) -> None:
    """Turn every weight that is computed from others at each call into a plain parameter of its present value."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            kind = type(module)  # made for this module, whose copies share it: torch takes the weight off the class
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
            for name in list(module.parametrizations):  # type: ignore[arg-type]  # a ModuleDict
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        for hook in _find_computed(module):
            bake = next(bake for kind, bake in _BAKES.items() if isinstance(hook, kind))
            bake(module, getattr(hook, "name", "") or getattr(hook, "_tensor_name"))  # noqa: B009 - as pruning calls it


def copy_module(model: nn.Module) -> nn.Module:
    """A deep copy, also where a hook left a computed weight on a module, which torch refuses to copy."""
    computed = (
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    )
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})


def _remove_pruning(module: nn.Module, name: str) -> None:
    prune.remove(module, name)  # type: ignore[no-untyped-call]  # torch types none of its pruning


_BAKES: Mapping[type, Callable[[nn.Module, str], object]] = {
    WeightNorm: remove_weight_norm,
    SpectralNorm: remove_spectral_norm,
    prune.BasePruningMethod: _remove_pruning,
}


def _find_computed(module: nn.Module) -> list[object]:
    """The hooks that compute one of its weights before every call."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, tuple(_BAKES))]  # noqa: SLF001
