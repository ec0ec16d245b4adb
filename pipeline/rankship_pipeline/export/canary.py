"""The canary: a small frozen reference model that is timed beside every build, so that a device's change shows.

Its weights come from a formula and not from training, so every host makes the same network; the file is the exporter's,
and two runs share a canary only if their files are alike. It mixes what small models spend their time on: a
convolution, a depthwise one, a dense layer.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from rankship_pipeline.foundation.codec import encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.formats import FACTS
from rankship_pipeline.foundation.records import Artifact, Format, TensorSpec
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.foundation.toolchain import hash_code, list_versions

if TYPE_CHECKING:
    from torch import Tensor, nn

_CHANNELS, _SIDE, _CLASSES, _SAMPLES = 32, 24, 10, 8
NAME = "canary"


def make_canary(format_: Format, store: Store, steps: Steps) -> Artifact:
    """Export the canary to one format, or take it from the store; its entry is like that of any artifact."""
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
            file = store.name("artifact", made_from)
            entry = store.produce("artifact", made_from, lambda target: _export(format_, file, target))
    return read_artifact(entry)


def _export(format_: Format, folder: str, target: Path) -> None:
    import numpy as np

    from rankship_pipeline.evaluate.accuracy import predict
    from rankship_pipeline.export import keep_stdout_clean, load_exporter
    from rankship_pipeline.export.graph import trace_graph
    from rankship_pipeline.models.layers import count_parameters

    module, samples = make_network(), make_samples()
    file = f"model.{FACTS[format_].suffix}"
    with keep_stdout_clean():
        load_exporter(format_).export_graph(trace_graph(module, (samples[:1],)), target / file)
    outputs = predict(module, (samples,))
    np.save(target / "input.0.npy", samples.numpy())
    np.save(target / "expected.0.npy", outputs.numpy())
    artifact = Artifact(
        variant="canary",
        format=format_,
        file=f"{folder}/{file}",
        size_bytes=(target / file).stat().st_size,
        sha256=hash_file(target / file),
        inputs=(TensorSpec(name="input.0", shape=(1, *samples.shape[1:]), dtype="float32"),),
        outputs=(TensorSpec(name="logits", shape=(1, _CLASSES), dtype="float32"),),
        parameters=count_parameters(module),
        factored_layers=(),
        recipe_sha256=NAME,
        source_sha256={},
        toolchain=list_versions(format_),
    )
    (target / "artifact.json").write_text(encode(artifact), encoding="utf-8")


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
    """Numbers between -1 and 1 that look like noise and are the same on every machine: exact integers, then divided."""
    import torch

    numbers = (torch.arange(count, dtype=torch.int64) * 7_919 + 104_729 * (place + 1)) % 65_537
    return (((numbers * numbers) % 65_537).double() / 32_768 - 1).float()
