"""The key of an artifact, used wherever it is exported, proven, timed, compared or shown."""

from dataclasses import fields, replace
from typing import Literal, get_args

from rankship_pipeline.foundation.formats import FACTS, FORMATS, Format
from rankship_pipeline.foundation.frozen import record

Variant = Literal["dense", "compressed", "canary"]  # the last: a frozen reference model that no build makes
Precision = Literal["float32", "float16", "int8", "int4"]  # the type of the stored weights; builds make the first
# what computes it: what the runtime does by itself, then what has to be asked for (see delegates.py)
Delegate = Literal["cpu", "gpu", "nnapi", "xnnpack", "plain", "vulkan"]
VARIANTS: tuple[Variant, ...] = ("dense", "compressed")  # the variants that a build makes
Phase = Literal["prefill", "decode"]  # of a file that generates: the prompt at once, then one token after the other
WHOLE, DECODE, _HEAD, _PREFILL = "whole", "decode", "head of ", "prefill "


@record
class ArtifactKey:
    """The name of one artifact of a recipe.

    `delegate` is what runs it: "cpu" is ONNX Runtime's CPU provider, and XNNPACK in TFLite and ExecuTorch; "plain" is
    these two's own kernels. A file of ExecuTorch is made for its delegate, other files are not. `part` is the part of
    the model in the file: "whole" (also for the backbone that tasks share), or a task's head (`head_of`). A file
    that generates is one whole, and timed as two parts: `DECODE`, a token, and prompts of stated lengths
    (`prefill_of`). `shape` names the lengths of a file for other lengths than the data's ("batch 8, sequence 128").
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
    def phase(self) -> Phase | None:
        """The phase of generating that it times; None for all else."""
        return "decode" if self.part == DECODE else "prefill" if self.part.startswith(_PREFILL) else None

    @property
    def prompt_tokens(self) -> int | None:
        """The length of the prompt that it times; None for all else."""
        return int(self.part.removeprefix(_PREFILL)) if self.phase == "prefill" else None

    @property
    def way(self) -> str:
        """How it is run, with its delegate and the phase that it times: "onnx", "tflite, plain", "onnx, decode"."""
        delegate = [] if self.delegate == "cpu" else [self.delegate]
        return ", ".join([self.format, *delegate, *([] if self.phase is None else [self.part])])

    @property
    def exported(self) -> "ArtifactKey":
        """The key of the file that it is timed in."""
        part = self.part if self.phase is None else WHOLE
        return replace(self, part=part, delegate=self.delegate if FACTS[self.format].holds_delegate else "cpu")

    @property
    def asked(self) -> Delegate | None:
        """The delegate that its runtime is asked for; None where that is what it does with the file by itself."""
        return None if self.delegate == self.exported.delegate else self.delegate

    @property
    def dense(self) -> "ArtifactKey":
        """The key of the dense float32 model run in the same way, the denominator of time and energy ratios."""
        return replace(self, variant="dense", precision="float32")

    @property
    def order(self) -> tuple[int, int, int, int, bool, bool, int, str, str]:
        """Its sort key: by format, then dense first, then defaults before other values, prompts by their length."""
        chosen = ((self.variant, Variant), (self.precision, Precision), (self.delegate, Delegate))
        variant, precision, delegate = (get_args(kind).index(value) for value, kind in chosen)
        part = self.part != WHOLE, self.part == DECODE, self.prompt_tokens or 0, self.part
        return FORMATS.index(self.format), variant, precision, delegate, *part, self.shape


def head_of(task: str) -> str:
    """The `part` of a key for one task's head."""
    return f"{_HEAD}{task}"


def describe_timed(part: str, prompt_tokens: int | None) -> str:
    """What a time is of, in words: "a token after a prompt of 128", "the first token after …", "one inference"."""
    if prompt_tokens is None:
        return "one inference"
    return f"{'a' if part == DECODE else 'the first'} token after a prompt of {prompt_tokens}"


def prefill_of(tokens: int) -> str:
    """The `part` of a key for a prompt of this many tokens."""
    return f"{_PREFILL}{tokens}"
