"""Models as their users hold them, and as the stages take them: float32 on the CPU, tensors in by position, logits out."""

import copy
import inspect
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rankship_pipeline.foundation.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from rankship_pipeline.foundation.records import RankPlan


def is_transformers(model: object) -> bool:
    """Tell whether this is a model of transformers, which is not imported for the question."""
    library: Any = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


def check_model(model: object, what: str) -> "nn.Module":
    """The model itself; InputError where it is no torch module."""
    from torch import nn

    if not isinstance(model, nn.Module):
        raise InputError(
            f"{what} is a {type(model).__name__}, not a torch module", hint="give a torch.nn.Module that was trained"
        )
    return model


def list_inputs(model: "nn.Module", count: int, names: Sequence[str]) -> tuple[str, ...]:
    """The names by which `count` tensors reach a transformers model: `names`, or the first of its `forward`."""
    return tuple(names) or tuple(inspect.signature(model.forward).parameters)[:count]


def order_inputs(model: "nn.Module", names: Sequence[str], what: str) -> list[int]:
    """Where in `names` the inputs of a plain module stand, in the order of its `forward`."""
    taken = list(inspect.signature(model.forward).parameters)
    if unknown := [name for name in names if name not in taken]:
        raise InputError(
            f"{what} names {', '.join(unknown)}, forward takes {', '.join(taken)}", hint="name the inputs as it does"
        )
    return sorted(range(len(names)), key=lambda place: taken.index(names[place]))


def wrap(model: "nn.Module", inputs: Sequence[str]) -> "nn.Module":
    """A copy of the model, float32 on the CPU; a transformers model's takes `inputs` by position and gives its logits.

    Its attention is `eager`, the form that every exporter lowers, as in models read from a folder.
    """
    own = copy.deepcopy(model).cpu().float().eval()
    if not is_transformers(own):
        return own
    from rankship_pipeline.models.huggingface import LogitsOnly

    own.set_attn_implementation("eager")  # type: ignore[operator]  # transformers has no types
    return LogitsOnly(own, tuple(inputs)).eval()


def unwrap(module: "nn.Module") -> "nn.Module":
    """The transformers model inside; any other module is its user's own."""
    from rankship_pipeline.models.huggingface import LogitsOnly

    return module.model if isinstance(module, LogitsOnly) else module


def unwrap_plan(plan: "RankPlan", module: "nn.Module") -> "RankPlan":
    """The plan with its layers named as in `unwrap(module)`."""
    from rankship_pipeline.models.huggingface import PREFIX, LogitsOnly

    if not isinstance(module, LogitsOnly):
        return plan
    return replace(plan, layers=tuple(replace(layer, name=layer.name.removeprefix(PREFIX)) for layer in plan.layers))


def wrap_patterns(patterns: Sequence[str], model: "nn.Module") -> tuple[str, ...]:
    """Patterns of a model's own layer names, as the stages name these layers."""
    from rankship_pipeline.models.huggingface import PREFIX

    return tuple(PREFIX + pattern for pattern in patterns) if is_transformers(model) else tuple(patterns)
