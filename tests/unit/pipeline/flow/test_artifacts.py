"""Models become files in this process or in several: the same files either way, each part looked through once."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from make.recipes import write_untrained_recipe
from rankship_pipeline.export import Expected
from rankship_pipeline.export.apart import Job
from rankship_pipeline.export.artifact import export_file
from rankship_pipeline.export.graph import expect_operators
from rankship_pipeline.flow import artifacts
from rankship_pipeline.flow.build import build_recipe
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.records import Build
from rankship_pipeline.foundation.spare import count_cores
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.rules import read_recipe


def build(folder: Path, store: str) -> Build:
    recipe = read_recipe(folder / "tiny.toml")
    return build_recipe(prepare(recipe, folder), Store(folder / store), Steps(quiet=True))[0]


def list_hashes(build: Build) -> list[tuple[ArtifactKey, str]]:
    return [(one.key, one.sha256) for one in build.artifacts]


def test_files_of_several_processes_are_those_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_untrained_recipe(tmp_path, "a")
    seen, expected = list[Job](), list[object]()

    def export_here(jobs: Sequence[Job], workers: int, threads: int, _steps: Steps) -> Iterator[Job]:
        assert (workers, threads) == (2, max(1, count_cores() // 2))
        for job in jobs:
            export_file(torch.export.load(job.graph), job.format_, job.file)
            seen.append(job)
            yield job

    def look_through(graph: torch.export.ExportedProgram) -> Expected:
        expected.append(graph)
        return expect_operators(graph)

    monkeypatch.setattr(artifacts, "expect_operators", look_through)
    alone = build(tmp_path, "alone")
    monkeypatch.setattr(artifacts, "choose_workers", lambda *_: 2)
    monkeypatch.setattr(artifacts, "export_apart", export_here)
    together = build(tmp_path, "together")
    assert list_hashes(together) == list_hashes(alone)
    assert [one.title for one in seen] == ["compressed", "dense"], "the longest begins"
    assert len(expected) == 2, "the compressed model once in each build"
    assert not list((tmp_path / "together").glob(".export-*")), "nothing is left behind"
    assert list_hashes(build(tmp_path, "together")) == list_hashes(alone)
    assert len(seen) == 2, "nothing is made twice"


def test_what_cannot_be_saved_is_exported_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_untrained_recipe(tmp_path, "a")
    monkeypatch.setattr(artifacts, "choose_workers", lambda *_: 2)
    monkeypatch.setattr(artifacts, "save_graph", lambda *_: False)
    assert [one.key.variant for one in build(tmp_path, "store").artifacts] == ["dense", "compressed"]
