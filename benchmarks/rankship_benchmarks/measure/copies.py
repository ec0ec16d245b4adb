"""Copies of a build's files outside the store, with their signed manifests and the records of the build.

compressed.onnx, dense.onnx, …      every file, each with its manifest beside it
dense-onnx/, …                      of models that generate text: each file in a folder of its own, with its companions
build.json, plan.json, parity.json  Build, RankPlan and the proofs, one Verified per file
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from rankship_pipeline.foundation.codec import encode
from rankship_pipeline.foundation.files import publish_file, write_atomic
from rankship_pipeline.foundation.generation import COMPANIONS
from rankship_pipeline.foundation.records import Build, Verified
from rankship_pipeline.foundation.store import Store
from rankship_targets.session.manifest import manifest_path


def write_copies(build: Build, verified: Sequence[Verified], store: Store, folder: Path) -> list[Path]:
    """Copy every file with its manifest and write the records; returns the files and records without manifests."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for file, name in name_copies(build).items():
        source, target = store.root / file, folder / name
        target.parent.mkdir(exist_ok=True)
        pairs = [(source, target), (manifest_path(source), manifest_path(target))]
        if target.parent != folder:
            beside = (source.with_name(one) for one in COMPANIONS)
            pairs += [(one, target.with_name(one.name)) for one in beside if one.is_file()]
        for one, other in pairs:
            with publish_file(other) as path:
                shutil.copyfile(one, path)
        written.append(target)
    records = {"build.json": build, "plan.json": build.plan, "parity.json": list(verified)}
    for name, thing in records.items():
        write_atomic(folder / name, encode(thing).encode())
        written.append(folder / name)
    return written


def name_copies(build: Build) -> dict[str, str]:
    """Every file's name outside the store by its name in it: `compressed.onnx`, `dense-head-of-mnist.tflite`.

    No two are alike, on file systems that ignore case too: a later one gets a number. A file that generates keeps its
    name, which its companions know, in a folder: `compressed-int8-onnx/model.onnx`.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for artifact in build.files:
        stem, suffix = re.sub(r"[^\w.]+", "-", artifact.key.model), Path(artifact.file).suffix
        if artifact.generation is not None:
            stem, suffix = f"{stem}-{artifact.key.format}", f"/{Path(artifact.file).name}"
        name, number = stem + suffix, 2
        while name.casefold() in taken:
            name, number = f"{stem}-{number}{suffix}", number + 1
        taken.add(name.casefold())
        names[artifact.file] = name
    return names
