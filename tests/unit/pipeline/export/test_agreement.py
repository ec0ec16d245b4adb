from dataclasses import replace

import numpy as np
import pytest

from make.artifacts import COMPRESSED, make_artifact
from rankship_pipeline.export.agreement import find_agreement, find_cosine, find_error
from rankship_pipeline.export.parity import fit_limits
from rankship_pipeline.recipe.export_choices import ParityChoice

WANT = np.array([[[4.0, 1.0, 0.0], [2.0, 1.9, 0.0], [0.0, 0.0, 3.0]]])  # (samples, answers, classes)
GOT = np.array([[[4.1, 1.0, 0.0], [1.9, 2.0, 0.0], [0.0, 3.0, 2.0]]])


def test_a_small_lead_is_a_draw() -> None:
    assert find_agreement(GOT, WANT, -1, 0.0) == pytest.approx(1 / 3)
    assert find_agreement(GOT, WANT, -1, 1 / 32) == pytest.approx(2 / 3)
    assert find_error(GOT, WANT) == pytest.approx(0.75)
    assert find_cosine(WANT, WANT) == pytest.approx(1.0)


def test_likeliest_tokens_may_change_half_as_often_again_as_rounding_changes_them() -> None:
    limits, artifact = ParityChoice(), make_artifact(replace(COMPRESSED, precision="int8"))
    assert fit_limits(limits, artifact).min_top1_agreement == 1.0
    assert fit_limits(limits, replace(artifact, rounding_agreement=0.98)).min_top1_agreement == pytest.approx(0.97)
    assert fit_limits(limits, replace(artifact, rounding_agreement=0.5)).min_top1_agreement == pytest.approx(0.9)
    plain = make_artifact(COMPRESSED)
    assert fit_limits(limits, replace(plain, rounding_agreement=0.5)) == limits


def test_a_file_may_be_half_as_far_again_from_torch_as_rounding_is_in_error_and_in_cosine() -> None:
    """Vectors whose errors are independent and of size e are √2·e apart: of 1 - cosine, e²/2 each, that is twice."""
    draw = np.random.default_rng(0)
    model = draw.normal(size=10_000)
    torch_, file = (model + 0.1 * draw.normal(size=10_000) for _ in range(2))
    noise, apart = 1 - find_cosine(torch_[None], model[None]), 1 - find_cosine(file[None], torch_[None])
    assert apart == pytest.approx(2 * noise, rel=0.1)
    artifact = make_artifact(replace(COMPRESSED, precision="int8"))
    limits = fit_limits(ParityChoice(), replace(artifact, rounding_cosine=0.99, rounding_error=0.2))
    assert limits.min_cosine == pytest.approx(1 - 2.25 * 0.01)
    assert limits.max_relative_error == pytest.approx(0.3)
