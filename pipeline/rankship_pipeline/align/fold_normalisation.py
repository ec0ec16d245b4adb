"""Folds an input normalisation into a model's first layer, where that is exact."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankship_pipeline.foundation.errors import MergeMismatch
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.watch import watch
from rankship_pipeline.recipe.normalisation import Normalisation

RETRAIN = "train the model on inputs normalised as the loader's ([data] normalise), or leave it out"

_ROUNDING = 1e-9
_Linear = nn.Linear | nn.Conv2d


def change_pixels(trained: Normalisation, given: Normalisation, x: Tensor, *, name: str) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel, (1, channels, 1, …), from the loader's normalisation to the model's.

    (pixel − m)/s from (pixel − m_d)/s_d: times s_d/s, plus (m_d − m)/s. `x` are some of the loader's images.
    """
    fits = x.is_floating_point() and x.ndim > 1
    if not fits or any(len(one.mean) not in {1, x.shape[1]} for one in (trained, given)):
        raise MergeMismatch(
            f"model {name!r}: a normalisation of {max(len(trained.mean), len(given.mean))} channels does not fit inputs"
            f" of type {x.dtype} and shape {list(x.shape[1:])}",
            hint="give one mean and one std per channel, or one for all channels",
        )

    def spread(values: tuple[float, ...]) -> Tensor:
        column = torch.tensor(values, dtype=torch.float64).expand(x.shape[1])
        return column.reshape(1, -1, *(1 for _ in x.shape[2:]))

    scale = spread(given.std) / spread(trained.std)
    return scale, (spread(given.mean) - spread(trained.mean)) / spread(trained.std)


def fold(model: nn.Module, sample: Inputs, change: tuple[Tensor, Tensor], *, name: str) -> None:
    """Fold scale and shift into the layer that takes the input: its weight, and its bias or the batch-norm after it.

    W(a·x + b) = (W·a)x + W·b. Zero padding comes after normalisation: a padded pixel is 0 for the original and would
    have to be −b/a here, so a padded convolution can take a scale but no shift.
    """
    layers, norms = _find_first(model, sample)
    if len(layers) != 1:
        raise _refuse(name, f"{len(layers)} linear or convolutional layers take the input directly, expected one")
    ((where, layer),) = layers
    scale, shift = change
    moves = bool(shift.abs().max() > _ROUNDING)
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros" or layer.groups != 1:
            raise _refuse(name, f"{where} is grouped, or its padding is not zeros")
        if layer.padding not in {(0, 0), "valid"} and moves:
            raise _refuse(
                name, f"{where} pads with zeros after normalisation, so another mean would be wrong at the borders"
            )
        a, b = scale, shift  # (1, channels, 1, 1), as the weight has them
    else:
        a, b = (one.expand(1, *sample[0].shape[1:]).reshape(1, -1) for one in change)  # (1, features)
    if layer.bias is None and not norms and moves:
        raise _refuse(name, f"{where} has no bias, and no batch-norm after it, to take up another mean")
    with torch.no_grad():
        moved = (layer.weight * b).flatten(1).sum(1)  # (rows,)
        layer.weight.mul_(a)
        if layer.bias is not None:
            layer.bias.add_(moved)
        elif norms and norms[0].running_mean is not None:
            norms[0].running_mean.sub_(moved)


def _refuse(name: str, reason: str) -> MergeMismatch:
    return MergeMismatch(f"the input normalisation of model {name!r} cannot be folded in: {reason}", hint=RETRAIN)


@torch.inference_mode()
def _find_first(model: nn.Module, sample: Inputs) -> tuple[list[tuple[str, _Linear]], list[_BatchNorm]]:
    """The layers that take the first input or a view of it, and the batch-norms that take their outputs."""
    layers: list[tuple[str, _Linear]] = []
    norms: list[_BatchNorm] = []
    outputs: list[Tensor] = []  # kept alive, so that no later tensor reuses their memory

    def see(name: str, x: Tensor, y: Tensor) -> None:
        module = modules[name]
        if isinstance(module, _Linear) and _is_same(x, sample[0]):
            layers.append((name, module))
            outputs.append(y)
        elif isinstance(module, _BatchNorm) and any(_is_same(x, one) for one in outputs):
            norms.append(module)

    modules = {name: one for name, one in model.named_modules() if isinstance(one, _Linear | _BatchNorm)}
    with watch(model, modules, see):
        model(*sample)
    return layers, norms


def _is_same(left: Tensor, right: Tensor) -> bool:
    return left.data_ptr() == right.data_ptr() and left.numel() == right.numel()
