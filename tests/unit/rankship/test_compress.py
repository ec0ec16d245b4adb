"""Compressing and merging from Python are the stages of recipes: same plans, same tensors, same store."""

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import rankship as rs
from make.sessions import compress_recipe, make_net
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.errors import BudgetInfeasible, InputError, MergeMismatch
from rankship_pipeline.foundation.records import RankPlan

MODEL = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 6))

def load():
    x = torch.randn(80, 20, generator=torch.Generator().manual_seed(1))
    return {"calibration": {NAMES}, "test_inputs": x, "test_labels": torch.arange(80) % 6}
"""


def build_by_file(folder: Path, models: dict[str, nn.Module], calibration: str, tables: str) -> Any:  # noqa: ANN401
    """What a recipe file gives for these models: the compressed model and its plan."""
    (folder / "model.py").write_text(MODEL.replace("{NAMES}", calibration))
    text = 'name = "r"\n'
    for name, model in models.items():
        save_file(model.state_dict(), folder / f"{name}.safetensors")
        text += f'[[models]]\nname = "{name}"\nfactory = "model.py:make"\nweights = "{name}.safetensors"\n'
    (folder / "r.toml").write_text(f'{text}[data]\nloader = "model.py:load"\n[export]\nformats = ["onnx"]\n{tables}')
    return compress_recipe(folder / "r.toml")


def check_same(found: rs.Compressed, module: nn.Module, plan: RankPlan) -> None:
    assert found.plan == plan
    state = found.module.state_dict()
    assert list(state) == list(module.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())


def test_the_plan_and_the_tensors_are_those_of_the_same_recipe_file(
    tmp_path: Path, net: nn.Module, inputs: Tensor
) -> None:
    small = rs.compress(net, inputs, kept_parameters=0.5, test=(inputs, torch.arange(80) % 6), progress=False)
    model, plan = build_by_file(tmp_path, {"model": net}, '{"model": x}', "[budget]\nkept_parameters = 0.5")
    check_same(small, model.module, plan)
    assert plan.factors


def test_compressing_a_merge_is_the_recipe_with_both_models(tmp_path: Path, net: nn.Module, inputs: Tensor) -> None:
    given = {"a": inputs, "b": -inputs}
    one = rs.merge([net, make_net(3)], calibration=given, quality="classification", progress=False)
    small = rs.compress(one, kept_parameters=0.6, ranks=rs.RankChoice(step=4), progress=False)
    pair, tables = {"a": net, "b": make_net(3)}, "[budget]\nkept_parameters = 0.6\n[ranks]\nstep = 4"
    model, plan = build_by_file(tmp_path, pair, '{"a": x, "b": -x}', tables)
    check_same(small, model.module, plan)
    assert {layer.name: layer.interference for layer in plan.layers} == one.interference
    assert all(layer.interference for layer in plan.layers)
    with pytest.raises(InputError, match="has its data already"):
        rs.compress(one, inputs, kept_parameters=0.6)


def test_the_same_call_reads_the_store_and_another_budget_only_compresses_anew(
    net: nn.Module, inputs: Tensor, tmp_path: Path
) -> None:
    def call(share: float) -> rs.Compressed:
        return rs.compress(net, inputs, kept_parameters=share, store=tmp_path / "store", progress=False)

    def list_kinds() -> list[str]:
        return sorted(path.name.partition("-")[0] for path in (tmp_path / "store").iterdir())

    first, kinds = call(0.5), list_kinds()
    assert call(0.5).plan == first.plan
    assert list_kinds() == kinds
    call(0.6)
    assert sorted(set(list_kinds())) == sorted(set(kinds))
    assert list_kinds().count("compressed") == 2
    assert {kind for kind in kinds if list_kinds().count(kind) != kinds.count(kind)} <= {"compressed", "fidelity"}


def test_other_weights_are_not_taken_for_the_same_model(net: nn.Module, inputs: Tensor) -> None:
    first = rs.compress(net, inputs, kept_parameters=0.5, progress=False)
    second = rs.compress(make_net(5), inputs, kept_parameters=0.5, progress=False)
    assert not torch.equal(first.module(inputs), second.module(inputs))


def type_net(body: str) -> nn.Module:
    """A net of a class without a source file, as a notebook's cell makes it."""
    scope: dict[str, Any] = {"nn": nn, "__name__": "no_file"}
    methods = f"    def forward(self, x):\n        return self.last({body}(self.first(x)))\n"
    exec(f"class Typed(nn.Module):\n{methods}", scope)  # noqa: S102 - what a notebook does
    torch.manual_seed(0)
    made: nn.Module = scope["Typed"]()
    made.first, made.last = nn.Linear(20, 48), nn.Linear(48, 6)
    return made


def test_a_class_typed_anew_with_another_forward_is_another_model(inputs: Tensor) -> None:
    halves = [rs.compress(type_net(f"{kind}"), inputs, kept_parameters=0.7, progress=False) for kind in ("abs", "-")]
    assert type_net("abs").state_dict().keys() == type_net("-").state_dict().keys()
    errors = [[layer.relative_error for layer in one.plan.layers] for one in halves]
    assert errors[0] != errors[1], "what the store knew of the first was not taken for the second"


def test_the_users_model_stays_as_it_is(net: nn.Module, inputs: Tensor) -> None:
    net.train()
    before = copy.deepcopy(net.state_dict())
    small = rs.compress(net, inputs, kept_parameters=0.5, progress=False)
    assert net.training
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
    assert not small.module.training
    assert sum(one.numel() for one in small.module.parameters()) == small.plan.total_parameters
    assert small.dense_parameters == sum(one.numel() for one in net.parameters())


def test_half_precision_comes_out_as_float32(net: nn.Module, inputs: Tensor) -> None:
    small = rs.compress(net.half(), inputs, kept_parameters=0.5, progress=False)
    assert {tensor.dtype for tensor in small.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_and_inputs_of_any_floating_type_are_compressed(
    dtype: torch.dtype, net: nn.Module, inputs: Tensor
) -> None:
    small = rs.compress(net.to(dtype), inputs.to(dtype).requires_grad_(), kept_parameters=0.5, progress=False)
    assert {tensor.dtype for tensor in small.state_dict().values()} == {torch.float32}


def test_a_merge_that_was_trained_on_is_not_compressed_as_it_was(net: nn.Module, inputs: Tensor) -> None:
    one = rs.merge([net, make_net(3)], [inputs, -inputs], progress=False)
    with torch.no_grad():
        next(one.module.parameters()).mul_(2)
    with pytest.raises(InputError, match="were changed after it was made") as caught:
        rs.compress(one, kept_parameters=0.6, progress=False)
    assert "compress(merged.module" in caught.value.hint


def test_a_compressed_model_that_was_trained_on_is_not_exported_as_it_was(
    net: nn.Module, inputs: Tensor, tmp_path: Path
) -> None:
    small = rs.compress(net, inputs, kept_parameters=0.5, progress=False)
    small.module.load_state_dict({name: tensor + 1 for name, tensor in small.state_dict().items()})
    with pytest.raises(InputError, match="were changed after it was made") as caught:
        rs.export(small, tmp_path / "out", progress=False)
    assert "compress(small.module, inputs" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [{"seed": 0}, {"name": "other"}, {"store": "other"}])
def test_what_a_merge_has_already_is_not_taken_in_silence(
    given: dict[str, Any], net: nn.Module, inputs: Tensor
) -> None:
    one = rs.merge([net, make_net(3)], [inputs, -inputs], progress=False)
    with pytest.raises(InputError, match=f"has its {next(iter(given))} already"):
        rs.compress(one, kept_parameters=0.6, progress=False, **given)


def test_no_result_keeps_the_stages_and_their_analyses_in_memory(
    net: nn.Module, inputs: Tensor, tmp_path: Path
) -> None:
    small = rs.compress(net, inputs, kept_parameters=0.5, store=tmp_path, progress=False)
    gc.collect()
    assert small.origin is not None
    assert not [one for one in gc.get_objects() if type(one) is Stages and one.prepared is small.origin.prepared]


def test_a_method_of_task_arithmetic_takes_its_base(net: nn.Module, inputs: Tensor) -> None:
    data = {"a": inputs, "b": inputs}
    choice = rs.MergeChoice(method="task-arithmetic", scale=1.0, batchnorm="keep")
    one = rs.merge([net, make_net(3)], data, method=choice, base=make_net(4), progress=False)
    bases = make_net(4).state_dict()
    other = make_net(3).state_dict()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(one.module.state_dict()[name], tensor + other[name] - bases[name])


def test_models_may_keep_a_head_each(inputs: Tensor) -> None:
    labels = torch.arange(80) % 6
    tests = {"a": (inputs, labels), "b": (-inputs, labels)}
    one = rs.merge(
        {"a": make_net(1), "b": make_net(2)},
        {"a": inputs, "b": -inputs},
        method=rs.MergeChoice(head="4"),
        test=tests,
        progress=False,
    )
    assert [fidelity.after is not None for fidelity in one.fidelities] == [True, True]
    small = rs.compress(one, kept_parameters=0.7, progress=False)
    assert "heads" in dict(small.module.named_children())


def test_refining_brings_the_model_nearer(net: nn.Module, inputs: Tensor) -> None:
    plain = rs.compress(net, inputs, kept_parameters=0.5, progress=False)
    refined = rs.compress(net, inputs, kept_parameters=0.5, refine=rs.RefineChoice(steps=60), progress=False)
    assert refined.refinement is not None
    assert refined.plan == plain.plan
    assert torch.dist(refined.module(inputs), net(inputs)) < torch.dist(plain.module(inputs), net(inputs))


Call = Callable[[nn.Module, Tensor], object]
WRONG: dict[str, tuple[Call, type[Exception], str, str]] = {
    "no calibration": (
        lambda net, _: rs.compress(net, kept_parameters=0.5),
        InputError,
        "no calibration data",
        "some hundred inputs",
    ),
    "wrong shape": (
        lambda net, x: rs.compress(net, x[:, :19], kept_parameters=0.5),
        InputError,
        r"does not take calibration of 'model' of shape \[\[80, 19\]\]",
        "forward",
    ),
    "infeasible": (
        lambda net, x: rs.compress(net, x, kept_parameters=0.01),
        BudgetInfeasible,
        "the smallest model at rank step 8 has",
        "raise the budget to kept_parameters",
    ),
    "no budget": (rs.compress, InputError, "no budget", "kept_parameters="),
    "two budgets": (
        lambda net, x: rs.compress(net, x, kept_parameters=0.5, budget=rs.Budget(parameters=9)),
        InputError,
        "given twice",
        "either",
    ),
    "an unknown type": (
        lambda net, x: rs.compress(net, x, kept_parameters=0.5, weights="int5"),  # type: ignore[arg-type]
        InputError,
        "unknown type of weights 'int5'",
        "known are float32, int8, int4",
    ),
    "a device's budget": (
        lambda net, x: rs.compress(net, x, budget=rs.Budget(latency_ms=1, on="pi4")),
        InputError,
        "measuring on pi4 needs a recipe",
        "recipe file",
    ),
    "unknown ranks": (
        lambda net, x: rs.compress(net, x, kept_parameters=0.5, ranks="knapsak"),  # type: ignore[arg-type]
        InputError,
        "unknown ranks 'knapsak'",
        "did you mean 'knapsack'",
    ),
    "unknown whitening": (
        lambda net, x: rs.compress(net, x, kept_parameters=0.5, factorise="eigne"),  # type: ignore[arg-type]
        InputError,
        "unknown whitening 'eigne'",
        "did you mean 'eigen'",
    ),
    "unknown merge": (
        lambda net, x: rs.merge([net, net], [x, x], method="jiont"),  # type: ignore[arg-type]
        InputError,
        "unknown merge method 'jiont'",
        "did you mean 'joint'",
    ),
    "no layers": (
        lambda _, x: rs.compress(nn.Sequential(nn.ReLU()), x, kept_parameters=0.5),
        InputError,
        "no linear or convolutional layer",
        "exclude",
    ),
    "no module": (lambda _, x: rs.compress("net.pt", x, kept_parameters=0.5), InputError, "is a str, not", "Module"),  # type: ignore[arg-type]
    "no logits": (
        lambda _, x: rs.compress(nn.Sequential(nn.Linear(20, 8), nn.Flatten(0)), x, kept_parameters=0.9),
        InputError,
        "returns no floating-point tensor with samples first",
        "wrap it",
    ),
    "labels beyond the classes": (
        lambda net, x: rs.compress(net, x, kept_parameters=0.5, test=(x, torch.arange(80))),
        InputError,
        "test_labels run from 0 to 79, the model has 6 classes",
        "labels",
    ),
    "NaN": (lambda net, x: rs.compress(net, x * torch.nan, kept_parameters=0.5), InputError, "NaN", "clean"),
    "no base": (lambda net, x: rs.merge([net, net], [x, x], method="ties"), InputError, "needs the base", ""),
    "other architecture": (
        lambda net, x: rs.merge([net, nn.Sequential(nn.Linear(20, 6))], [x, x]),
        MergeMismatch,
        "cannot be merged",
        "",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_named_with_what_to_do(case: str, net: nn.Module, inputs: Tensor) -> None:
    call, kind, message, hint = WRONG[case]
    with pytest.raises(kind, match=message) as caught:
        call(net, inputs)
    assert isinstance(caught.value, rs.RankshipError)
    assert hint in caught.value.hint
    assert not caught.value.hint or any(caught.value.hint in note for note in caught.value.__notes__)


def test_progress_is_shown_unless_it_is_not_wanted(
    net: nn.Module, inputs: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    rs.compress(net, inputs, kept_parameters=0.5, name="shown")
    assert "✓ check the models and the data" in capsys.readouterr().err
    rs.compress(net, inputs, kept_parameters=0.5, name="quiet", progress=False)
    assert capsys.readouterr() == ("", "")
