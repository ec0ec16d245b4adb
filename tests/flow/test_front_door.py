"""`import rankship` end to end: files in three formats, their proofs, a run on this machine, and every docstring."""

import doctest
import importlib
import pkgutil
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest
import torch

import rankship
import rankship as rs
from make.sessions import make_net
from rankship_benchmarks.bundle.bundle import open_bundle
from rankship_pipeline.cli import main
from rankship_pipeline.factors.saved_model import read_saved
from rankship_pipeline.foundation.artifact_key import VARIANTS
from rankship_pipeline.foundation.codec import decode
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.formats import FORMATS
from rankship_pipeline.foundation.records import Build, Verified
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.models.sharded import INDEX
from rankship_pipeline.recipe import draft
from rankship_targets.session.manifest import read_manifest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
INPUTS = torch.randn(80, 20, generator=torch.Generator().manual_seed(1))
SUITE = rs.Suite(recipe="mine", rounds=1, min_samples=5, min_duration_ms=1, max_warmup_ms=5, canary=False)
MODULES = sorted(f"rankship.{one.name}" for one in pkgutil.iter_modules(rankship.__path__))
EXAMPLES = [
    example
    for name in MODULES
    for example in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
    if example.examples
]


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to write to, one store for all tests of this file, and a device of its own on this machine."""
    base = tmp_path_factory.getbasetemp()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKSHIP_STORE", str(base / "front-door-store"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(base / "front-door-cache"))


@pytest.fixture
def small() -> rs.Compressed:
    return rs.compress(make_net(), INPUTS, kept_parameters=0.5, progress=False)


def test_every_format_is_exported_proven_and_kept_with_the_model(small: rs.Compressed, tmp_path: Path) -> None:
    built = rs.export(small, tmp_path / "out", progress=False)
    assert {(one.key.variant, one.key.format) for one in built.verified} == {(v, f) for v in VARIANTS for f in FORMATS}
    session = onnxruntime.InferenceSession(built.find("onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: INPUTS[:1].numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.tensor(found), small.module(INPUTS[:1]), rtol=1e-4, atol=1e-5)
        assert torch.equal(rs.load(tmp_path / "out", into=make_net())(INPUTS), small.module(INPUTS))
    assert built.plan == small.plan
    folder = tmp_path / "out"
    assert decode(Build, (folder / "build.json").read_bytes(), where="") == built.build
    assert decode(tuple[Verified, ...], (folder / "parity.json").read_bytes(), where="") == built.verified
    for name in ("compressed.tflite", "dense.pte", "dense.onnx"):
        assert read_manifest(folder / name).verified in built.verified, "signed for this very file"
    assert read_saved(folder).recipe_sha256 == built.build.recipe_sha256
    assert built.find("tflite", "dense") == folder / "dense.tflite"
    with pytest.raises(InputError, match="no canary onnx was exported"):
        built.find("onnx", "canary")


def test_only_what_was_compressed_is_exported(tmp_path: Path) -> None:
    for given in (make_net(), rs.merge([make_net()], [INPUTS], progress=False)):
        with pytest.raises(InputError, match=f"a {type(given).__name__} cannot be exported") as caught:
            rs.export(given, tmp_path / "out")  # type: ignore[arg-type]
        assert "kept_parameters=1.0" in caught.value.hint
    whole = rs.compress(make_net(), INPUTS, kept_parameters=1.0, progress=False)
    assert whole.plan.factors == {}


def test_a_build_is_measured_into_a_bundle_with_its_page(small: rs.Compressed, tmp_path: Path) -> None:
    built = rs.export(small, "out", formats=["onnx"], progress=False)
    measured = rs.measure(built, on="this-machine", suite=SUITE, progress=False)
    assert [one.key.heading for one in measured.results] == ["onnx dense", "onnx compressed"]
    assert measured.page.read_text().startswith("<!doctype html>")
    assert open_bundle(measured.folder).header.build == built.build
    assert "recipe model · device this-machine" in measured.report()
    assert main(["report", str(measured.folder), "--to", str(tmp_path / "page.html")]) == 0, "the command reads it too"
    with pytest.raises(InputError, match="unknown device 'this-machin'") as caught:
        rs.measure(built, on="this-machin")
    assert "did you mean 'this-machine'" in caught.value.hint
    with pytest.raises(InputError, match="rounds must be at least 1"):
        rs.measure(built, on="this-machine", suite=rs.Suite(recipe="mine", rounds=0))


def test_where_files_cannot_go_is_said_before_the_work(small: rs.Compressed, recipe: Path, tmp_path: Path) -> None:
    store = tmp_path / "empty store"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / INDEX).write_text("{}")
    own = replace(small, origin=replace(small.find_origin(), store=Store(store)))
    with pytest.raises(InputError, match="holds another model, in shards"):
        rs.export(own, tmp_path / "out", formats="onnx", progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="to"):
        rs.run(recipe, to=tmp_path / "file", store=store, progress=False)
    assert not list(store.glob("*-*")), "no stage was begun"


def test_without_formats_those_that_are_installed_are_exported(
    small: rs.Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft, "can_export", lambda name: name == "onnx")
    built = rs.export(small, tmp_path / "out", progress=False)
    assert built.recipe.export.formats == ("onnx",)


def test_a_recipe_is_run_as_the_commands_run_it(
    shared_recipe: Path, shared_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKSHIP_STORE", str(shared_store))
    assert main(["build", str(shared_recipe)]) == 0
    written = rs.Recipe.read(shared_recipe)
    built = rs.run(shared_recipe, to=tmp_path / "out", progress=False)
    assert main(["verify", str(shared_recipe)]) == 0
    again = rs.run(written, folder=shared_recipe.parent, progress=False)
    assert again.build == built.build, "the command's build is found in the store"
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir() if path.stem == "compressed") == [
        ".onnx",
        ".pte",
        ".tflite",
    ]
    assert again.find("onnx").parent.name.startswith("artifact-")


def test_the_command_and_python_go_on_with_one_run(
    shared_recipe: Path, shared_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKSHIP_STORE", str(shared_store))
    suites = []

    def see(_build: Build, _prepared: object, suite: rs.Suite, *_: object, **__: object) -> None:
        suites.append(suite)
        raise InputError("seen")

    monkeypatch.setattr("rankship.measured.plan_measuring", see)
    monkeypatch.setattr("rankship_benchmarks.fleet.measure.plan_measuring", see)
    assert main(["run", str(shared_recipe), "--on", "this-machine"]) == 2
    with pytest.raises(InputError, match="seen"):
        rs.measure(rs.run(shared_recipe, progress=False), on="this-machine", progress=False)
    assert suites[0] == suites[1], "a run goes on only with the suite that it was begun with"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda one: one.name)
def test_what_a_docstring_shows_is_so(example: doctest.DocTest) -> None:
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(example, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)


def test_every_module_with_a_public_function_shows_an_example() -> None:
    named = {example.name.rpartition(".")[2] for example in EXAMPLES}
    assert {"compress", "merge", "export", "measure", "load", "run", "Recipe"} <= named


def test_the_quickstart_has_five_lines() -> None:
    """A stranger runs it, in tests/system/test_wheel.py."""
    script = (ROOT / "examples/quickstart.py").read_text()
    assert len([line for line in script.split("__main__")[1].splitlines()[1:] if line]) == 5
