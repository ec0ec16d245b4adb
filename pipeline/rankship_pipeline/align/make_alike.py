"""Makes models alike before merging: reorders the rows of a head, folds an input normalisation into weights.

Every change is checked: the changed model must compute the same as the original, or the merge is refused.
"""

import copy

import torch
from torch import Tensor, nn

from rankship_pipeline.align.fold_normalisation import RETRAIN, change_pixels, fold
from rankship_pipeline.foundation.errors import MergeMismatch
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.outputs import call
from rankship_pipeline.models.watch import watch
from rankship_pipeline.recipe.normalisation import Normalisation

_SAMPLES = 2
_TOLERANCE = 1e-6  # of the largest output, in float64


@record
class Mend:
    """How one model is changed before merging; the default changes nothing.

    `label_order` gives each merged class's row in this model's head. `trained` is the normalisation that the model
    expects, `given` the loader's. A `padded` model's vocabulary has other rows without a token than the first model's
    (padding.py); it is filled before it is loaded.
    """

    label_order: tuple[int, ...] = ()
    trained: Normalisation | None = None
    given: Normalisation | None = None
    padded: bool = False


def mend_model(model: nn.Module, mend: Mend, inputs: Inputs, *, name: str) -> nn.Module:
    """Change the model in place, after a check in float64 on the first of `inputs` (as the loader gives them).

    Raises MergeMismatch with the model and the reason if it cannot be changed exactly.
    """
    if not mend.label_order and mend.trained is None:
        return model
    sample = tuple(tensor[:_SAMPLES].double() if tensor.is_floating_point() else tensor[:_SAMPLES] for tensor in inputs)
    changed = copy.deepcopy(model).double()
    wanted = sample
    if mend.trained is not None and mend.given is not None:
        change = change_pixels(mend.trained, mend.given, sample[0], name=name)
        wanted = (sample[0] * change[0] + change[1], *sample[1:])
    expected = predict_exactly(changed, wanted)
    if mend.label_order:
        reorder_head(changed, sample, mend.label_order, name=name)
        expected = expected[..., list(mend.label_order)]
    if wanted is not sample:
        fold(changed, sample, change, name=name)
    error = float((predict_exactly(changed, sample) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not error <= _TOLERANCE:
        raise MergeMismatch(
            f"model {name!r} cannot be made like the others: the change moves its outputs by {error:.1e} of the largest"
            " (its input or its logits may be used in more than one place)",
            hint=RETRAIN,
        )
    model.load_state_dict(changed.state_dict())  # back in the model's own type
    return model


@torch.inference_mode()
def predict_exactly(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's output, without gradients; several are joined to one row of numbers for each sample."""
    outputs = [one for one in call(model, inputs).values() if one.is_floating_point()]
    return outputs[0] if len(outputs) == 1 else torch.cat([one.flatten(1) for one in outputs], 1)


def reorder_head(model: nn.Module, sample: Inputs, order: tuple[int, ...], *, name: str) -> None:
    """Reorder the rows of the head, the linear layer whose output the model returns."""
    outputs: dict[str, Tensor] = {}

    def keep(where: str, _x: Tensor, y: Tensor) -> None:
        outputs[where] = y

    with watch(model, [where for where, module in model.named_modules() if isinstance(module, nn.Linear)], keep):
        logits = predict_exactly(model, sample)
    heads = [where for where, y in outputs.items() if y.data_ptr() == logits.data_ptr() and y.shape == logits.shape]
    if len(heads) != 1 or logits.shape[-1] != len(order):
        raise MergeMismatch(
            f"model {name!r}: its {len(order)} classes are in another order, and no linear layer returns its"
            f" {logits.shape[-1]} logits",
            hint="save the model again with its head's rows in the first model's order",
        )
    with torch.no_grad():
        for parameter in model.get_submodule(heads[0]).parameters(recurse=False):
            parameter.copy_(parameter[list(order)].clone())
