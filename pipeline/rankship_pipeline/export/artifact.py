"""Writes an exported file with its record and its proof to the store, and reads them.

    <store>/artifact-<hash>/            model.<suffix>  artifact.json  input.<i>.npy  expected.<i>.npy
    <store>/artifact-<hash>/<lengths>/  input.<i>.npy  expected.<i>.npy

There is one array for each input and each output, its samples on axis 0. A file that takes ranges of lengths has
further proofs, each in a folder named by its lengths.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rankship_pipeline.evaluate.calibrate import split
from rankship_pipeline.export import Operator, keep_stdout_clean, load_exporter
from rankship_pipeline.export.agreement import ROUNDED_TIE, find_agreement, find_cosine, find_error
from rankship_pipeline.export.collector import pause_collector
from rankship_pipeline.export.rounded_weight import RoundedWeight
from rankship_pipeline.export.shapes import (
    Axes,
    Point,
    count_proof,
    count_rows,
    describe_point,
    describe_sides,
    find_example,
    find_rows,
    fit_samples,
    list_dimensions,
    list_fixed_points,
    list_points,
)
from rankship_pipeline.foundation.artifact_key import WHOLE, ArtifactKey, Delegate, Precision, Variant
from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.errors import BuildError
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.formats import FACTS, Format
from rankship_pipeline.foundation.generation import Generation
from rankship_pipeline.foundation.records import Artifact, Dimension, RankPlan, TensorSpec
from rankship_pipeline.foundation.store import Entry, Store
from rankship_pipeline.foundation.toolchain import list_versions
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import count_parameters
from rankship_pipeline.models.outputs import ONLY, Outputs, flatten
from rankship_pipeline.recipe.precision import Computed

_RECORD = "artifact.json"
_TEXTS = 4  # of a proof of a file that generates


@dataclass(frozen=True)
class Part:
    """A part of a model that becomes one file per format: its module, its proof's inputs, its plan.

    `outputs` names the module's outputs, in order; a module that returns a dictionary names them itself. `classes` has
    the axis of classes, by name, of outputs that hold classes' scores. `bare` says that a single output is no part of
    a container. `axes` are the axes of each input that may vary. Of a format of fixed shapes, `shape` names a file's
    lengths where they are not the data's, and `rows` is the number of samples that it takes at once. `precision` is the
    type of its weights: `weights` are those that its file stores so, with these `activations`, where the module's own
    graph says nothing of them. `reference` computes what the file must, where the module does not; `plain` is the
    module whose activations are not rounded. A file with `generation` goes on with texts, which are its samples: their
    first `prompt_tokens` are given at once, and proven are the logits from the last of these on.
    `delegate` is what its file is made for.
    """

    variant: Variant
    module: nn.Module
    samples: Inputs
    plan: RankPlan | None = None
    part: str = WHOLE
    outputs: tuple[str, ...] = (ONLY,)
    classes: Mapping[str, int] = field(default_factory=dict)
    bare: bool = True
    axes: Axes = ()
    shape: str = ""
    rows: int = 1
    precision: Precision = "float32"
    weights: tuple[RoundedWeight, ...] = ()
    activations: Computed = "float32"
    reference: nn.Module | None = None
    plain: nn.Module | None = None
    generation: Generation | None = None
    prompt_tokens: int = 0
    delegate: Delegate = "cpu"

    @property
    def proven(self) -> nn.Module:
        """The module whose outputs the file's must be."""
        return self.module if self.reference is None else self.reference

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Every length of its inputs that may vary."""
        return list_dimensions(one for own in self.axes for one in own.values())

    @property
    def returned(self) -> tuple[str, ...]:
        """The names of outputs to take of what the module returns; () for a module that returns one bare tensor."""
        return () if len(self.outputs) == 1 and self.bare else self.outputs

    @property
    def title(self) -> str:
        """Its name in progress and errors."""
        named = self.variant if self.part == WHOLE else f"{self.variant} {self.part}"
        named = named if self.precision == "float32" else f"{named}, {self.precision}"
        named = named if self.delegate == "cpu" else f"{named}, {self.delegate}"
        return f"{named}, {self.shape}" if self.shape else named

    def name_artifact(self, format_: Format) -> ArtifactKey:
        """The artifact key of the part in one format."""
        return ArtifactKey(
            variant=self.variant,
            format=format_,
            precision=self.precision,
            delegate=self.delegate,
            part=self.part,
            shape=self.shape,
        )


@dataclass(frozen=True)
class Proof:
    """The files with inputs and with torch's outputs that an artifact is proven on, `rows` samples at a time.

    `lengths` names the lengths of its inputs, where they are not the data's own. Of a file that goes on with texts, the
    first `prompt_tokens` are given at once.
    """

    inputs: list[Path]
    expected: list[Path]
    rows: int = 1
    lengths: str = ""
    prompt_tokens: int = 0


def fix_shapes(part: Part) -> list[Part]:
    """The part at each shape that a format of fixed shapes gets a file for; the data's own shape is the first."""
    if not part.dimensions:
        return [part]
    points = list_fixed_points(part.dimensions)
    return [
        replace(_fix(part, point), shape=describe_point(point) if place else "") for place, point in enumerate(points)
    ]


def _fix(part: Part, point: Point) -> Part:
    rows = count_rows(part.axes, point)
    whole = max(rows, len(part.samples[0]) // rows * rows)
    return replace(part, samples=fit_samples(part.samples, part.axes, point, whole), axes=(), rows=rows)


def export_file(
    graph: ExportedProgram, format_: Format, path: Path, axes: Axes = (), delegate: Delegate = "cpu"
) -> None:
    """Write a graph's file in one format, with the exporter's output hidden."""
    with keep_stdout_clean(), pause_collector():
        exporter = load_exporter(format_)
        if delegate == "cpu":
            exporter.export_graph(graph, path, axes)
        else:
            from rankship_pipeline.export.executorch import export_for  # no other format's files know their delegate

            export_for(delegate, graph, path)


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
    points = [find_example(part.dimensions), *list_points(part.dimensions)]
    proven = list(_list_proven(part, points))
    proofs = [_keep_proof(target / folder, one) for folder, one in proven]
    error, cosine, agreement = None, None, None
    if part.plain is not None:  # of a text's few last answers it is another than of many
        measured = proven if part.generation is not None else proven[:1]
        found = [
            _measure_rounding(one, part.plain, made) for (_, one), (_, made) in zip(measured, proofs, strict=False)
        ]
        error, cosine = max(one[0] for one in found), min(one[1] for one in found)
        agreement = min((one[2] for one in found if one[2] is not None), default=None)
    artifact = Artifact(
        key=key,
        file=f"{entry}/{path.name}",
        size_bytes=path.stat().st_size,
        sha256=hash_file(path),
        inputs=_describe_inputs(part, proofs[0][0]),
        outputs=_describe_outputs(part, [outputs for _, outputs in proofs[: len(points)]], points),
        parameters=count_parameters(part.module),
        factored_layers=tuple(part.plan.factors) if part.plan is not None else (),
        recipe_sha256=recipe_sha256,
        source_sha256=source_sha256,
        toolchain=list_versions(format_),
        rounding_error=error,
        rounding_cosine=cosine,
        rounding_agreement=agreement,
        generation=part.generation,
    )
    (target / _RECORD).write_text(encode(artifact), encoding="utf-8")


Tensors = dict[str, Tensor]


def _list_proven(part: Part, points: Sequence[Point]) -> Iterator[tuple[str, Part]]:
    """Yield the folder of every proof and the part with its samples, those that the file is timed with first."""
    if part.generation is None:
        yield "", part
        for point in points[1:]:
            yield _name_folder(point), _at_point(part, point)
        return
    stream = part.samples[0].flatten()
    for place, text in enumerate(part.generation.proofs):
        count = _TEXTS if place == 0 else 1
        ids = stream.repeat(-(-count * text.tokens // len(stream)))[: count * text.tokens].view(count, text.tokens)
        yield _name_lengths(text.title), replace(part, samples=(ids.clone(),), prompt_tokens=text.prompt_tokens)


def _keep_proof(folder: Path, part: Part) -> tuple[Tensors, Tensors]:
    """Write a part's samples and torch's outputs on them; both by name."""
    folder.mkdir(exist_ok=True)
    inputs = {f"input.{index}": tensor for index, tensor in enumerate(part.samples)}
    outputs = _compute(part, part.proven)
    for name, tensors in (("input", inputs), ("expected", outputs)):
        for index, tensor in enumerate(tensors.values()):
            np.save(folder / f"{name}.{index}.npy", tensor.contiguous().numpy())  # row-major, as runtimes read
    return inputs, outputs


def _measure_rounding(part: Part, plain: nn.Module, outputs: Tensors) -> tuple[float, float, float | None]:
    """How far a part's outputs are from those of `plain`: the largest error, and the least cosine of a sample.

    Also the share of likeliest tokens that stay, of a file that generates: of so many, some are always near another.
    """
    pairs = {name: (outputs[name].numpy(), exact.numpy()) for name, exact in _compute(part, plain).items()}
    kept = [
        find_agreement(*pairs[name], axis, ROUNDED_TIE)
        for name, axis in part.classes.items()
        if part.generation is not None and name in pairs
    ]
    error = max(find_error(*pair) for pair in pairs.values())
    return error, min(find_cosine(*pair) for pair in pairs.values()), min(kept, default=None)


def _compute(part: Part, module: nn.Module) -> Tensors:
    """What a part's file must give for its samples: all outputs, or a text's logits from the prompt's end on."""
    outputs = compute_outputs(module, part.samples, part.outputs, part.rows)
    return {name: one[:, part.prompt_tokens - 1 :] if part.prompt_tokens else one for name, one in outputs.items()}


def _at_point(part: Part, point: Point) -> Part:
    rows = count_rows(part.axes, point)
    return replace(part, samples=fit_samples(part.samples, part.axes, point, count_proof(rows)), rows=rows)


def _name_folder(point: Point) -> str:
    return _name_lengths(describe_point(point))


def _name_lengths(lengths: str) -> str:
    return lengths.replace(", ", "-").replace(" ", "-")


@torch.inference_mode()
def compute_outputs(module: nn.Module, samples: Inputs, names: Sequence[str], rows: int = 1) -> dict[str, Tensor]:
    """Compute every output of a module by name, samples first, in the order of its graph.

    Several `rows` are the samples that a file takes at once, and so does the module.
    """
    count = len(samples[0])
    taken = (
        split(samples) if rows == 1 else [tuple(one[at : at + rows] for one in samples) for at in range(0, count, rows)]
    )
    batches = [_name_outputs(module(*batch), names) for batch in taken]
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


def _describe_inputs(part: Part, tensors: Tensors) -> tuple[TensorSpec, ...]:
    axes = part.axes or ({},) * len(part.samples)
    return tuple(
        TensorSpec(
            name=name,
            shape=tuple(own.get(axis, side) for axis, side in enumerate((part.rows, *tensor.shape[1:]))),
            dtype=str(tensor.numpy().dtype),
        )
        for (name, tensor), own in zip(tensors.items(), axes, strict=True)
    )


def _describe_outputs(part: Part, computed: Sequence[Tensors], points: Sequence[Point]) -> tuple[TensorSpec, ...]:
    """Describe outputs by their shapes at all points, of which the example's is the first."""
    rows = [count_rows(part.axes, point) if part.dimensions else part.rows for point in points]
    return tuple(
        TensorSpec(
            name=name,
            shape=describe_sides(
                name,
                [(some, *tensors[name].shape[1:]) for some, tensors in zip(rows, computed, strict=True)],
                points,
                part.dimensions,
            ),
            dtype=str(first.numpy().dtype),
            classes_axis=part.classes.get(name),
        )
        for name, first in computed[0].items()
    )


def find_output_axes(part: Part) -> Axes:
    """The axes of each output of a part that vary with its inputs."""
    if not part.dimensions:
        return ()
    points = [find_example(part.dimensions), *list_points(part.dimensions)]
    seen = [_at_point(part, point) for point in points]
    computed = [compute_outputs(one.module, one.samples, one.outputs, one.rows) for one in seen]
    return tuple(
        {axis: side for axis, side in enumerate(one.shape) if isinstance(side, Dimension)}
        for one in _describe_outputs(part, computed, points)
    )


def read_artifact(entry: Entry) -> Artifact:
    """The record of an exported file; its `file` is relative to the store."""
    return decode(Artifact, entry.read(_RECORD).read_bytes(), where=str(entry.folder))


def find_proof(artifact: Artifact, store: Store) -> tuple[Path, list[Path], list[Path]]:
    """The artifact's file, and inputs of the shape it is timed with, and torch's expected outputs for them."""
    path, (first, *_) = find_proofs(artifact, store)
    return path, first.inputs, first.expected


def find_proofs(artifact: Artifact, store: Store) -> tuple[Path, list[Proof]]:
    """The artifact's file, and its proofs, the data's own shape first; the arrays are checked for changes."""
    path = store.root / artifact.file
    entry = store.open(path.parent)

    def find(lengths: str, rows: int, prompt_tokens: int = 0) -> Proof:
        folder = f"{_name_lengths(lengths)}/" if lengths else ""
        return Proof(
            inputs=[entry.read(f"{folder}input.{index}.npy") for index in range(len(artifact.inputs))],
            expected=[entry.read(f"{folder}expected.{index}.npy") for index in range(len(artifact.outputs))],
            rows=rows,
            lengths=lengths,
            prompt_tokens=prompt_tokens,
        )

    if artifact.generation is not None:
        return path, [find(one.title, 1, one.prompt_tokens) for one in artifact.generation.proofs]
    first, *others = find_example(artifact.dimensions), *list_points(artifact.dimensions)
    return path, [
        find("", find_rows(artifact.inputs, first)),
        *(find(describe_point(point), find_rows(artifact.inputs, point)) for point in others),
    ]
