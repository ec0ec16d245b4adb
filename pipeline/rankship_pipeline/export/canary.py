"""The canary: a small frozen reference model that is timed beside every build to detect changes of the device.

Its weights come from a formula, not from training, so that every host makes the same network. The exporter makes the
file: two runs share a canary only if the files are equal. It has the operators on which small models spend their time:
a convolution, a depthwise convolution, a dense layer.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.records import Artifact
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.foundation.toolchain import hash_code, list_versions

if TYPE_CHECKING:
    from torch import Tensor, nn

_CHANNELS, _SIDE, _CLASSES, _SAMPLES = 32, 24, 10, 8
NAME = "canary"


def make_canary(format_: Format, store: Store, steps: Steps) -> Artifact:
    """Export the canary to one format, or read it from the store; its entry is like that of any artifact."""
    from rankship_pipeline.export.artifact import read_artifact

    made_from: dict[str, object] = {
        "canary": [_CHANNELS, _SIDE, _CLASSES, _SAMPLES],
        "format": format_,
        "code": hash_code(),
        "versions": list_versions(format_),
    }
    entry = store.find("artifact", made_from)
    if entry is None:
        with steps.step(f"export the canary to {format_}"):
            name = store.name("artifact", made_from)
            entry = store.produce("artifact", made_from, lambda target: _export(format_, name, target))
    return read_artifact(entry)


def _export(format_: Format, entry: str, target: Path) -> None:
    from rankship_pipeline.export.artifact import Part, export_file, write_artifact
    from rankship_pipeline.export.graph import trace_graph

    part = Part("canary", make_network(), (make_samples(),), classes={"output": -1})
    graph = trace_graph(part.module, tuple(tensor[:1] for tensor in part.samples))
    write_artifact(
        target,
        entry,
        part,
        format_,
        lambda path: export_file(graph, format_, path),
        recipe_sha256=NAME,
        source_sha256={},
    )


def make_network() -> "nn.Module":
    """Build the network with its frozen weights; input [N, 3, 24, 24], output [N, 10]."""
    import torch
    from torch import nn

    wide = _CHANNELS
    module = nn.Sequential(
        nn.Conv2d(3, wide, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(wide, wide, 3, padding=1, groups=wide),
        nn.Conv2d(wide, 2 * wide, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(2 * wide * 16, _CLASSES),
    ).eval()
    with torch.no_grad():
        for place, parameter in enumerate(module.parameters()):
            inputs = parameter[0].numel() if parameter.dim() > 1 else parameter.numel()
            parameter.copy_(_wave(parameter.numel(), place).reshape(parameter.shape) / inputs**0.5)
    return module


def make_samples() -> "Tensor":
    """The inputs of its proof: [8, 3, 24, 24]."""
    return _wave(_SAMPLES * 3 * _SIDE * _SIDE, len(NAME)).reshape(_SAMPLES, 3, _SIDE, _SIDE)


def _wave(count: int, place: int) -> "Tensor":
    """Pseudo-random numbers from -1 to 1, equal on every machine: computed as exact integers, then divided."""
    import torch

    numbers = (torch.arange(count, dtype=torch.int64) * 7_919 + 104_729 * (place + 1)) % 65_537
    return (((numbers * numbers) % 65_537).double() / 32_768 - 1).float()
