"""One model into one file per format, from one graph, each beside the inputs and outputs that prove it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rankship_pipeline.evaluate.accuracy import predict
from rankship_pipeline.export import EXPORTERS, check_factors, keep_stdout_clean, load_exporter
from rankship_pipeline.export.graph import list_graph_operators
from rankship_pipeline.flow.preflight import Prepared
from rankship_pipeline.flow.stages import Model
from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import UnsupportedOp
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.records import Artifact, Format, RankPlan, TensorSpec, Variant
from rankship_pipeline.foundation.store import Entry, Store
from rankship_pipeline.foundation.toolchain import hash_code, list_versions
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.heads import Headed
from rankship_pipeline.models.layers import count_parameters

_RECORD = "artifact.json"


@dataclass(frozen=True)
class Part:
    """What becomes one file per format: a module, the inputs of its proof, and the plan of its factored layers.

    `task` is whose head it is; `output` names what it gives.
    """

    variant: Variant
    module: nn.Module
    samples: Inputs
    plan: RankPlan | None = None
    task: str | None = None
    output: str = "logits"

    @property
    def title(self) -> str:
        """What progress and errors call it."""
        return self.variant if self.task is None else f"{self.variant} head of {self.task}"


def list_parts(prepared: Prepared, variant: Variant, module: nn.Module, plan: RankPlan | None) -> list[Part]:
    """The model itself; or the backbone that tasks share, then every task's head, proven on the backbone's features."""
    data = prepared.data
    samples = tuple(tensor[: prepared.recipe.parity.samples] for tensor in data.strip(data.test_inputs))
    if not isinstance(module, Headed):
        return [Part(variant, module, samples, plan)]
    features = (predict(module.backbone, samples).clone(),)  # tracing refuses tensors of inference mode
    heads = [Part(variant, module.heads[str(task)], features, task=name) for task, name in enumerate(data.tasks)]
    return [Part(variant, module.backbone, samples, plan, output="features"), *heads]


def export_variant(
    prepared: Prepared, store: Store, steps: Steps, variant: Variant, model: Model, plan: RankPlan | None
) -> list[Artifact]:
    """Export one model to every format of the recipe; formats already in the store are read, not made again.

    With heads, the backbone's files come first, then theirs. Each entry holds the file, `artifact.json`, the parity
    inputs `input.<i>.npy` and torch's outputs `expected.0.npy`.
    """
    parts = list_parts(prepared, variant, model.module, plan)
    return [one for part in parts for one in _export_part(prepared, store, steps, model.content, part)]


def _export_part(prepared: Prepared, store: Store, steps: Steps, content: str, part: Part) -> list[Artifact]:
    graph: ExportedProgram | None = None
    artifacts = []
    for name in prepared.recipe.export.formats:
        made_from: dict[str, object] = {
            "model": content,
            "variant": part.variant,
            "task": part.task,
            "format": name,
            "recipe": prepared.recipe_sha256,
            "test": prepared.test_sha256,
            "code": hash_code(),
            "versions": list_versions(name),
        }
        entry = store.find("artifact", made_from)
        if entry is None:
            with steps.step(f"export {part.title} to {name}"):
                graph = graph or trace_graph(part.module, tuple(tensor[:1] for tensor in part.samples))
                entry = _export(prepared, store, made_from, name, graph, part)
        artifacts.append(read_artifact(entry))
    return artifacts


def trace_graph(module: nn.Module, example: tuple[Tensor, ...]) -> ExportedProgram:
    """The one graph that every format is made from, at batch size 1."""
    try:
        return torch.export.export(module, example)
    except Exception as failure:  # torch.export raises whatever the model's own code and its tracer do
        raise UnsupportedOp(
            f"torch.export cannot trace the model: {type(failure).__name__}: {failure}",
            hint="remove data-dependent control flow from its forward",
        ) from failure


def read_artifact(entry: Entry) -> Artifact:
    """The record of an exported file; its `file` is relative to the store."""
    return decode(Artifact, entry.read(_RECORD).read_bytes(), where=str(entry.folder))


def find_proof(artifact: Artifact, store: Store) -> tuple[Path, list[Path], list[Path]]:
    """The artifact's file, its parity inputs and torch's expected outputs; the arrays are known to be unchanged."""
    path = store.root / artifact.file
    entry = store.open(path.parent)
    inputs = [entry.read(f"input.{index}.npy") for index in range(len(artifact.inputs))]
    return path, inputs, [entry.read("expected.0.npy")]


def _export(
    prepared: Prepared,
    store: Store,
    made_from: dict[str, object],
    name: Format,
    graph: ExportedProgram,
    part: Part,
) -> Entry:
    module, samples, plan = part.module, part.samples, part.plan
    file = f"model.{EXPORTERS[name][1]}" if part.task is None else f"head.{EXPORTERS[name][1]}"

    def make(target: Path) -> None:
        with keep_stdout_clean():
            exporter = load_exporter(name)
            exporter.export_graph(graph, target / file)
            operators = exporter.list_operators(target / file)
        if plan is not None:
            check_factors(plan, list_graph_operators(graph), operators, where=f"{part.title} {name}")
        outputs = predict(module, samples)
        for index, tensor in enumerate(samples):
            np.save(target / f"input.{index}.npy", tensor.numpy())
        np.save(target / "expected.0.npy", outputs.numpy())
        artifact = Artifact(
            variant=part.variant,
            format=name,
            file=f"{store.name('artifact', made_from)}/{file}",
            size_bytes=(target / file).stat().st_size,
            sha256=hash_file(target / file),
            inputs=tuple(_describe(f"input.{index}", tensor) for index, tensor in enumerate(samples)),
            outputs=(_describe(part.output, outputs),),
            parameters=count_parameters(module),
            factored_layers=tuple(plan.factors) if plan is not None else (),
            recipe_sha256=prepared.recipe_sha256,
            source_sha256=prepared.source_sha256,
            toolchain=list_versions(name),
            task=part.task,
        )
        (target / _RECORD).write_text(encode(artifact), encoding="utf-8")

    return store.produce("artifact", made_from, make)


def _describe(name: str, samples: Tensor) -> TensorSpec:
    return TensorSpec(name=name, shape=(1, *samples.shape[1:]), dtype=str(samples.numpy().dtype))
