"""Models as their users hold them, and as the stages take them: float32 on the CPU, tensors by position, logits out."""

import fnmatch
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.huggingface import PREFIX, ByPosition
from rankship_pipeline.models.layers import find_layers
from rankship_pipeline.models.plain_modules import copy_module
from rankship_pipeline.models.settle import settle
from rankship_pipeline.recipe.choices import MergeChoice, RankChoice

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rankship_pipeline.foundation.records import RankPlan

T = TypeVar("T")


@dataclass(frozen=True)
class Wrapping:
    """One model as its user holds it; `inputs` are the names by which tensors reach a transformers model, else ()."""

    name: str
    given: "nn.Module"
    inputs: tuple[str, ...]

    def wrap(self) -> "nn.Module":
        """A copy, float32 on the CPU; a transformers model's takes `inputs` by position and gives its logits.

        It is settled as models are that are read from a folder.
        """
        own = copy_module(self.given).cpu().float().eval()
        if not self.inputs:
            return own
        settle(own)
        return ByPosition(own, self.inputs).eval()


def is_transformers(model: object) -> bool:
    """Tell whether this is a model of transformers, which is not imported for the question."""
    library: Any = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


def check_models(models: "Mapping[str, nn.Module]") -> None:
    """InputError where one is no torch module."""
    from torch import nn

    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise InputError(
                f"model {name!r} is a {type(model).__name__}, not a torch module",
                hint="give a torch.nn.Module that was trained (not a program that was exported from it)",
            )


def list_inputs(model: "nn.Module", *, needed: bool = False) -> list[str]:
    """The names of what `forward` takes by position, or `needed`: must have; empty where it takes any number."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters):
        return []
    by_position = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    taken = [one for one in parameters if one.kind in by_position]
    return [one.name for one in taken if not needed or one.default is inspect.Parameter.empty]


def order_inputs(
    model: "nn.Module", tensors: "tuple[Tensor, ...]", names: Sequence[str], what: str
) -> "tuple[Tensor, ...]":
    """Tensors that were given by name, in the order of `forward`."""
    taken = list_inputs(model)
    if unknown := [name for name in names if name not in taken]:
        raise InputError(
            f"{what} names {', '.join(unknown)}, the model takes {', '.join(taken)}", hint="name its inputs as it does"
        )
    wanted = [name for name in taken if name in names]
    if skipped := [name for name in taken[: taken.index(wanted[-1])] if name not in names]:
        raise InputError(
            f"{what} leaves out {', '.join(skipped)}, which the model takes before {wanted[-1]}",
            hint=f"give {', '.join(skipped)} too, or wrap the model in one whose forward takes no other inputs",
        )
    return pick_inputs(tensors, names, wanted, what)


def pick_inputs(
    tensors: "tuple[Tensor, ...]", names: Sequence[str], wanted: Sequence[str], what: str
) -> "tuple[Tensor, ...]":
    """Tensors of these names in the wanted order; InputError where the sets of names differ."""
    if set(names) != set(wanted):
        raise InputError(
            f"{what} gives {', '.join(names) or 'no names'}, and others {', '.join(wanted) or 'no names'}",
            hint="give all batches, models and tests the same inputs, by the same names",
        )
    if not names:
        return tensors
    found = dict(zip(names, tensors, strict=True))
    return tuple(found[name] for name in wanted)


def unwrap(module: "nn.Module") -> "nn.Module":
    """The transformers model inside; any other module is its user's own."""
    return module.model if isinstance(module, ByPosition) else module


def hash_state(module: "nn.Module") -> str:
    """SHA-256 over a module's tensors and their names."""
    from rankship_pipeline.models.weights import hash_tensors

    state = module.state_dict()
    return digest([list(state), hash_tensors(state.values())])


def refuse_changed(module: "nn.Module", made_sha256: str | None, hint: str) -> None:
    """InputError where the module's tensors are no longer those with which it was made."""
    if made_sha256 is not None and hash_state(module) != made_sha256:
        raise InputError(
            "the tensors of `.module` were changed after it was made, and the stages know the old", hint=hint
        )


def unwrap_name(layer: str, module: "nn.Module") -> str:
    """A layer's name in `unwrap(module)`."""
    return layer.removeprefix(PREFIX) if isinstance(module, ByPosition) else layer


def unwrap_plan(plan: "RankPlan", module: "nn.Module") -> "RankPlan":
    """The plan with its layers named as in `unwrap(module)`."""
    return replace(plan, layers=tuple(replace(one, name=unwrap_name(one.name, module)) for one in plan.layers))


def wrap_choice(choice: T, wrappings: Sequence[Wrapping]) -> T:
    """A table of a recipe whose layer names are the users', with the names that the stages know."""
    if not wrappings or not wrappings[0].inputs:
        return choice
    if isinstance(choice, RankChoice):
        names = [layer.name for layer in find_layers(wrappings[0].given)]
        known = [pattern if not fnmatch.filter(names, pattern) else PREFIX + pattern for pattern in choice.exclude]
        return replace(choice, exclude=tuple(known))  # what errors name has the prefix already
    if isinstance(choice, MergeChoice) and choice.head is not None:
        return replace(choice, head=PREFIX + choice.head)
    return choice
