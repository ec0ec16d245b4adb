"""What a recipe exports, and how closely the files must agree with torch."""

from typing import Literal

from rankship_pipeline.foundation.formats import FORMATS, Format
from rankship_pipeline.foundation.frozen import record

BATCH_AXIS = "batch"  # the name of the inputs' axis 0


@record
class AxisChoice:
    """A further axis of the inputs whose length may vary in exported files, such as a text's tokens.

    Several entries with one name are one length, at several places.

    Keys:
        name: its name in ONNX files and reports
        axis: its place in an input, from 0, which is the batch
        range: its smallest and its largest length
        inputs: the names of the inputs that have it; left out, every input with so many axes
    """

    name: str
    axis: int
    range: tuple[int, int]
    inputs: tuple[str, ...] = ()


@record
class ExportChoice:
    """What to export. Without `batch` and `axes` a file takes one sample of the data's own shape.

    ONNX and ExecuTorch files take every length of the ranges; TFLite files cannot, and there is one for each end.
    Every file is proven at both ends and between them; it is timed with one sample of the data's own shape.

    Keys:
        formats: the formats to write; left out, all three
        batch: the smallest and the largest number of samples at once, such as `[1, 8]`; the smallest is 1
        axes: further axes that may vary
        executorch: what whole models in float32 that do not generate text get a further ExecuTorch file for, beside the
            one for XNNPACK: "plain" (ExecuTorch's own kernels), "vulkan" (this machine's must be able to prove it)
        context: the most tokens of a text, prompt included, that the files of a "causal-lm" go on with; left out, 512
            or what the model takes
    """

    formats: tuple[Format, ...] = FORMATS
    batch: tuple[int, int] | None = None
    axes: tuple[AxisChoice, ...] = ()
    executorch: tuple[Literal["plain", "vulkan"], ...] = ()
    context: int | None = None


@record
class ParityChoice:
    """How closely an artifact must agree with torch to count as verified.

    Keys:
        samples: the number of test inputs to compare
        max_relative_error: the largest difference of an output, over the largest output
        min_cosine: the cosine between both outputs
        max_rounded_error: the largest difference, over the largest output, for files of rounded weights: they are
            compared with torch computing with the same integers, and differ in how sums are rounded to the next
            integer; 1.5 times what rounding activations changes at all is allowed too
        min_rounded_cosine: the cosine for these files
        min_top1_agreement: the share of inputs for which both choose the same class, where outputs are classes' scores;
            of files of rounded weights that generate, half as many again may differ as rounding activations changes
    """

    samples: int = 64
    max_relative_error: float = 1e-4
    min_cosine: float = 0.9999
    max_rounded_error: float = 0.05
    min_rounded_cosine: float = 0.999
    min_top1_agreement: float = 1.0
