"""What an artifact is called: one key for everything that is exported, proven, timed, compared and shown."""

from dataclasses import fields, replace
from typing import Literal, get_args

from rankship_pipeline.foundation.formats import FORMATS, Format
from rankship_pipeline.foundation.frozen import record

Variant = Literal["dense", "compressed", "canary"]  # the last: a frozen reference model that no build makes
Precision = Literal["float32", "float16", "int8", "int4"]  # what the weights are stored in; builds make the first
Delegate = Literal["cpu"]  # what each runtime computes with by itself: see ArtifactKey
VARIANTS: tuple[Variant, ...] = ("dense", "compressed")  # what a build makes
WHOLE, _HEAD = "whole", "head of "


@record
class ArtifactKey:
    """The name of one artifact of a recipe, wherever it is exported, proven, timed, compared or shown.

    `delegate` is what computes it: "cpu" is ONNX Runtime's own provider, and XNNPACK in TFLite and ExecuTorch. `part`
    is what of the model the file holds: "whole" (also the backbone that tasks share), or a task's head (`head_of`).
    """

    variant: Variant
    format: Format
    precision: Precision = "float32"
    delegate: Delegate = "cpu"
    part: str = WHOLE

    @property
    def model(self) -> str:
        """What tables call it beside its format: "compressed", "compressed, int8"."""
        return ", ".join([self.variant, *self._list_unusual()])

    @property
    def title(self) -> str:
        """What people call it: "compressed onnx", "compressed onnx, head of mnist"."""
        return ", ".join([f"{self.variant} {self.format}", *self._list_unusual()])

    @property
    def heading(self) -> str:
        """What lists by format call it: "onnx compressed"."""
        return f"{self.format} {self.model}"

    def _list_unusual(self) -> list[str]:
        """Whatever a build did not make before there was a choice of it."""
        return [getattr(self, one.name) for one in fields(self)[2:] if getattr(self, one.name) != one.default]

    @property
    def task(self) -> str | None:
        """Whose head it is; None for any other part."""
        return self.part.removeprefix(_HEAD) if self.part.startswith(_HEAD) else None

    @property
    def dense(self) -> "ArtifactKey":
        """The dense float32 model run in the same way, over whose time and energy a compressed model's ratio is."""
        return replace(self, variant="dense", precision="float32")

    @property
    def order(self) -> tuple[int, int, int, int, bool, str]:
        """Where it stands in a list: by format, then dense first, the usual before the rest."""
        chosen = ((self.variant, Variant), (self.precision, Precision), (self.delegate, Delegate))
        variant, precision, delegate = (get_args(kind).index(value) for value, kind in chosen)
        return FORMATS.index(self.format), variant, precision, delegate, self.part != WHOLE, self.part


def head_of(task: str) -> str:
    """Name the part of a model that is one task's head."""
    return f"{_HEAD}{task}"
