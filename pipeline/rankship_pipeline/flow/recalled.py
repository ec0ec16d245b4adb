"""Outputs of models on a recipe's data, computed once for all that compares them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.evaluate.likeness import are_same
from rankship_pipeline.evaluate.remembered import Remembered
from rankship_pipeline.flow.stage_model import Model
from rankship_pipeline.models.data import Inputs

_KEPT_BYTES = 2**28  # of all outputs that stay in memory


class Runnable(NamedTuple):
    """A model to be run on inputs, of which it may remember its outputs."""

    module: nn.Module
    inputs: Inputs


@dataclass
class Recalled:
    """The outputs that are remembered: of the sources, and of the latest of the other models."""

    _inputs: dict[str, Inputs] = field(default_factory=dict)
    _known: dict[tuple[str, str], Remembered] = field(default_factory=dict)

    def find(self, model: Model, inputs: Inputs, sha256: str, load_sources: Callable[[], list[Model]]) -> Runnable:
        """The model with its outputs on these inputs, computed once; as it is where they are too large to stay.

        Equal inputs, by their hash, are brought to the same tensors. A model with the tensors of a source is that.
        """
        inputs = self._inputs.setdefault(sha256, inputs)
        if (known := self._known.get((model.content, sha256))) is not None:
            return Runnable(known, inputs)
        sources = load_sources()
        model = next((one for one in sources if are_same(one.module, model.module)), model)
        place = (model.content, sha256)
        if place not in self._known:
            needed = sum(one.nbytes for one in predict(model.module, tuple(tensor[:1] for tensor in inputs)).values())
            if not self._make_place(model, needed * len(inputs[0]), [one.content for one in sources]):
                return Runnable(model.module, inputs)
            self._known[place] = Remembered(model.module, inputs, predict(model.module, inputs))
        return Runnable(self._known[place], inputs)

    def _make_place(self, model: Model, needed: int, sources: list[str]) -> bool:
        """Forget other models' outputs but the sources' for a model that is none; whether there is place then."""
        if model.content not in sources:
            for other in [one for one in self._known if one[0] not in {model.content, *sources}]:
                del self._known[other]
        return needed + sum(one.held_bytes for one in self._known.values()) <= _KEPT_BYTES
