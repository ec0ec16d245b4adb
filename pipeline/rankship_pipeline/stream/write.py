"""Writes a compressed decoder: factors cut to the plan's ranks and every other tensor unchanged, in shards."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from rankship_pipeline.factors.saved_model import describe_saved, write_saved
from rankship_pipeline.foundation.codec import digest, encode
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import flush_folder, publish_file
from rankship_pipeline.foundation.records import RankPlan
from rankship_pipeline.models.sharded import INDEX, copy_settings, name_shards
from rankship_pipeline.models.weights import locate_tensors
from rankship_pipeline.stream.analysis import StreamAnalysis
from rankship_pipeline.stream.progress import Begin, ignore


def write_stream(analysis: StreamAnalysis, plan: RankPlan, target: Path) -> None:
    """Write the compressed model as a new folder, which appears whole; one shard in memory."""
    refuse_existing(target)
    folder = locate_part(analysis, plan, target)
    fill_part(analysis, plan, folder)
    publish_part(folder, target)


def refuse_existing(target: Path) -> None:
    """InputError where there is something in the new folder's place."""
    if target.exists():
        raise InputError(f"{target} exists already", hint="name a new folder, or delete this one")


def locate_part(analysis: StreamAnalysis, plan: RankPlan, target: Path) -> Path:
    """The hidden folder beside the new one in which it is made, named by all that it depends on."""
    key = digest([analysis.folder.name, encode(plan)])[:16]
    return target.parent / f".{target.name}.{key}.part"


def fill_part(analysis: StreamAnalysis, plan: RankPlan, folder: Path, begin: Begin = ignore) -> None:
    """Write the model's files into a folder, those that it lacks: shards with an index, settings and the plan.

    Tensor names are those of rebuild(model, plan.factors): `<layer>.0.weight` (rank, columns), `<layer>.1.weight`
    (rows, rank) and its bias. Every other tensor is copied as it is stored.
    """
    factors, checkpoint = plan.factors, analysis.decoder.checkpoint

    def convert(name: str) -> dict[str, Tensor]:
        layer, _, kind = name.rpartition(".")
        if layer not in factors:
            return {name: checkpoint.read(name)}
        if kind != "weight":
            return {f"{layer}.1.{kind}": checkpoint.read(name)}
        B, A = analysis.read_factors(layer, factors[layer].rank)
        return {f"{layer}.0.weight": B, f"{layer}.1.weight": A}

    folder.mkdir(parents=True, exist_ok=True)
    groups = analysis.decoder.group_names()
    paths = [folder / name for name in name_shards(len(groups))]
    for at, (path, names) in enumerate(zip(paths, groups, strict=True)):
        if not path.exists():
            begin("write shards", path.name, len(groups) - at)
            tensors = {new: tensor for name in names for new, tensor in convert(name).items()}
            with publish_file(path) as temporary:
                save_file(tensors, temporary, metadata={"format": "pt"})
    copy_settings(checkpoint.folder, folder)
    found = {path: locate_tensors(path) for path in paths}
    begun = {path: min((start for _, start in one.values()), default=0) for path, one in found.items()}
    index = {
        "metadata": {"total_size": sum(path.stat().st_size - start for path, start in begun.items())},
        "weight_map": {name: path.name for path, names in found.items() for name in names},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")
    write_saved(folder, describe_saved(plan, analysis.decoder.model))


def publish_part(folder: Path, target: Path) -> None:
    """Give the finished folder its name."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    flush_folder(folder)
    refuse_existing(target)
    folder.rename(target)
