"""What can compute each format's files on a device, and how it is asked for: by the runtime, by the file, by a program.

Suites and recipes use `word`, in which "xnnpack" is never anything else. Keys use `delegate`, where "cpu" has always
been what a runtime does by itself: in TFLite and ExecuTorch that is XNNPACK.
"""

from typing import Literal

from rankship_pipeline.foundation.artifact_key import ArtifactKey, Delegate
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.frozen import record

# who is asked: the runtime when it loads a file, the file that was lowered to it, or LiteRT's benchmark_model
Asked = Literal["runtime", "file", "benchmark_model"]


@record
class DelegateFacts:
    """One way to compute a format's files; `takes` is whether a delegate takes operators away from the runtime."""

    word: str
    delegate: Delegate
    title: str
    asked: Asked
    takes: bool = True


# format → its delegates, the one that is used where nothing else is asked for first
DELEGATES: dict[Format, tuple[DelegateFacts, ...]] = {
    "onnx": (
        DelegateFacts(word="cpu", delegate="cpu", title="CPU provider", asked="runtime", takes=False),
        DelegateFacts(word="xnnpack", delegate="xnnpack", title="XNNPACK provider", asked="runtime"),
        DelegateFacts(word="nnapi", delegate="nnapi", title="NNAPI provider", asked="runtime"),
    ),
    "tflite": (
        DelegateFacts(word="xnnpack", delegate="cpu", title="XNNPACK", asked="runtime"),
        DelegateFacts(word="plain", delegate="plain", title="LiteRT's own kernels", asked="runtime", takes=False),
        DelegateFacts(word="gpu", delegate="gpu", title="GPU delegate", asked="benchmark_model"),
        DelegateFacts(word="nnapi", delegate="nnapi", title="NNAPI delegate", asked="benchmark_model"),
    ),
    "executorch": (
        DelegateFacts(word="xnnpack", delegate="cpu", title="XNNPACK", asked="file"),
        DelegateFacts(word="plain", delegate="plain", title="ExecuTorch's own kernels", asked="file", takes=False),
        DelegateFacts(word="vulkan", delegate="vulkan", title="Vulkan", asked="file"),
    ),
}


def find_word(artifact_format: Format, word: str) -> DelegateFacts:
    """Return what a suite's or a recipe's word means for a format; the records of both take only known words."""
    return next(one for one in DELEGATES[artifact_format] if one.word == word)


def find_facts(key: ArtifactKey) -> DelegateFacts:
    """Return what is known of a key's delegate."""
    return next(one for one in DELEGATES[key.format] if one.delegate == key.delegate)
