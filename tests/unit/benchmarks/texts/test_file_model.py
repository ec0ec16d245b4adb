from pathlib import Path

import pytest
import torch

from make.token_files import CONTEXT, GENERATION, TOKENS, compute_logits, save_decoder
from rankship_benchmarks.texts.file_model import FileModel
from rankship_pipeline.foundation.errors import CommandFailed
from rankship_targets.session.runner import HostRunner


def test_every_logit_comes_from_the_files_own_cache(tmp_path: Path) -> None:
    model = FileModel("onnx", save_decoder(tmp_path / "model.onnx"), GENERATION, HostRunner())
    found = model(torch.from_numpy(TOKENS))
    torch.testing.assert_close(found, torch.from_numpy(compute_logits(TOKENS)), rtol=1e-5, atol=1e-5)


def test_a_text_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    model = FileModel("onnx", save_decoder(tmp_path / "model.onnx"), GENERATION, HostRunner())
    with pytest.raises(CommandFailed, match="context"):
        model(torch.ones(1, CONTEXT + 1, dtype=torch.int64))
