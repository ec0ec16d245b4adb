"""The parity gate of a file that generates: logits at every place from the prompt's last on, through its cache."""

from pathlib import Path

import numpy as np
import pytest

from make.token_files import PROMPT, TOKENS, compute_logits, describe_decoder, save_decoder
from rankship_pipeline.export.parity import verify_artifact
from rankship_pipeline.export.runner import FakeRunner, Runner
from rankship_pipeline.foundation.errors import ParityFailed
from rankship_pipeline.foundation.records import Verified
from rankship_pipeline.recipe.export_choices import ParityChoice
from rankship_targets.session.runner import HostRunner


def prove(path: Path, runner: Runner) -> Verified:
    expected = path.with_name("expected.0.npy")
    np.save(expected, compute_logits(TOKENS)[:, PROMPT - 1 :])
    return verify_artifact(describe_decoder(path), path, [path.with_name("x.npy")], [expected], runner, ParityChoice())


def test_a_cache_that_keeps_every_token_is_proven(tmp_path: Path) -> None:
    proof = prove(save_decoder(tmp_path / "decoder.onnx"), HostRunner())
    assert proof.max_relative_error < 1e-5
    assert (proof.samples, proof.top1_agreement) == (2, 1.0)


def test_places_off_by_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ParityFailed, match="does not compute what torch computes: relative max error"):
        prove(save_decoder(tmp_path / "decoder.onnx", skew=1), HostRunner())


def test_a_fault_at_the_last_place_alone_is_refused_though_the_choice_is_the_same(tmp_path: Path) -> None:
    def compute(tokens: np.ndarray) -> np.ndarray:
        logits = compute_logits(tokens)[:, PROMPT - 1 :].copy()
        logits[:, -1] *= 1.01
        return logits

    path = save_decoder(tmp_path / "decoder.onnx")
    with pytest.raises(ParityFailed, match="relative max error"):
        prove(path, FakeRunner(compute))
    with pytest.raises(ParityFailed, match="outputs of shape"):
        prove(path, FakeRunner(lambda tokens: compute_logits(tokens)[:, PROMPT:]))
