from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from make.berts import SIZES
from make.sessions import make_net
from rankship.calibration import MOST_SAMPLES, gather_calibration, gather_inputs, gather_tests, name_models
from rankship.merged import merge
from rankship_pipeline.foundation.errors import InputError

X, Y = torch.arange(60.0).reshape(20, 3), torch.arange(20) % 4


class Pair(nn.Module):
    """Takes two tensors."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left + right


class Single(nn.Module):
    """Takes one."""

    def forward(self, x: Tensor) -> Tensor:
        return x


FORMS: dict[str, Any] = {
    "tensor": X,
    "array": X.numpy(),
    "tuple": (X,),
    "name": {"x": X},
    "list of batches": [X[:8], X[8:]],
    "list of tuples": [(X[:8], Y[:8]), (X[8:], Y[8:])],
    "list of names": [{"x": X[:8], "labels": Y[:8]}, {"x": X[8:], "labels": Y[8:]}],
    "loader of inputs": DataLoader(X, batch_size=6),  # type: ignore[arg-type]  # a tensor serves as a data set
    "loader with labels": DataLoader(TensorDataset(X, Y), batch_size=6),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_one_input_are_one(form: str) -> None:
    inputs, _ = gather_calibration({"a": Single()}, {"a": FORMS[form]}, "calibration")
    (found,) = inputs["a"]
    assert torch.equal(found, X)


def test_several_inputs_come_in_the_order_of_forward() -> None:
    for given in (
        (X, -X),
        {"right": -X, "left": X},
        [{"right": -X[:8], "left": X[:8]}, {"right": -X[8:], "left": X[8:]}],
    ):
        inputs, _ = gather_calibration({"a": Pair()}, {"a": given}, "calibration")
        assert [torch.equal(*pair) for pair in zip(inputs["a"], (X, -X), strict=True)] == [True, True]


def test_of_a_loader_only_so_many_samples_are_taken() -> None:
    seen = []

    def give() -> Any:  # noqa: ANN401 - a generator
        for number in range(100):
            seen.append(number)
            yield torch.full((100, 1), float(number))

    (found,), _ = gather_inputs(give(), Single(), "calibration")
    assert len(found) == MOST_SAMPLES
    assert len(seen) == -(-MOST_SAMPLES // 100)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "calibration is empty"),
        (X[:0], "calibration is empty"),
        ([X[:, :2], X], "samples of different shapes"),
        ("calibration.pt", "calibration is a str"),
        (7, "calibration is a int"),
        ([["a", "b"]], "calibration holds str"),
    ],
)
def test_what_is_no_data_is_refused(given: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gather_inputs(given, Single(), "calibration")


def test_an_input_that_the_model_does_not_take_is_named() -> None:
    with pytest.raises(InputError, match="names pixels, the model takes x"):
        gather_calibration({"a": Single()}, {"a": {"pixels": X}}, "calibration")


def test_calibration_goes_to_the_models_by_name_or_in_their_order() -> None:
    models = {"a": Single(), "b": Single()}
    for given in ({"b": -X, "a": X}, [X, -X], (X, -X)):
        inputs, _ = gather_calibration(models, given, "calibration")
        assert torch.equal(inputs["a"][0], X)
        assert torch.equal(inputs["b"][0], -X)
    with pytest.raises(InputError, match=r"given for \['a', 'c'\], the models are \['a', 'b'\]"):
        gather_calibration(models, {"a": X, "c": X}, "calibration")
    with pytest.raises(InputError, match="no calibration data"):
        gather_calibration(models, None, "calibration")


def test_models_are_named_by_themselves_or_by_their_data() -> None:
    a, b = Single(), Single()
    assert list(name_models({"x": a, "y": b}, None)) == ["x", "y"]
    assert name_models([a, b], {"p": X, "q": X}) == {"p": a, "q": b}
    assert list(name_models([a, b], [X, X])) == ["1", "2"]
    with pytest.raises(InputError, match="2 models, calibration for 1: p"):
        name_models([a, b], {"p": X})


LABELLED: dict[str, Callable[[], Any]] = {
    "pair": lambda: (X, Y),
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=6),
    "names": lambda: [{"x": X[:8], "labels": Y[:8]}, {"x": X[8:], "labels": Y[8:]}],
}


@pytest.mark.parametrize("form", LABELLED)
def test_tests_are_inputs_and_labels(form: str) -> None:
    _, wrappings = gather_calibration({"a": Single()}, {"a": X}, "calibration")
    found: Any = gather_tests(LABELLED[form](), wrappings)
    assert torch.equal(found["test_inputs"][0], X)
    assert torch.equal(found["test_labels"], Y)
    by_name: Any = gather_tests({"a": LABELLED[form]()}, wrappings)
    assert torch.equal(by_name["tests"]["a"][1], Y)


@pytest.mark.parametrize("given", [X, [X], DataLoader(X)])  # type: ignore[arg-type]  # as above
def test_tests_without_labels_are_refused(given: object) -> None:
    _, wrappings = gather_calibration({"a": Single()}, {"a": X}, "calibration")
    with pytest.raises(InputError, match="holds no labels"):
        gather_tests(given, wrappings)


class Optional(nn.Module):
    """Must have one tensor, and may have others."""

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        return x if mask is None or scale is None else x * mask * scale


def test_labels_do_not_become_an_optional_input() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=6)
    inputs, _ = gather_calibration({"a": Optional()}, {"a": loader}, "calibration")
    (found,) = inputs["a"]
    assert torch.equal(found, X)


def test_an_optional_input_by_name_does_not_slip_into_the_place_of_another() -> None:
    with pytest.raises(InputError, match="leaves out mask, which the model takes before scale"):
        gather_calibration({"a": Optional()}, {"a": {"x": X, "scale": X}}, "calibration")


def test_batches_that_name_their_inputs_in_another_order_are_joined_by_name() -> None:
    given = [{"left": X[:8], "right": -X[:8]}, {"right": -X[8:], "left": X[8:]}]
    inputs, _ = gather_calibration({"a": Pair()}, {"a": given}, "calibration")
    assert torch.equal(inputs["a"][0], X)


def test_unlabelled_data_may_be_of_some_models_and_are_taken_whole(inputs: Tensor) -> None:
    models, many = {"a": make_net(1), "b": make_net(2)}, torch.zeros(MOST_SAMPLES + 76, 20)
    data = dict.fromkeys(models, inputs)
    loader: Any = DataLoader(many, batch_size=100)  # type: ignore[arg-type]  # a tensor serves as a data set
    one = merge(models, data, unlabelled={"b": loader}, progress=False)
    held = one.origin.held
    assert held is not None
    assert {name: len(tensors[0]) for name, tensors in held.data.unlabelled.items()} == {"b": len(many)}
    with pytest.raises(InputError, match=r"unlabelled is given for \['c'\], the models are \['a', 'b'\]"):
        merge(models, data, unlabelled={"c": inputs}, progress=False)


def make_bert() -> nn.Module:
    found: nn.Module = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))
    return found


IDS, MASK = torch.arange(60).reshape(20, 3) % 20, torch.ones(20, 3, dtype=torch.int64)


def test_transformers_take_their_inputs_in_the_order_of_the_first_model() -> None:
    models = {"a": make_bert(), "b": make_bert(), "c": make_bert()}
    by_name = {"input_ids": IDS, "attention_mask": MASK}
    given = {"a": {"attention_mask": MASK, "input_ids": IDS}, "b": by_name, "c": (IDS, MASK)}
    inputs, wrappings = gather_calibration(models, given, "calibration")
    assert {one.inputs for one in wrappings} == {("attention_mask", "input_ids")}
    for name in models:
        assert [torch.equal(*pair) for pair in zip(inputs[name], (MASK, IDS), strict=True)] == [True, True]
    tests: Any = gather_tests((by_name, Y), wrappings)
    assert torch.equal(tests["test_inputs"][1], IDS)
    more, _ = gather_calibration(models, dict.fromkeys(models, by_name), "unlabelled", wrappings[0].inputs)
    assert torch.equal(more["a"][1], IDS)
    with pytest.raises(InputError, match="calibration of 'b' gives input_ids, and others input_ids, attention_mask"):
        gather_calibration({"a": models["a"], "b": models["b"]}, [by_name, {"input_ids": IDS}], "calibration")


def test_of_a_transformers_model_batches_without_names_are_refused() -> None:
    with pytest.raises(InputError, match="holds 3 tensors without names") as caught:
        gather_calibration({"a": make_bert()}, {"a": [(IDS, MASK, Y)]}, "calibration")
    assert "by name" in caught.value.hint
