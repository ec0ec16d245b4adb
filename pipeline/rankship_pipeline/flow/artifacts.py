"""One model into one file per format, from one graph, each beside the inputs and outputs that prove it."""

from pathlib import Path

import numpy as np
from torch import Tensor, nn
from torch.export import ExportedProgram

from rankship_pipeline.evaluate.accuracy import predict
from rankship_pipeline.export import check_factors, keep_stdout_clean, load_exporter
from rankship_pipeline.export.artifact import _RECORD, Part, read_artifact
from rankship_pipeline.export.graph import list_graph_operators, trace_graph
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.flow.stages import Model
from rankship_pipeline.foundation.codec import encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.formats import FACTS
from rankship_pipeline.foundation.records import Artifact, Format, RankPlan, TensorSpec, Variant
from rankship_pipeline.foundation.store import Entry, Store
from rankship_pipeline.foundation.toolchain import hash_code, list_versions
from rankship_pipeline.models.heads import Headed
from rankship_pipeline.models.layers import count_parameters


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


def _export(
    prepared: Prepared,
    store: Store,
    made_from: dict[str, object],
    name: Format,
    graph: ExportedProgram,
    part: Part,
) -> Entry:
    module, samples, plan = part.module, part.samples, part.plan
    file = f"{'model' if part.task is None else 'head'}.{FACTS[name].suffix}"

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
