import pytest
import torch

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.class_names import number_classes

NAMES = ("tench, Tinca tinca", "Red Fox", "goose")


@pytest.mark.parametrize(
    ("found", "numbers"),
    [
        (["goose", "tench, Tinca tinca"], [2, 0]),
        (["red_fox", "GOOSE"], [1, 2]),
        (["tench", "goose"], [0, 2]),
        (["2", "LABEL_0"], [2, 0]),
    ],
)
def test_classes_are_found_by_the_models_names(found: list[str], numbers: list[int]) -> None:
    assert number_classes(found, NAMES, 3, where="images").tolist() == numbers


def test_a_class_that_the_model_does_not_know_is_named_with_those_that_it_knows() -> None:
    with pytest.raises(InputError, match=r"images: the model has no class 'swan'; it has 'tench.*'goose'"):
        number_classes(["goose", "swan"], NAMES, 3, where="images")


def test_without_names_folders_count_in_sorted_order_as_in_torchvision() -> None:
    numbers = number_classes(["b", "a", "c", "a"], (), 3, where="images")
    assert numbers.tolist() == [1, 0, 2, 0]
    assert numbers.dtype == torch.int64


def test_without_names_numbers_are_the_outputs_own() -> None:
    assert number_classes(["7", "LABEL_2"], (), 10, where="csv").tolist() == [7, 2]
    with pytest.raises(InputError, match="a class is called '10', the model's outputs are 0 to 9"):
        number_classes(["1", "10"], (), 10, where="csv")


def test_too_few_unnamed_classes_are_not_guessed() -> None:
    with pytest.raises(InputError, match="2 classes \\('a', 'b'\\), the model has 3 outputs and no class names"):
        number_classes(["a", "b"], (), 3, where="csv")
