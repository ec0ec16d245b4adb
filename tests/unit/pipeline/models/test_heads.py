"""One backbone under a head per task: taken apart, merged, judged task by task, exported as files that fit together."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from make.recipes import make_stages as open_stages
from make.recipes import save_shifted, state_model, state_rest
from rankship_pipeline.evaluate.accuracy import measure_divergence
from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.export.artifact import find_proof
from rankship_pipeline.flow.build import build_recipe
from rankship_pipeline.flow.preflight import prepare, redraw
from rankship_pipeline.flow.scores import Scores
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError, MergeMismatch
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.models.heads import SHUT, Headed, open_logits, separate, take_apart
from rankship_pipeline.models.source import load_function
from rankship_pipeline.recipe.rules import read_recipe

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, slope=0.0):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.LeakyReLU(slope)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        return self.head(self.mix(self.act(self.norm(self.stem(x))).mean((2, 3))))

def three():
    return Net(3)

def five():
    return Net(5)

def leaky():
    return Net(5, 0.5)

def load(seed=0):
    x = torch.randn(60, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(20)
    return {
        "calibration": {"a": x[:20], "b": x[20:32]},
        "unlabelled": {"a": x[:30]},
        "tests": {"a": (x[:20], y % 3), "b": (x[40:50], y[:10] % 5)},
    }

def load_wide_labels():
    return load() | {"tests": {"a": load()["tests"]["a"], "b": (torch.zeros(4, 1, 5, 5), torch.arange(4) + 2)}}

def load_without_tests():
    return {key: value for key, value in load().items() if key != "tests"}

def load_other_shape():
    return load() | {"tests": {"a": load()["tests"]["a"], "b": (torch.zeros(4, 1, 6, 6), torch.arange(4))}}
"""
MODELS = "".join(state_model(n, f"net.py:{f}", weights=f"{n}.safetensors") for n, f in (("a", "three"), ("b", "five")))
BASE = '[merge.base]\nname = "start"\nfactory = "net.py:three"\nweights = "start.safetensors"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    save_shifted(tmp_path, {"start": "net.py:three", "a": "net.py:three", "b": "net.py:five"})
    return tmp_path


def write(folder: Path, *, merge: str = "", loader: str = "load", models: str = MODELS, more: str = "") -> Path:
    path = folder / "recipe.toml"
    path.write_text(
        f'name = "heads"\n{models}[merge]\nhead = "head"\n{merge}\n{state_rest(0.8, f"net.py:{loader}")}{more}'
    )
    return path


def make_stages(folder: Path, merge: str = "") -> Stages:
    return open_stages(write(folder, merge=merge), Store(folder / "store"))


def test_each_task_keeps_its_own_head_and_nothing_else(folder: Path) -> None:
    stages = make_stages(folder, 'method = "average"')
    a, b = (stages.load_source(source.name).module.state_dict() for source in stages.prepared.recipe.models)
    merged = stages.merge("average")[0].module.state_dict()
    assert torch.equal(merged["heads.0.weight"], a["heads.0.weight"])
    assert torch.equal(merged["heads.1.weight"], b["heads.1.weight"])
    stem = "backbone.stem.weight"
    assert torch.allclose(merged[stem], (a[stem] + b[stem]) / 2)


def test_a_specialist_in_the_joined_form_says_what_it_said_alone(folder: Path) -> None:
    stages = make_stages(folder)
    prepared = stages.prepared
    source = prepared.recipe.models[1]
    alone = load_function("net.py:five", folder)().eval()
    alone.load_state_dict(load_state(folder / "b.safetensors"))
    inputs = prepared.data.calibration["b"]
    logits = predict(stages.load_source(source.name).module, inputs)["output"]
    assert torch.allclose(logits[:, 3:], predict(alone, prepared.data.strip(inputs))["output"], atol=1e-6)
    assert bool((logits[:, :3] == SHUT).all())
    assert torch.equal(open_logits(logits), torch.tensor([[False] * 3 + [True] * 5] * len(logits)))


def load_state(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(path))


def test_divergence_over_all_tasks_is_that_of_each_on_its_own_classes(folder: Path) -> None:
    stages = make_stages(folder)
    merged, source = stages.merge("joint")[0].module, stages.load_source(stages.prepared.recipe.models[1].name).module
    inputs = stages.prepared.data.calibration["b"]
    teacher, student = (predict(one, inputs)["output"][:, 3:].log_softmax(-1) for one in (source, merged))
    expected = float((teacher.exp() * (teacher - student)).sum(-1).mean())
    assert measure_divergence(merged, inputs, predict(source, inputs)) == pytest.approx(expected, rel=1e-4)


def test_pooled_tests_count_every_task_on_its_own_head(folder: Path) -> None:
    stages = make_stages(folder)
    merged = stages.merge("joint")[0]
    judged = Scores(stages).judge(merged, "merged")
    (whole,) = Scores(stages).evaluate(merged, "merged")
    assert whole.samples == 30
    assert whole.correct == sum(one.after.correct or 0 for one in judged if one.after is not None)
    assert [one.samples for one in Scores(stages).evaluate_source(stages.prepared.recipe.models[0])] == [20]


def test_every_kind_of_merge_takes_backbones(folder: Path) -> None:
    stages = make_stages(folder, f'method = "ties"\n{BASE}')
    for method in ("average", "ties", "fisher", "regmean", "joint", "tsv-m", "wudi"):
        model, interference = stages.merge(method)
        assert list(interference) == ["backbone.stem", "backbone.mix"]
        assert model.module(*stages.prepared.data.test_inputs).isfinite().all()


def test_files_chained_give_each_tasks_logits(folder: Path) -> None:
    import onnxruntime

    refine = '[refine]\nsteps = 3\naugment = "none"\n'
    prepared = prepare(read_recipe(write(folder, more=refine)), folder)
    store, steps = Store(folder / "store"), Steps(quiet=True)
    build, _ = build_recipe(prepared, store, steps)
    assert [(one.key.variant, one.key.task) for one in build.heads] == [
        ("dense", "a"),
        ("dense", "b"),
        ("compressed", "a"),
        ("compressed", "b"),
    ]
    assert [one.outputs[0].name for one in build.artifacts] == ["features", "features"]
    assert sum(one.parameters for one in build.files if one.key.variant == "dense") == build.dense_parameters
    run = {
        one.key.task: onnxruntime.InferenceSession(store.root / one.file)
        for one in build.files
        if one.key.variant == "dense"
    }
    merged = Stages(prepared, store, steps).merge("joint")[0].module
    inputs = prepared.data.tests["b"][0]
    expected = predict(merged, inputs)["output"][:, 3:].numpy()
    for row, wanted in zip(prepared.data.strip(inputs)[0].numpy(), expected, strict=True):
        features = run[None].run(None, {run[None].get_inputs()[0].name: row[None]})[0]
        logits = run["b"].run(None, {run["b"].get_inputs()[0].name: features})[0]
        np.testing.assert_allclose(logits[0], wanted, atol=1e-5)
    for head in build.heads:
        features, logits = np.load(find_proof(head, store)[1][0]), np.load(find_proof(head, store)[2][0])
        assert (features.shape[1], logits.shape[1]) == (6, {"a": 3, "b": 5}[str(head.key.task)])


def test_another_seed_draws_marked_data(folder: Path) -> None:
    prepared = make_stages(folder).prepared
    again = redraw(prepared, 7)
    assert again.calibration_sha256 != prepared.calibration_sha256
    assert again.data.tasks == ("a", "b")
    assert [len(inputs) for inputs in again.data.calibration.values()] == [2, 2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loader": "load_wide_labels"}, "test labels of 'b' run from 2 to 5, its head has 5 classes"),
        ({"loader": "load_without_tests"}, "must return calibration, tests"),
        ({"loader": "load_other_shape"}, r"a sample of 'tests of b' has shape \[\(1, 6, 6\)\]"),
        ({"models": MODELS.replace("five", "leaky")}, "'b' and 'a' do not have the same modules"),
        ({"models": MODELS[: MODELS.index("[[models]]", 5)]}, "merge.head is for several models"),
    ],
)
def test_what_cannot_be_is_refused_before_long_work(folder: Path, change: dict[str, str], said: str) -> None:
    with pytest.raises((InputError, MergeMismatch), match=said):
        prepare(read_recipe(write(folder, **change)), folder)


def test_a_wrong_head_is_refused_by_name(folder: Path) -> None:
    alike = MODELS.replace("five", "three").replace("b.safetensors", "start.safetensors")
    path = write(folder, models=alike)
    path.write_text(path.read_text().replace('head = "head"', 'head = "mix"'))
    with pytest.raises(MergeMismatch, match="'a' does not return that module's output"):
        prepare(read_recipe(path), folder)
    path.write_text(path.read_text().replace('head = "mix"', 'head = "top"'))
    with pytest.raises(InputError, match="model 'a' has no module 'top'") as refused:
        prepare(read_recipe(path), folder)
    assert "mix, head" in str(refused.value.hint)


def test_a_head_whose_input_is_used_elsewhere_too_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.head(x) + self.head(2 * x)
            return y

    with pytest.raises(MergeMismatch, match="more than one tensor"):
        take_apart(Twice().eval(), "head", (torch.randn(3, 4),), name="twice")


def test_shared_tensors_are_told_from_each_tasks_own() -> None:
    one = torch.zeros(1)
    shared, own = separate([{"backbone.w": one, "heads.0.w": one}, {"backbone.w": one, "heads.1.w": one}])
    assert [list(state) for state in shared] == [["backbone.w"], ["backbone.w"]]
    assert list(own) == ["heads.0.w", "heads.1.w"]


def test_masks_of_padding_reach_the_backbone_by_name() -> None:
    class Masked(nn.Module):
        inputs = ("input_ids", "attention_mask")

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = ids * mask
            return hidden

    from rankship_pipeline.evaluate.masks import find_mask

    headed = Headed(Masked(), {0: nn.Identity()}, [4])
    ids, mask, task = torch.ones(2, 4), torch.tensor([[1, 1, 0, 0]] * 2), torch.zeros(2, dtype=torch.int64)
    found = find_mask(headed, (ids, mask, task))
    assert found is not None
    assert torch.equal(found, mask.bool())
    assert torch.equal(headed(ids, mask, task), ids * mask)
