"""Transformers models through the whole build: attention, embeddings and integer inputs in all three formats."""

from pathlib import Path

import pytest

from make.berts import save_bert
from rankship_pipeline.cli import main
from rankship_pipeline.foundation.artifact_key import VARIANTS
from rankship_pipeline.foundation.formats import FORMATS

pytestmark = pytest.mark.slow

DATA = """
import torch

def load():
    generator = torch.Generator().manual_seed(0)
    def draw(count):
        ids = torch.randint(1, 60, (count, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[::2, 9:] = 0
        return ids, mask
    return {"calibration": {"a": draw(32), "b": draw(32)}, "test_inputs": draw(16), "test_labels": torch.arange(16) % 3}
"""

RECIPE = """
name = "tiny-bert"
[[models]]
name = "a"
huggingface = "a"
task = "sequence-classification"
inputs = ["input_ids", "attention_mask"]
[[models]]
name = "b"
huggingface = "b"
task = "sequence-classification"
inputs = ["input_ids", "attention_mask"]
[data]
loader = "data.py:load"
[budget]
kept_parameters = 0.8
[ranks]
step = 4
[parity]
samples = 6
"""


def test_two_bert_classifiers_are_merged_compressed_exported_and_verified(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a recipe with spaces – and ünicode"
    sizes = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 16,
        "num_hidden_layers": 1,
    }
    for seed, name in enumerate("ab"):
        save_bert(folder / name, seed, **sizes)
    (folder / "data.py").write_text(DATA)
    (folder / "recipe.toml").write_text(RECIPE)
    flags = [str(folder / "recipe.toml"), "--store", str(tmp_path / "store")]
    assert main(["build", *flags]) == 0, capfd.readouterr().err
    assert main(["verify", *flags]) == 0, capfd.readouterr().err
    proofs = [line for line in capfd.readouterr().out.splitlines() if "100.0 %" in line]
    assert len(proofs) == len(VARIANTS) * len(FORMATS)
