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

_KEPT_BYTES = 2**28  # of a model's outputs on all samples that stay in memory


class Known(NamedTuple):
    """A model to be run on inputs, of which it may remember its outputs."""

    module: nn.Module
    inputs: Inputs


@dataclass
class Recalled:
    """The outputs that are remembered: of the sources, and of the latest of the other models."""

    load_sources: Callable[[], list[Model]]
    _inputs: dict[str, Inputs] = field(default_factory=dict)
    _known: dict[tuple[str, str], Remembered] = field(default_factory=dict)

    def find(self, model: Model, inputs: Inputs, sha256: str) -> Known:
        """The model with its outputs on these inputs, computed once; as it is where they are too large to stay.

        Equal inputs, by their hash, are brought to the same tensors.
        """
        inputs = self._inputs.setdefault(sha256, inputs)
        if (known := self._known.get((model.content, sha256))) is not None:
            return Known(known, inputs)
        sources = self.load_sources()
        model = next((one for one in sources if are_same(one.module, model.module)), model)
        place = (model.content, sha256)
        if place not in self._known:
            needed = sum(one.nbytes for one in predict(model.module, tuple(tensor[:1] for tensor in inputs)).values())
            if needed * len(inputs[0]) > _KEPT_BYTES:
                return Known(model.module, inputs)
            kept = {one.content for one in (model, *sources)}
            for other in [one for one in self._known if one[0] not in kept]:
                del self._known[other]
            self._known[place] = Remembered(model.module, inputs, predict(model.module, inputs))
        return Known(self._known[place], inputs)
