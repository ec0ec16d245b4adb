"""The key of an artifact, used wherever it is exported, proven, timed, compared or shown."""

from dataclasses import fields, replace
from typing import Literal, get_args

from rankship_pipeline.foundation.formats import FORMATS, Format
from rankship_pipeline.foundation.frozen import record

Variant = Literal["dense", "compressed", "canary"]  # the last: a frozen reference model that no build makes
Precision = Literal["float32", "float16", "int8", "int4"]  # the type of the stored weights; builds make the first
Delegate = Literal["cpu", "gpu", "nnapi"]  # what computes it; builds are measured with the first
VARIANTS: tuple[Variant, ...] = ("dense", "compressed")  # the variants that a build makes
WHOLE, _HEAD = "whole", "head of "


@record
class ArtifactKey:
    """The name of one artifact of a recipe.

    `delegate` is what runs it: "cpu" is ONNX Runtime's CPU provider, and XNNPACK in TFLite and ExecuTorch. `part` is
    the part of the model in the file: "whole" (also for the backbone that tasks share), or a task's head (`head_of`).
    `shape` names the lengths of a file for other lengths than the data's ("batch 8, sequence 128").
    """

    variant: Variant
    format: Format
    precision: Precision = "float32"
    delegate: Delegate = "cpu"
    part: str = WHOLE
    shape: str = ""

    @property
    def model(self) -> str:
        """Its name in tables that show the format elsewhere: "compressed", "compressed, int8"."""
        return ", ".join([self.variant, *self._list_unusual()])

    @property
    def title(self) -> str:
        """Its full name: "compressed onnx", "compressed onnx, head of mnist"."""
        return ", ".join([f"{self.variant} {self.format}", *self._list_unusual()])

    @property
    def heading(self) -> str:
        """Its name in lists sorted by format: "onnx compressed"."""
        return f"{self.format} {self.model}"

    def _list_unusual(self) -> list[str]:
        """The precision, delegate, part and shape, where they are not the default."""
        return [getattr(self, one.name) for one in fields(self)[2:] if getattr(self, one.name) != one.default]

    @property
    def task(self) -> str | None:
        """The task whose head it is; None for any other part."""
        return self.part.removeprefix(_HEAD) if self.part.startswith(_HEAD) else None

    @property
    def dense(self) -> "ArtifactKey":
        """The key of the dense float32 model run in the same way, the denominator of time and energy ratios."""
        return replace(self, variant="dense", precision="float32")

    @property
    def order(self) -> tuple[int, int, int, int, bool, str, str]:
        """Its sort key: by format, then dense first, then defaults before other values."""
        chosen = ((self.variant, Variant), (self.precision, Precision), (self.delegate, Delegate))
        variant, precision, delegate = (get_args(kind).index(value) for value, kind in chosen)
        return FORMATS.index(self.format), variant, precision, delegate, self.part != WHOLE, self.part, self.shape


def head_of(task: str) -> str:
    """The `part` of a key for one task's head."""
    return f"{_HEAD}{task}"
