import hashlib
from pathlib import Path

import pytest
import torch

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.data import Data, load_data
from rankship_pipeline.models.weights import hash_tensors
from rankship_pipeline.recipe.choices import DataChoice, Recipe, Source

RECIPE = Recipe(
    name="r",
    models=tuple(Source(name=name, factory="f.py:f", train="f.py:t") for name in ("a", "b")),
    data=DataChoice(loader="load.py:load"),
)
GOOD = {
    "calibration": '{"b": torch.ones(3, 2), "a": (torch.zeros(4, 2),)}',
    "test_inputs": "torch.ones(5, 2)",
    "test_labels": "[0, 1, 0, 1, 0]",
}


def load(folder: Path, **change: str) -> Data:
    fields = {**GOOD, **change}
    table = ", ".join(f"{name!r}: {value}" for name, value in fields.items() if value)
    (folder / "load.py").write_text(f"import torch\n\ndef load():\n    return {{{table}}}\n")
    return load_data(RECIPE, folder, {})


def test_good_data_come_in_the_order_of_the_recipes_models(tmp_path: Path) -> None:
    data = load(tmp_path)
    assert list(data.calibration) == ["a", "b"]
    assert [len(data.calibration[name][0]) for name in ("a", "b")] == [4, 3]
    assert data.labels.tolist() == [0, 1, 0, 1, 0]


def test_tensors_that_a_loader_still_trains_with_are_hashed_like_others(tmp_path: Path) -> None:
    data = load(tmp_path, test_inputs="torch.ones(5, 2, dtype=torch.bfloat16, requires_grad=True)")
    (found,) = data.test_inputs
    assert not found.requires_grad
    assert hash_tensors([found]) != hash_tensors([2 * found])


def test_a_tensors_hash_is_over_its_type_shape_and_bytes() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    expected = hashlib.sha256(b"torch.float32(3, 2)" + tensor.contiguous().numpy().tobytes()).hexdigest()
    assert hash_tensors([tensor]) == expected, "stores of earlier versions are found again"
    assert hash_tensors([torch.tensor(1), torch.empty(0)]) != hash_tensors([torch.tensor(2), torch.empty(0)])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"test_inputs": ""}, "must return calibration, test_inputs"),
        (
            {"calibration": '{"a": torch.ones(2, 2)}'},
            r"gives calibration for \['a'\], the recipe's models are \['a', 'b'\]",
        ),
        ({"calibration": "torch.ones(2, 2)"}, "calibration"),
        ({"test_inputs": "torch.ones(0, 2)"}, "test_inputs is empty"),
        ({"test_inputs": "()"}, "test_inputs is empty"),
        ({"test_inputs": "(torch.ones(5, 2), torch.ones(4, 2))"}, "tensors of different length"),
        ({"test_inputs": "torch.full((5, 2), torch.nan)"}, "test_inputs holds NaN or infinity"),
        ({"calibration": '{"a": torch.ones(2), "b": torch.tensor([1, torch.inf])}'}, "calibration of 'b' holds NaN"),
        (
            {"calibration": '{"a": torch.ones(4, 2), "b": torch.ones(4, 3)}'},
            r"a sample of 'b' has shape \[\(3,\)\], one of 'a' \[\(2,\)\]",
        ),
        ({"test_labels": "[0, 1]"}, "5 test inputs, 2 labels"),
        ({"test_labels": "torch.tensor(1)"}, r"test_labels are torch\.int64 of shape \[\]"),
        ({"test_labels": "['a', 'b', 'c', 'd', 'e']"}, "test_labels are a list"),
        ({"test_labels": "[0.5, 1.0, float('nan'), 1.0, 0.0]"}, "test_labels hold NaN or infinity"),
    ],
)
def test_bad_data_are_refused_by_name(tmp_path: Path, change: dict[str, str], complaint: str) -> None:
    with pytest.raises(InputError, match=f"data loader 'load.py:load'.*{complaint}"):
        load(tmp_path, **change)


def test_labels_may_be_the_next_tokens_of_a_language_model(tmp_path: Path) -> None:
    assert load(tmp_path, test_labels="torch.full((5, 2), -100)").labels.shape == (5, 2)


@pytest.mark.parametrize(
    ("given", "shape", "dtype"),
    [
        ("[0.5, 1.0, 0.0, 1.0, 0.0]", (5,), torch.float32),
        ("torch.eye(5).double()", (5, 5), torch.float32),
        ("torch.ones(5, 2, 2, dtype=torch.uint8)", (5, 2, 2), torch.int64),
        ("torch.ones(5) > 0", (5,), torch.int64),
        ("(torch.ones(5).long(), torch.zeros(5).long())", (5, 2), torch.int64),
        ("{'start': torch.ones(5).long(), 'end': torch.zeros(5).long()}", (5, 2), torch.int64),
    ],
)
def test_labels_may_be_any_numbers(tmp_path: Path, given: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    labels = load(tmp_path, test_labels=given).labels
    assert (labels.shape, labels.dtype) == (shape, dtype)


def test_labels_may_be_left_out(tmp_path: Path) -> None:
    assert load(tmp_path, test_labels="").test_labels is None


def test_any_prefix_of_the_pooled_calibration_holds_every_models_share() -> None:
    a, b = torch.zeros(30), torch.ones(10)
    data = Data(
        calibration={"a": (a, torch.arange(30)), "b": (b, torch.arange(10))},
        test_inputs=(a,),
        test_labels=torch.zeros(30, dtype=torch.int64),
    )
    owner, index = data.pool_calibration()
    assert len(owner) == 40
    for prefix in (8, 20, 32):
        assert owner[:prefix].sum() == pytest.approx(prefix / 4, abs=1)
    assert index[owner == 0].tolist() == list(range(30))
    assert index[owner == 1].tolist() == list(range(10))
