"""Writes an exported file with its record and its proof to the store, and reads them.

    <store>/artifact-<hash>/    model.<suffix>  artifact.json  input.<i>.npy  expected.<i>.npy

There is one array for each input and each output, its samples on axis 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rankship_pipeline.evaluate.calibrate import split
from rankship_pipeline.export import Operator, keep_stdout_clean, load_exporter
from rankship_pipeline.foundation.artifact_key import WHOLE, ArtifactKey, Variant
from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.errors import BuildError
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.formats import FACTS, Format
from rankship_pipeline.foundation.records import Artifact, Dimension, RankPlan, TensorSpec
from rankship_pipeline.foundation.store import Entry, Store
from rankship_pipeline.foundation.toolchain import list_versions
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import count_parameters
from rankship_pipeline.models.outputs import ONLY, Outputs, flatten

_RECORD = "artifact.json"


@dataclass(frozen=True)
class Part:
    """A part of a model that becomes one file per format: its module, its proof's inputs, its plan.

    `outputs` names the module's outputs, in order; a module that returns a dictionary names them itself. `classes` has
    the axis of classes, by name, of outputs that hold classes' scores. `shapes` holds the shapes, by name, of inputs
    and outputs whose sides may differ from the proof's. `bare` says that a single output is no part of a container.
    """

    variant: Variant
    module: nn.Module
    samples: Inputs
    plan: RankPlan | None = None
    part: str = WHOLE
    outputs: tuple[str, ...] = (ONLY,)
    classes: Mapping[str, int] = field(default_factory=dict)
    bare: bool = True
    shapes: Mapping[str, tuple[int | Dimension, ...]] = field(default_factory=dict)

    @property
    def returned(self) -> tuple[str, ...]:
        """The names of outputs to take of what the module returns; () for a module that returns one bare tensor."""
        return () if len(self.outputs) == 1 and self.bare else self.outputs

    @property
    def title(self) -> str:
        """Its name in progress and errors."""
        return self.variant if self.part == WHOLE else f"{self.variant} {self.part}"

    def name_artifact(self, format_: Format) -> ArtifactKey:
        """The artifact key of the part in one format."""
        return ArtifactKey(variant=self.variant, format=format_, part=self.part)


def export_file(graph: ExportedProgram, format_: Format, path: Path) -> None:
    """Write a graph's file in one format, with the exporter's output hidden."""
    with keep_stdout_clean():
        load_exporter(format_).export_graph(graph, path)


def read_operators(format_: Format, path: Path) -> tuple[Operator, ...]:
    """Read a file's operators with constant weights."""
    with keep_stdout_clean():
        return load_exporter(format_).list_operators(path)


def write_artifact(
    target: Path,
    entry: str,
    part: Part,
    format_: Format,
    write_file: Callable[[Path], None],
    *,
    recipe_sha256: str,
    source_sha256: dict[str, str],
) -> None:
    """Fill `target`, which becomes the store's entry `entry`, with a part's file, its proof and its record.

    `write_file` writes the file itself, and raises if the file is wrong.
    """
    key = part.name_artifact(format_)
    path = target / f"{'model' if key.task is None else 'head'}.{FACTS[format_].suffix}"
    write_file(path)
    inputs = {f"input.{index}": tensor for index, tensor in enumerate(part.samples)}
    outputs = compute_outputs(part.module, part.samples, part.outputs)
    for name, tensors in (("input", inputs), ("expected", outputs)):
        for index, tensor in enumerate(tensors.values()):
            np.save(target / f"{name}.{index}.npy", tensor.numpy())
    artifact = Artifact(
        key=key,
        file=f"{entry}/{path.name}",
        size_bytes=path.stat().st_size,
        sha256=hash_file(path),
        inputs=tuple(_describe(name, tensor, part) for name, tensor in inputs.items()),
        outputs=tuple(_describe(name, tensor, part) for name, tensor in outputs.items()),
        parameters=count_parameters(part.module),
        factored_layers=tuple(part.plan.factors) if part.plan is not None else (),
        recipe_sha256=recipe_sha256,
        source_sha256=source_sha256,
        toolchain=list_versions(format_),
    )
    (target / _RECORD).write_text(encode(artifact), encoding="utf-8")


@torch.inference_mode()
def compute_outputs(module: nn.Module, samples: Inputs, names: Sequence[str]) -> dict[str, Tensor]:
    """Compute every output of a module by name, samples first, in the order of its graph."""
    batches = [_name_outputs(module(*batch), names) for batch in split(samples)]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _name_outputs(given: object, names: Sequence[str]) -> Outputs:
    found = flatten(given)
    if set(names) <= set(found):
        return {name: found[name] for name in names}
    if isinstance(given, Mapping):
        return found
    if len(found) != len(names):
        message = f"the model returns {len(found)} outputs, the names are {', '.join(names) or 'missing'}"
        raise BuildError(message, hint="name every output, or return them as a dictionary")
    return dict(zip(names, found.values(), strict=True))


def _describe(name: str, tensor: Tensor, part: Part) -> TensorSpec:
    """Describe one input or output at batch size 1; `tensor` holds the proof's samples."""
    seen = (1, *tensor.shape[1:])
    spec = TensorSpec(
        name=name,
        shape=part.shapes.get(name, seen),
        dtype=str(tensor.numpy().dtype),
        classes_axis=part.classes.get(name),
    )
    if not spec.fits(seen):
        message = f"{part.title}: the proof's {name} has the shape {seen}, expected {spec.shape}"
        raise BuildError(message, hint="use proof inputs of a length in the stated range")
    return spec


def read_artifact(entry: Entry) -> Artifact:
    """The record of an exported file; its `file` is relative to the store."""
    return decode(Artifact, entry.read(_RECORD).read_bytes(), where=str(entry.folder))


def find_proof(artifact: Artifact, store: Store) -> tuple[Path, list[Path], list[Path]]:
    """The artifact's file, its parity inputs and torch's expected outputs; the arrays are checked for changes."""
    path = store.root / artifact.file
    entry = store.open(path.parent)
    inputs = [entry.read(f"input.{index}.npy") for index in range(len(artifact.inputs))]
    expected = [entry.read(f"expected.{index}.npy") for index in range(len(artifact.outputs))]
    return path, inputs, expected
