"""Exports models to one file per format, each model from one graph, with the inputs and outputs of their proofs."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.export import Expected, check_factors
from rankship_pipeline.export.apart import Job, choose_workers, export_apart, save_graph
from rankship_pipeline.export.artifact import (
    Part,
    export_file,
    find_output_axes,
    fix_shapes,
    read_artifact,
    read_operators,
    write_artifact,
)
from rankship_pipeline.export.bits import fit_format, store_bits
from rankship_pipeline.export.decoders import write_decoder
from rankship_pipeline.export.decoders.bundles import write_bundle
from rankship_pipeline.export.graph import expect_operators, trace_graph, trace_ranges
from rankship_pipeline.export.rounded_weight import RoundedWeight
from rankship_pipeline.export.shapes import find_axes
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.flow.stage_model import Model
from rankship_pipeline.foundation.artifact_key import WHOLE, Precision, Variant, head_of
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.delegates import find_word
from rankship_pipeline.foundation.formats import FACTS, Format
from rankship_pipeline.foundation.generation import TOKENIZER
from rankship_pipeline.foundation.records import Artifact, RankPlan
from rankship_pipeline.foundation.spare import count_cores, find_free_bytes
from rankship_pipeline.foundation.store import Entry, Store
from rankship_pipeline.foundation.toolchain import hash_code, list_versions
from rankship_pipeline.models.heads import Headed
from rankship_pipeline.models.huggingface import find_snapshot
from rankship_pipeline.models.outputs import ONLY
from rankship_pipeline.recipe.precision import Computed


@dataclass(frozen=True)
class Bits:
    """The type of a model's weights; those that its files store so, unless its graph itself computes in 8 bits.

    Where it does, `plain` is the model before, with the same weights.
    """

    precision: Precision
    activations: Computed
    weights: tuple[RoundedWeight, ...] = ()
    plain: nn.Module | None = None

    def give(self, part: Part) -> Part:
        """A part of this model, whose file has these bits."""
        return replace(
            part, precision=self.precision, weights=self.weights, activations=self.activations, plain=self.plain
        )


def list_parts(
    prepared: Prepared, variant: Variant, module: nn.Module, plan: RankPlan | None, bits: Bits | None = None
) -> list[Part]:
    """The model; or the backbone that tasks share, then every task's head, proven on the backbone's features."""
    data, choice = prepared.data, prepared.recipe.export
    samples = tuple(tensor[: prepared.recipe.parity.samples] for tensor in data.strip(data.test_inputs))
    if not isinstance(module, Headed):
        judging = prepared.court.judging
        named: dict[str, Any] = {"outputs": judging.outputs, "classes": judging.classes, "bare": judging.bare}
        axes = find_axes(choice, prepared.model, samples)  # the inputs' names are those of the model's own code
        part = Part(variant, module, samples, plan, axes=axes, generation=prepared.generation, **named)
        return [part if bits is None else bits.give(part)]
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


@dataclass(frozen=True, eq=False)
class _Traced:
    """A part with what all its formats share, each made when it is first asked for.

    One with weights of fewer bits is fitted to one format, which takes a copy of the model.
    """

    bare: Part
    fitted_to: Format | None = None

    @cached_property
    def part(self) -> Part:
        """The part as its file is made from."""
        return self.bare if self.fitted_to is None else fit_format(self.bare, self.fitted_to)

    def forget(self) -> None:
        """Drop what was made, once its files are written."""
        for name in ("part", "graph", "expected"):
            self.__dict__.pop(name, None)

    @cached_property
    def graph(self) -> ExportedProgram:
        """Its graph."""
        return trace_part(self.part)

    @cached_property
    def expected(self) -> Expected:
        """The operators that a file of the graph must and may hold."""
        return expect_operators(self.graph)


@dataclass(frozen=True)
class _File:
    """A file to make: a part in one format, and what it is made from, which names its entry of the store."""

    traced: _Traced
    format_: Format
    made_from: dict[str, object]

    @property
    def title(self) -> str:
        """Its name in progress."""
        return f"export {self.traced.bare.title} to {self.format_}"

    @property
    def cost_s(self) -> float:
        """About how many CPU seconds its export takes."""
        parts = sum(1 for one in self.traced.bare.module.modules() if not any(one.children()))
        return parts * FACTS[self.format_].seconds_a_module


Shipped = tuple[Variant, Model, RankPlan | None, Bits | None]  # a model to export


def export_variants(prepared: Prepared, store: Store, steps: Steps, models: Sequence[Shipped]) -> list[Artifact]:
    """Export models to every format of the recipe; files that are already in the store are not made again.

    Of a model with heads, the backbone's files come first, then the heads'. Large models are exported by several
    processes at once.
    """
    files = [
        one
        for variant, model, plan, bits in models
        for part in list_parts(prepared, variant, model.module, plan, bits)
        for one in _list_files(prepared, model.content, part)
    ]
    _export_apart(prepared, store, steps, files)
    return [_find_or_make(prepared, store, steps, one) for one in files]


def _find_or_make(prepared: Prepared, store: Store, steps: Steps, one: _File) -> Artifact:
    entry = store.find("artifact", one.made_from)
    if entry is None:

        def write(path: Path) -> Expected | None:
            part = one.traced.part
            if part.generation is not None:
                return write_decoder(part.module, one.format_, path, part.generation)
            export_file(one.traced.graph, one.format_, path, part.axes, part.delegate)
            return None

        with steps.step(one.title):
            entry = _keep(prepared, store, steps, one, write)
        if one.traced.fitted_to is not None:
            one.traced.forget()
    return read_artifact(entry)


def _list_files(prepared: Prepared, content: str, part: Part) -> list[_File]:
    """The files of a part: one a format, or of a format of fixed shapes one for each shape that it may take."""
    formats = prepared.recipe.export.formats
    if not part.dimensions:
        taken = [(_Traced(part), formats)]
    else:
        ranged = tuple(one for one in formats if FACTS[one].takes_ranges)
        fixed = tuple(one for one in formats if not FACTS[one].takes_ranges)
        taken = [(_Traced(part), ranged), *((_Traced(one), fixed) for one in (fix_shapes(part) if fixed else ()))]
    if part.weights:  # each format rounds activations in its own way
        taken = [(_Traced(one.bare, name), (name,)) for one, names in taken for name in names]
    made_for = (find_word("executorch", word).delegate for word in dict.fromkeys(prepared.recipe.export.executorch))
    if "executorch" in formats and part.precision == "float32" and part.part == WHOLE and part.generation is None:
        taken += [(_Traced(replace(part, delegate=delegate)), ("executorch",)) for delegate in made_for]
    return [
        _File(
            traced,
            name,
            {
                "model": content,
                "artifact": asdict(traced.bare.name_artifact(name)),
                "recipe": prepared.recipe_sha256,
                "test": prepared.test_sha256,
                "code": hash_code(),
                "versions": list_versions(name),
                **prepared.generating_sha256,
            },
        )
        for traced, names in taken
        for name in names
    ]


def _export_apart(prepared: Prepared, store: Store, steps: Steps, files: Sequence[_File]) -> None:
    """Make those files in processes of their own that can be, if that ends sooner; nothing if not."""
    usual = (one for one in files if one.traced.bare.generation is None and one.traced.bare.delegate == "cpu")
    alone = [one for one in usual if not one.traced.bare.dimensions]
    missing = [one for one in alone if store.find("artifact", one.made_from) is None]
    costs_s = {one.title: one.cost_s for one in missing}
    cores = count_cores()
    largest = max((sum(map(_count_bytes, one.traced.bare.module.parameters())) for one in missing), default=0)
    workers = choose_workers(list(costs_s.values()), largest, cores, find_free_bytes())
    if workers == 1:
        return
    store.root.mkdir(parents=True, exist_ok=True)
    # what a killed build leaves is swept from the store
    with tempfile.TemporaryDirectory(prefix=".export-", suffix=".tmp", dir=store.root) as name:
        with steps.step(f"trace {', '.join(dict.fromkeys(one.traced.bare.title for one in missing))}"):
            parts = dict.fromkeys(one.traced for one in missing)
            graphs = {traced: Path(name) / f"graph.{place}.pt2" for place, traced in enumerate(parts)}
            saved = {traced for traced, graph in graphs.items() if save_graph(traced.graph, graph)}
        jobs = {
            Job(
                title=one.traced.bare.title,
                graph=graphs[one.traced],
                format_=one.format_,
                file=Path(name) / f"{place}.{FACTS[one.format_].suffix}",
            ): one
            for place, one in sorted(enumerate(missing), key=lambda each: -each[1].cost_s)  # the longest begin first
            if one.traced in saved
        }
        for job in export_apart(list(jobs), workers, max(1, cores // workers), steps):
            _keep(prepared, store, steps, jobs[job], partial(_take_over, job.file))


def _take_over(file: Path, path: Path) -> None:
    """Move a file that another process exported to its place."""
    shutil.move(file, path)


def _count_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _keep(
    prepared: Prepared, store: Store, steps: Steps, one: _File, write: Callable[[Path], Expected | None]
) -> Entry:
    """Put a file into the store with its proof, once it holds every factored layer as a chain of operators.

    `write` writes it, and says what operators it must hold where those are not the graph's.
    """
    part = one.traced.part

    def write_file(path: Path) -> None:
        own_expected = write(path)
        computes_rounded = part.precision != "float32" and not part.weights and part.generation is None
        own = one.traced.graph if computes_rounded else None
        if floats := store_bits(part, own, one.format_, path):
            changed = ", ".join(floats)
            steps.note(f"{part.title} {one.format_}: the converter changed the weights of {changed}: they stay float32")
        if part.plan is not None and part.delegate != "vulkan":  # nothing reads Vulkan's graphs back
            found = read_operators(one.format_, path)
            check_factors(part.plan, own_expected or one.traced.expected, found, where=f"{part.title} {one.format_}")
        if part.generation is not None:
            _write_companions(prepared, part, one.format_, path)

    make = partial(
        write_artifact,
        entry=store.name("artifact", one.made_from),
        part=part,
        format_=one.format_,
        write_file=write_file,
        recipe_sha256=prepared.recipe_sha256,
        source_sha256=prepared.source_sha256,
    )
    return store.produce("artifact", one.made_from, make)


def _write_companions(prepared: Prepared, part: Part, format_: Format, path: Path) -> None:
    """Put the tokenizer, and what a format's own programs want, beside a file that generates."""
    snapshot = find_snapshot(prepared.recipe.models[0], prepared.folder)
    for name in TOKENIZER:
        if (snapshot / name).is_file():
            shutil.copyfile(snapshot / name, path.with_name(name))
    if part.generation is not None:
        write_bundle(part.module, format_, path, part.generation, snapshot)
