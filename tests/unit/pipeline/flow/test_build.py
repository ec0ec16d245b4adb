"""The gate, refinement and mends inside a whole recipe: what is exported, recorded, refused and gone on with."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from make.recipes import TRAIN, state_model, state_rest
from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.evaluate.remembered import Remembered
from rankship_pipeline.flow import build as build_module
from rankship_pipeline.flow import recalled, scores
from rankship_pipeline.flow.budget import price_recipe
from rankship_pipeline.flow.build import build_recipe, find_build, is_built
from rankship_pipeline.flow.preflight import identify, prepare
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.flow.scores import Scores
from rankship_pipeline.flow.show import print_build
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError, MergeMismatch, QualityLost
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.outputs import Outputs
from rankship_pipeline.recipe.choices import RefineChoice, choose
from rankship_pipeline.recipe.rules import read_recipe
from rankship_pipeline.recover.refine import course
from rankship_pipeline.recover.refine.schedule import find_step_size

NET = (
    """
import torch
from torch import nn

PIXELS = torch.rand(60, 2, 4, 4, generator=torch.Generator().manual_seed(0))
MEAN, STD = 0.5, 0.25

def make():
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))

def make_padded():
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))

def load():
    x = (PIXELS - MEAN) / STD
    labels = torch.arange(60) % 3
    return {
        "calibration": {"a": x[:20], "b": x[10:30]},
        "unlabelled": {"a": x[:40]},
        "tests": {"a": (x[30:], labels[30:])},
        "test_inputs": x,
        "test_labels": labels,
    }
"""
    + TRAIN
)
MODELS = state_model("a", train="net.py:train") + state_model("b", train="net.py:train_other")
RECIPE = f'name = "tiny"\n{MODELS}{state_rest(0.8)}'
LOADER = 'loader = "net.py:load"'
STATED = LOADER, f"{LOADER}\nnormalise = {{ mean = [0.5], std = [0.25] }}"
REFINE = "[refine]\nsteps = 30\n"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def prepare_recipe(store: Store, text: str = RECIPE, net: str = NET) -> Prepared:
    folder = store.root.parent
    (folder / "net.py").write_text(net)
    (folder / "recipe.toml").write_text(text)
    return prepare(read_recipe(folder / "recipe.toml"), folder)


def count_kinds(store: Store) -> dict[str, int]:
    kinds = [path.name.partition("-")[0] for path in store.root.iterdir()]
    return {kind: kinds.count(kind) for kind in kinds}


def test_what_is_exported_is_the_refined_model_and_the_record_says_so(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare_recipe(store, RECIPE + REFINE)
    build, entry = build_recipe(prepared, store, Steps(quiet=True))
    assert build.refinement is not None
    assert build.refinement.steps == 30
    stages = Stages(prepared, store, Steps(quiet=True))
    compressed, plan = stages.compress(price_recipe(prepared), choose(prepared.recipe))
    assert prepared.recipe.refine is not None
    refined, _ = stages.refine(compressed, plan, prepared.recipe.refine)
    (artifact,) = [one for one in build.artifacts if one.key.variant == "compressed"]
    expected = np.load((store.root / artifact.file).with_name("expected.0.npy"))
    with torch.inference_mode():
        np.testing.assert_allclose(expected, refined.module(prepared.data.test_inputs[0]), rtol=1e-4, atol=1e-5)
    assert [one.stage for one in build.accuracies] == ["source:a", "source:b", "merged", "compressed", "refined"]
    assert [(one.stage, one.source) for one in build.fidelities] == [
        (stage, name) for stage in ("merged", "compressed", "refined") for name in ("a", "b")
    ]
    own = build.fidelities[0]
    assert own.before is not None
    assert own.before.samples == 30
    assert build.fidelities[1].before is None, "the loader gives no tests of b's task"
    print_build(build, entry)
    shown = capsys.readouterr().out
    assert "the compressed files hold the refined model: 30 steps" in shown
    assert "specialist" in shown
    assert shown.count("refined") >= 4

    known = identify(prepared.recipe, prepared.folder)
    assert find_build(known, store) == (build, entry), "its models need not be run or traced for that"
    assert is_built(known, store)
    (store.root / artifact.file).unlink()
    assert not is_built(known, store)
    monkeypatch.setattr(build_module, "settle_budget", lambda one, _: pytest.fail(f"checked: {one.checked}"))
    with pytest.raises(pytest.fail.Exception, match="checked: True"):
        build_recipe(known, store, Steps(quiet=True))


@pytest.mark.parametrize(
    ("gate", "stage", "absent"),
    [("max_merge_loss_points", "merged", "compressed"), ("max_loss_points", "compressed", "artifact")],
)
def test_a_recipe_that_allows_less_loss_ends_before_anything_is_exported(
    store: Store, gate: str, stage: str, absent: str
) -> None:
    prepared = prepare_recipe(store, RECIPE.replace("0.8", "0.4") + f"[quality]\n{gate} = 0\n")
    with pytest.raises(QualityLost, match=f"stage {stage} lost more than quality.{gate} = 0") as caught:
        build_recipe(prepared, store, Steps(quiet=True))
    assert "b: " in str(caught.value)
    assert "layers that lose most" in str(caught.value)
    assert absent not in count_kinds(store)
    assert "build" not in count_kinds(store)


class Killed(BaseException):
    """What ends a process in the middle, as a power cut does."""


def test_a_build_killed_inside_refinement_goes_on_and_ends_at_the_same_model(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Store(store.root.with_name("whole"))
    expected = _refine(prepare_recipe(whole, RECIPE + REFINE), whole)
    prepared = prepare_recipe(store, RECIPE + REFINE)
    with monkeypatch.context() as patch:
        patch.setattr(course.Saving, "__init__", _save_always)
        patch.setattr(course, "find_step_size", _KillAt(12))
        with pytest.raises(Killed):
            _refine(prepared, store)
    assert [path for path in store.root.iterdir() if path.name.endswith(".unfinished.tmp")]
    with monkeypatch.context() as patch:
        counted = _KillAt(1000)
        patch.setattr(course, "find_step_size", counted)
        assert _refine(prepared, store) == expected
    assert counted.calls == 30 - 11
    assert not [path for path in store.root.iterdir() if path.name.endswith(".tmp")]


def _refine(prepared: Prepared, store: Store) -> str:
    """The hash of the refined model's tensors."""
    stages = Stages(prepared, store, Steps(quiet=True))
    compressed, plan = stages.compress(price_recipe(prepared), choose(prepared.recipe))
    assert prepared.recipe.refine is not None
    return stages.refine(compressed, plan, prepared.recipe.refine)[0].entry.files["state.safetensors"]


def _save_always(saving: course.Saving, file: Path) -> None:
    object.__setattr__(saving, "file", file)
    object.__setattr__(saving, "every_s", 0.0)


class _KillAt:
    """The schedule, until a step at which the process is killed."""

    def __init__(self, step: int) -> None:
        self.step, self.calls, self.cycle = step, 0, find_step_size

    def __call__(self, choice: RefineChoice, share: float) -> float:
        self.calls += 1
        if self.calls == self.step:
            raise Killed
        return self.cycle(choice, share)


def test_a_specialist_of_another_normalisation_is_folded_before_it_is_merged(store: Store) -> None:
    stated = RECIPE.replace(*STATED)
    trained = 'train = "net.py:train_other"'
    other = stated.replace(trained, f"{trained}\nnormalise = {{ mean = [0.1, 0.2], std = [0.5, 1.0] }}")
    plain, folded = prepare_recipe(store, stated), prepare_recipe(store, other)
    assert folded.notes == ("b: its own input normalisation is folded into its first layer",)
    source = folded.recipe.models[1]
    original = Stages(plain, store, Steps(quiet=True)).load_source(plain.recipe.models[1].name).module
    mended = Stages(folded, store, Steps(quiet=True)).load_source(source.name).module
    x = folded.data.test_inputs[0]
    pixels = x * 0.25 + 0.5
    own = (pixels - torch.tensor([0.1, 0.2])[:, None, None]) / torch.tensor([0.5, 1.0])[:, None, None]
    with torch.inference_mode():
        torch.testing.assert_close(mended(x), original(own), rtol=1e-4, atol=1e-5)
    build, _ = build_recipe(folded, store, Steps(quiet=True))
    assert build.mended == folded.notes


def test_a_fold_that_cannot_be_exact_is_refused_before_anything_is_trained(store: Store) -> None:
    text = RECIPE.replace("net.py:make", "net.py:make_padded").replace(*STATED)
    text = text.replace('name = "b"\n', 'name = "b"\nnormalise = { mean = [0.1], std = [0.25] }\n')
    with pytest.raises(MergeMismatch, match="model 'b' cannot be folded in: 0 pads with zeros"):
        prepare_recipe(store, text)
    assert not store.root.exists()


@pytest.mark.parametrize("order", ['["x", "y", "z"]', '["z", "x", "y"]'])
def test_class_names_of_factories_set_the_order_of_heads(store: Store, order: str) -> None:
    text = RECIPE.replace('name = "a"\n', 'name = "a"\nlabels = ["x", "y", "z"]\n')
    prepared = prepare_recipe(store, text.replace('name = "b"\n', f'name = "b"\nlabels = {order}\n'))
    plain = prepare_recipe(store)
    mended, original = (
        Stages(one, store, Steps(quiet=True)).load_source(one.recipe.models[1].name).module for one in (prepared, plain)
    )
    x = prepared.data.test_inputs[0]
    places = [0, 1, 2] if order.startswith('["x"') else [1, 2, 0]
    assert bool(prepared.notes) == (places != [0, 1, 2])
    with torch.inference_mode():
        torch.testing.assert_close(mended(x), original(x)[:, places])


def test_labels_name_every_class(store: Store) -> None:
    with pytest.raises(InputError, match="model 'a' has 3 classes, its `labels` name 2"):
        prepare_recipe(store, RECIPE.replace('name = "a"\n', 'name = "a"\nlabels = ["x", "y"]\n'))


def test_models_without_any_difference_merge_to_themselves(store: Store) -> None:
    prepared = prepare_recipe(store, RECIPE.replace("train_other", "train") + "[quality]\nmax_merge_loss_points = 0\n")
    stages = Stages(prepared, store, Steps(quiet=True))
    for method in ("average", "joint"):
        merged, interference = stages.merge(method)
        assert max(interference.values()) < 1e-12
        for one in Scores(stages).judge(merged, "merged"):
            assert (one.agreement, one.lost_points) == (1, 0)


SEQUENTIAL = '[[compare]]\nname = "s"\nmerge = "sequential"\nranks = "knapsack"\nwhitening = "eigen"\n'


@pytest.mark.parametrize(("alone", "more", "only"), [(True, "", True), (True, SEQUENTIAL, False), (False, "", False)])
def test_layers_of_one_model_that_no_way_solves_are_only_factored(
    store: Store, *, alone: bool, more: str, only: bool
) -> None:
    text, net = RECIPE + more, NET
    if alone:
        text = text.replace(MODELS, state_model("a", train="net.py:train"))
        net = net.replace('"a": x[:20], "b": x[10:30]', '"a": x[:20]')
    assert {layer.only_factored for layer in prepare_recipe(store, text, net).layers} == {only}


def test_outputs_that_stand_for_labels_are_predicted_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    net = NET.replace('"test_labels": labels,', "").replace('"tests": {"a": (x[30:], labels[30:])},', "")
    net = net.replace('"a": x[:20], "b": x[10:30]', '"a": x[:20]')
    prepared = prepare_recipe(store, RECIPE.replace(MODELS, state_model("a", train="net.py:train")), net)
    stages, calls = Stages(prepared, store, Steps(quiet=True)), list[int]()

    def count(model: nn.Module, inputs: Inputs) -> Outputs:
        if len(inputs[0]) > 1 and not isinstance(model, Remembered):
            calls.append(1)
        return predict(model, inputs)

    for room in (scores, recalled):
        monkeypatch.setattr(room, "predict", count)
    own, model = Scores(stages), stages.load_source("a")
    first, second = ((own.evaluate(model, stage)[0]) for stage in ("merged", "compressed"))
    assert len(calls) == 1
    assert own.judge(model, "merged")[0].relative_error == 0
    assert len(calls) == 2, "of other inputs"
    assert first.value == second.value == 0, "nothing is lost"
    monkeypatch.setattr(recalled, "_KEPT_BYTES", 10)
    anew = Scores(Stages(prepared, store, Steps(quiet=True)))
    for stage in ("large", "larger"):
        anew.evaluate(model, stage)
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"tests": {"a"', '"tests": {"z"', r"gives tests for \['z'\]"),
        ('"unlabelled": {"a"', '"unlabelled": {"q"', r"gives unlabelled for \['q'\]"),
        ("labels[30:])}", "labels[31:])}", "30 test inputs of 'a', 29 labels"),
    ],
)
def test_extra_data_must_fit_the_recipes_models(store: Store, old: str, new: str, complaint: str) -> None:
    assert old in NET
    with pytest.raises(InputError, match=complaint):
        prepare_recipe(store, net=NET.replace(old, new))
