"""The merging studies' specialists: images made alike, calibration by the seed, each task's own test set."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rankship_pipeline.models.source import load_function

STUDIES = Path(__file__).parents[3] / "benchmarks" / "studies"


def find(reference: str) -> Callable[..., Any]:
    return load_function(reference, STUDIES)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10's classes in turn, every image in one colour of its class; grey images of one brightness each."""
    monkeypatch.setenv("RANKSHIP_DATA", str(tmp_path))
    classes = np.arange(5000) % 10
    strips = np.broadcast_to(classes.astype(np.uint8)[:, None, None, None], (5000, 32, 32, 3)).reshape(5, 32_000, 32, 3)
    (tmp_path / "cifar10").mkdir()
    for part in ("calib", "test_A"):
        for number, strip in enumerate(strips):
            Image.fromarray(np.ascontiguousarray(strip)).save(tmp_path / "cifar10" / f"{part}_{number:02}.png")
        (tmp_path / "cifar10" / f"{part}.json").write_text(json.dumps({"labels": classes.tolist()}))
    for name in ("mnist", "fashion_mnist"):
        (tmp_path / name).mkdir()
        white, digits = np.full((2100, 28, 28), 255, dtype=np.uint8), (np.arange(2100) % 10).astype(np.uint8)
        np.savez(
            tmp_path / name / f"{name}.npz", calib_x=white[:1200], calib_y=digits[:1200], test_x=white, test_y=digits
        )
    return tmp_path


@pytest.mark.usefixtures("data")
def test_grey_images_get_three_channels_a_black_border_and_cifars_normalisation() -> None:
    images, labels = find("specialists.py:load_three")()["tests"]["fashion"]
    assert images.shape == (2000, 3, 32, 32)
    assert labels.dtype == torch.int64
    white, black = (1 - 0.406) / 0.225, -0.406 / 0.225
    assert images[7, 2, 2, 2].item() == pytest.approx(white, abs=1e-5)
    assert images[7, 2, 29, 29].item() == pytest.approx(white, abs=1e-5)
    assert images[7, 2, 1, 2].item() == pytest.approx(black, abs=1e-5)
    assert images[7, 2, 2, 30].item() == pytest.approx(black, abs=1e-5)


@pytest.mark.usefixtures("data")
def test_each_half_sees_its_own_classes_and_the_shared_head_is_tested_on_all() -> None:
    found = find("specialists.py:load_halves")()
    assert found["tests"]["first"][1].unique().tolist() == [0, 1, 2, 3, 4]
    assert found["tests"]["second"][1].unique().tolist() == [5, 6, 7, 8, 9]
    assert len(found["test_inputs"]) == len(found["test_labels"]) == 4000
    assert found["test_labels"].unique().tolist() == list(range(10))
    brightest = ((found["calibration"]["first"][:, 0] * 0.229 + 0.485) * 255).max()
    assert brightest.item() == pytest.approx(4, abs=1e-2)  # the pictures' colour is their class
    assert len(found["unlabelled"]["second"]) == 2500


@pytest.mark.usefixtures("data")
def test_the_seed_chooses_the_calibration_images_of_every_task() -> None:
    load = find("specialists.py:load_four")
    first, again, other = load(1), load(1), load(2)
    assert list(first["calibration"]) == list(first["tests"]) == ["first", "second", "mnist", "fashion"]
    assert torch.equal(first["calibration"]["second"], again["calibration"]["second"])
    assert not torch.equal(first["calibration"]["second"], other["calibration"]["second"])
    assert {len(images) for images in first["calibration"].values()} == {500}
