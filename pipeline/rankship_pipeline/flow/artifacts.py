"""Exports one model to one file per format, from one graph, with the inputs and outputs of its proof."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.export import Expected, check_factors
from rankship_pipeline.export.artifact import (
    Part,
    export_file,
    find_output_axes,
    fix_shapes,
    read_artifact,
    read_operators,
    write_artifact,
)
from rankship_pipeline.export.graph import expect_operators, trace_graph, trace_ranges
from rankship_pipeline.export.shapes import find_axes
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.flow.stages import Model
from rankship_pipeline.foundation.artifact_key import Variant, head_of
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.formats import FACTS, Format
from rankship_pipeline.foundation.records import Artifact, RankPlan
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.foundation.toolchain import hash_code, list_versions
from rankship_pipeline.models.heads import Headed
from rankship_pipeline.models.outputs import ONLY


def list_parts(prepared: Prepared, variant: Variant, module: nn.Module, plan: RankPlan | None) -> list[Part]:
    """The model; or the backbone that tasks share, then every task's head, proven on the backbone's features."""
    data, choice = prepared.data, prepared.recipe.export
    samples = tuple(tensor[: prepared.recipe.parity.samples] for tensor in data.strip(data.test_inputs))
    if not isinstance(module, Headed):
        judging = prepared.court.judging
        named: dict[str, Any] = {"outputs": judging.outputs, "classes": judging.classes, "bare": judging.bare}
        return [Part(variant, module, samples, plan, axes=find_axes(choice, module, samples), **named)]
    axes = find_axes(choice, module.backbone, samples)
    backbone = Part(variant, module.backbone, samples, plan, outputs=("features",), axes=axes)
    features = (predict(module.backbone, samples)[ONLY].clone(),)  # tracing refuses tensors of inference mode
    varying = find_output_axes(backbone)
    heads = [
        Part(variant, module.heads[str(task)], features, part=head_of(name), classes={ONLY: -1}, axes=varying)
        for task, name in enumerate(data.tasks)
    ]
    return [backbone, *heads]


def trace_part(part: Part) -> ExportedProgram:
    """The graph of a part, of the shape of its samples, or of every length in its ranges."""
    if part.dimensions:
        return trace_ranges(part.module, part.samples, part.axes, part.returned)
    return trace_graph(part.module, tuple(tensor[: part.rows] for tensor in part.samples), part.returned)


@dataclass(frozen=True)
class _Traced:
    """A part with what all its formats share, each made when it is first asked for."""

    part: Part

    @cached_property
    def graph(self) -> ExportedProgram:
        """Its graph."""
        return trace_part(self.part)

    @cached_property
    def expected(self) -> Expected:
        """The operators that a file of the graph must and may hold."""
        return expect_operators(self.graph)


def export_variant(
    prepared: Prepared, store: Store, steps: Steps, variant: Variant, model: Model, plan: RankPlan | None
) -> list[Artifact]:
    """Export one model to every format of the recipe; files that are already in the store are not made again.

    With heads, the backbone's files come first, then the heads'.
    """
    parts = list_parts(prepared, variant, model.module, plan)
    return [one for part in parts for one in _export_part(prepared, store, steps, model.content, part)]


def _export_part(prepared: Prepared, store: Store, steps: Steps, content: str, part: Part) -> list[Artifact]:
    formats = prepared.recipe.export.formats
    if not part.dimensions:
        return _export_shape(prepared, store, steps, content, part, formats)
    artifacts = _export_shape(
        prepared, store, steps, content, part, [one for one in formats if FACTS[one].takes_ranges]
    )
    for fixed in fix_shapes(part):
        fewer = [one for one in formats if not FACTS[one].takes_ranges]
        artifacts += _export_shape(prepared, store, steps, content, fixed, fewer)
    return artifacts


def _export_shape(
    prepared: Prepared, store: Store, steps: Steps, content: str, part: Part, formats: Sequence[Format]
) -> list[Artifact]:
    traced = _Traced(part)
    artifacts = []
    for name in formats:
        made_from: dict[str, object] = {
            "model": content,
            "artifact": asdict(part.name_artifact(name)),
            "recipe": prepared.recipe_sha256,
            "test": prepared.test_sha256,
            "code": hash_code(),
            "versions": list_versions(name),
        }
        entry = store.find("artifact", made_from)
        if entry is None:
            with steps.step(f"export {part.title} to {name}"):
                make = partial(
                    write_artifact,
                    entry=store.name("artifact", made_from),
                    part=part,
                    format_=name,
                    write_file=partial(_export, traced, name),
                    recipe_sha256=prepared.recipe_sha256,
                    source_sha256=prepared.source_sha256,
                )
                entry = store.produce("artifact", made_from, make)
        artifacts.append(read_artifact(entry))
    return artifacts


def _export(traced: _Traced, name: Format, path: Path) -> None:
    """Write one file, and check that every factored layer is still a chain of operators in it."""
    part = traced.part
    export_file(traced.graph, name, path, part.axes)
    if part.plan is not None:
        check_factors(part.plan, traced.expected, read_operators(name, path), where=f"{part.title} {name}")
