"""Every kind of wrong input gives one clear error, by its exit status, before any long work starts."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankship_benchmarks.bundle.suite import read_suite, read_suite_of
from rankship_pipeline.cli import main
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.models.opened import open_source
from rankship_pipeline.recipe.rules import read_recipe

Spoil = Callable[[Path], None]


def _change_recipe(old: str, new: str) -> Spoil:
    def spoil(recipe: Path) -> None:
        text = recipe.read_text()
        assert old in text
        recipe.write_text(text.replace(old, new, 1))

    return spoil


def _change_model(old: str, new: str) -> Spoil:
    def spoil(recipe: Path) -> None:
        file = recipe.with_name("model.py")
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new, 1))

    return spoil


def _read(recipe: Path, name: str) -> dict[str, torch.Tensor]:
    """A copy: what load_file gives is a view of the file, which is about to be written over."""
    return {key: value.clone() for key, value in load_file(recipe.with_name(f"{name}.safetensors")).items()}


def _pickle_weights(recipe: Path) -> None:
    torch.save(_read(recipe, "a"), recipe.with_name("a.safetensors"))


def _truncate_weights(recipe: Path) -> None:
    file = recipe.with_name("a.safetensors")
    file.write_bytes(file.read_bytes()[:-50])


def _poison_weights(recipe: Path) -> None:
    state = _read(recipe, "b")
    state["3.weight"][0, 0, 0, 0] = torch.nan
    save_file(state, recipe.with_name("b.safetensors"))


def _change_classes(recipe: Path) -> None:
    state = _read(recipe, "b")
    state["6.weight"], state["6.bias"] = torch.zeros(4, 256), torch.zeros(4)
    del state["3.bias"]
    save_file(state, recipe.with_name("b.safetensors"))


def _name_classes(recipe: Path) -> None:
    for name, classes in (("a", '["cat", "dog", "hen"]'), ("b", '["cat", "cow", "hen"]')):
        weights = f'weights = "{name}.safetensors"'
        _change_recipe(weights, f"{weights}\nlabels = {classes}")(recipe)


def _normalise_otherwise(recipe: Path) -> None:
    weights = 'weights = "a.safetensors"'
    _change_recipe(weights, f"{weights}\nnormalise = {{ mean = [0.5], std = [0.5] }}")(recipe)
    _change_recipe('"model.py:load"', '"model.py:load"\nnormalise = { mean = [0.0], std = [1.0] }')(recipe)


CASES: dict[str, tuple[Spoil, int, tuple[str, ...]]] = {
    "missing checkpoint": (_change_recipe("a.safetensors", "c.safetensors"), 2, ("c.safetensors", "relative")),
    "pickle": (_pickle_weights, 2, ("a.safetensors is a pickle", "safetensors.torch.save_file")),
    "truncated checkpoint": (_truncate_weights, 2, ("a.safetensors is not a whole safetensors file",)),
    "NaN weights": (_poison_weights, 2, ("b.safetensors holds NaN", "3.weight")),
    "models that differ": (
        _change_classes,
        3,
        ("3.bias: missing", "6.weight: shape [4, 256] instead of [3, 256]", "6.bias: shape [4] instead of [3]"),
    ),
    "checkpoint of another architecture": (
        _change_model("nn.Conv2d(8, 16, 3, 2, 1)", "nn.Conv2d(8, 16, 5, 2, 2)"),
        2,
        ("3.weight: shape [16, 8, 3, 3] instead of [16, 8, 5, 5]",),
    ),
    "impossible budget": (
        _change_recipe("kept_parameters = 0.5", "kept_parameters = 0.01"),
        3,
        ("the smallest model at rank step 2 has", "kept_parameters ="),
    ),
    "unknown key": (_change_recipe("kept_parameters", "keep_parameters"), 2, ("did you mean 'kept_parameters'",)),
    "unknown method": (_change_recipe('ranks = "arp"', 'ranks = "arq"'), 2, ("compare.0.ranks", "'arp'")),
    "empty calibration": (_change_model('"a": x[:32]', '"a": x[:0]'), 2, ("calibration of 'a' is empty",)),
    "calibration for another model": (_change_model('"a": x[:32]', '"z": x[:32]'), 2, ("['b', 'z']", "['a', 'b']")),
    "data of another shape": (
        _change_model("torch.randn(96, 1, 8, 8", "torch.randn(96, 3, 8, 8"),
        2,
        ("[32, 3, 8, 8]",),
    ),
    "labels beyond the classes": (_change_model("% 3", "% 7"), 2, ("test_labels run from 0 to 6", "3 classes")),
    "labels of another shape": (  # one column would compare every answer with every label
        _change_model("torch.arange(32) % 3}", "torch.arange(32)[:, None] % 3}"),
        2,
        ("test_labels are torch.int64 of shape [32, 1] and fit no output of the model",),
    ),
    "missing factory": (_change_recipe('"model.py:make"', '"model.py:build"'), 2, ("has no function 'build'",)),
    "pattern that matches nothing": (
        _change_recipe("step = 2", 'step = 2\nexclude = ["haed*"]'),
        2,
        ("'haed*' matches no layer", "the layers are 0, 3, 6"),
    ),
    "key in the wrong table": (
        _change_recipe('name = "tiny"', 'name = "tiny"\nformats = ["onnx"]'),
        2,
        ("another table",),
    ),
    "two amounts of refinement": (
        _change_recipe("[parity]", "[refine]\nsteps = 9\ncpu_seconds = 9\n\n[parity]"),
        2,
        ("[refine] needs exactly one of cpu_seconds and steps",),
    ),
    "a gate beyond all points": (
        _change_recipe("[parity]", "[quality]\nmax_loss_points = 500\n\n[parity]"),
        2,
        ("quality.max_loss_points must lie in [0, 100]",),
    ),
    "classes of two tasks": (
        _name_classes,
        3,
        ("b against a: classes: only in a: dog; only in b: cow", "→ if two names mean the same class, write `labels`"),
    ),
    "normalisations that no layer can take": (
        _normalise_otherwise,
        3,
        (
            "normalisation of model 'a' cannot be folded in: 0 pads with zeros",
            "→ train the model on inputs normalised as",
        ),
    ),
    "not TOML": (_change_recipe("[data]", "[data"), 2, ("is not valid TOML",)),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_one_clear_error_and_nothing_is_built(
    case: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, status, words = CASES[case]
    spoil(recipe)
    assert main(["build", str(recipe), "--store", str(tmp_path / "store")]) == status
    error = capsys.readouterr().err
    for word in words:
        assert word in error
    assert "→" in error, "an error says what to do"
    assert "Traceback" not in error
    assert not (tmp_path / "store").exists(), "long work began"


def test_an_unknown_device_is_refused_before_anything_is_built(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", str(recipe), "--on", "this-machin", "--store", str(tmp_path / "store")]
    assert main(arguments) == 2
    assert "did you mean 'this-machine'" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_verify_and_bench_say_what_to_do_where_nothing_is_built(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(recipe), "--store", str(tmp_path / "store")]) == 2
    assert "rankship build" in capsys.readouterr().err
    suite = tmp_path / "suite.toml"
    suite.write_text(f'recipe = "{recipe}"\nrounds = 1\n')
    assert main(["bench", str(suite), "--on", "this-machine", "--store", str(tmp_path / "store")]) == 2
    assert "rankship build" in capsys.readouterr().err


def test_a_suite_with_a_wrong_number_or_key_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = tmp_path / "suite.toml"
    suite.write_text('recipe = "x.toml"\nrounds = 0\n')
    assert main(["bench", str(suite), "--on", "this-machine"]) == 2
    assert "rounds must be at least 1, got 0" in capsys.readouterr().err
    suite.write_text('recipe = "x.toml"\nround = 3\n')
    assert main(["bench", str(suite), "--on", "this-machine"]) == 2
    assert "did you mean 'rounds'" in capsys.readouterr().err


def test_run_refuses_the_suite_of_another_recipe(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "suite.toml"
    suite.write_text('recipe = "other.toml"\nrounds = 2\n')
    arguments = ["run", str(recipe), "--suite", str(suite), "--on", "this-machine", "--store", str(tmp_path / "store")]
    assert main(arguments) == 2
    assert f"is a suite of {tmp_path}/other.toml, not of {recipe}" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
    suite.write_text(f'recipe = "{recipe}"\nrounds = 2\n')
    assert read_suite_of(recipe, suite).rounds == 2


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "benchmarks/suites").glob("*.toml")), ids=lambda path: path.name
)
def test_every_suite_that_comes_with_the_code_names_a_recipe_that_does(path: Path) -> None:
    suite, recipe = read_suite(path)
    assert suite.recipe.endswith(read_recipe(recipe).name + ".toml")


def test_an_unknown_build_hash_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "abc123", "--store", str(tmp_path)]) == 2
    assert "no entry matches build 'abc123'" in capsys.readouterr().err


def test_an_edited_module_beside_the_recipe_is_another_source(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = read_recipe(recipe).models[0]
    monkeypatch.setattr("sys.path", [*sys.path])
    helper = recipe.with_name("blocks_of_this_test.py")
    helper.write_text("WIDTH = 8\n")
    model = recipe.with_name("model.py")
    model.write_text("from blocks_of_this_test import WIDTH\n" + model.read_text())
    prepare(read_recipe(recipe), recipe.parent)
    before = open_source(source, recipe.parent, 0).sha256
    helper.write_text("WIDTH = 9\n")
    assert open_source(source, recipe.parent, 0).sha256 != before


def test_a_loader_may_give_numpy_arrays(recipe: Path) -> None:
    model = recipe.with_name("model.py")
    model.write_text(model.read_text().replace('"test_inputs": x[64:]', '"test_inputs": x[64:].numpy()'))
    assert prepare(read_recipe(recipe), recipe.parent).data.test_inputs[0].shape == (32, 1, 8, 8)


def test_a_folder_given_as_suite_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tmp_path), "--on", "this-machine"]) == 2
    assert "give the path of a suite.toml" in capsys.readouterr().err
