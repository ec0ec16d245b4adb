from pathlib import Path

import pytest

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.samples import CALIBRATION, TESTS, find_path, split
from rankship_pipeline.recipe.choices import DataChoice

TEXT = DataChoice(text="t.txt")


@pytest.mark.parametrize(("count", "sizes"), [(16, (8, 8)), (301, (150, 151)), (600, (256, 344)), (5000, (256, 1000))])
def test_half_calibrates_up_to_a_limit(count: int, sizes: tuple[int, int]) -> None:
    calibration, tests = split(count, TEXT, 0)
    assert (len(calibration), len(tests)) == sizes
    assert len(calibration) <= CALIBRATION
    assert len(tests) <= TESTS


def test_no_sample_calibrates_and_tests() -> None:
    calibration, tests = split(100, TEXT, 3)
    assert set(calibration) | set(tests) == set(range(100))


def test_the_seed_draws_the_calibration_and_leaves_the_tests() -> None:
    first, second = split(3000, TEXT, 0), split(3000, TEXT, 1)
    assert split(3000, TEXT, 0) == first
    assert first[1] == second[1]
    assert first[0] != second[0]
    assert not set(second[0]) & set(second[1])


def test_a_recipe_may_say_how_many() -> None:
    calibration, tests = split(12, DataChoice(text="t", calibration_samples=2, test_samples=10), 0)
    assert (len(calibration), len(tests)) == (2, 10)
    assert len(split(5000, DataChoice(text="t", test_samples=4000), 0)[1]) == 4000


@pytest.mark.parametrize(
    ("count", "choice", "complaint"),
    [
        (15, TEXT, "text 't.txt': 15 samples; at least 16"),
        (20, DataChoice(text="t", calibration_samples=11, test_samples=10), "20 samples cannot give 11 .* and 10"),
        (20, DataChoice(text="t", calibration_samples=20), "20 samples cannot give 20 .* and 1"),
        (20, DataChoice(text="t", test_samples=20), "20 samples cannot give 1 .* and 20"),
    ],
)
def test_too_few_are_refused_with_the_numbers(count: int, choice: DataChoice, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        split(count, choice, 0)


def test_a_path_is_beside_the_recipe_or_absolute_or_begins_with_a_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PICTURES", "/pictures")
    monkeypatch.setenv("HOME", "/home/me")
    assert find_path("a/b", tmp_path) == tmp_path / "a/b"
    assert find_path("$PICTURES/a", tmp_path) == Path("/pictures/a")
    assert find_path("~/a", tmp_path) == Path("/home/me/a")
