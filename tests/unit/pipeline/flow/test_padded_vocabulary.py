"""Models with one tokenizer and other numbers of rows for it merge in a recipe."""

from pathlib import Path

import torch

from make.berts import save_bert
from make.recipes import make_stages, state_rest
from rankship_pipeline.foundation.store import Store

LOADER = """
import torch

def load():
    x = torch.randint(0, 20, (48, 6), generator=torch.Generator().manual_seed(0))
    x = (x, torch.ones_like(x))
    calibration = {name: tuple(one[start : start + 16] for one in x) for name, start in (("a", 0), ("b", 16))}
    labels = torch.arange(16) % 3
    return {"calibration": calibration, "test_inputs": tuple(one[32:] for one in x), "test_labels": labels}
"""


def test_rows_without_a_token_are_made_the_first_models(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(LOADER)
    models = ""
    for seed, (name, rows) in enumerate((("a", 24), ("b", 20))):
        save_bert(tmp_path / name, seed, vocab_size=rows)
        (tmp_path / name / "vocab.txt").write_text("".join(f"t{index}\n" for index in range(20)))
        models += f'[[models]]\nname = "{name}"\nhuggingface = "{name}"\ntask = "sequence-classification"\n'
        models += 'inputs = ["input_ids", "attention_mask"]\n'
    (tmp_path / "r.toml").write_text(f'name = "r"\n{models}{state_rest(0.6)}[merge]\nmethod = "joint"\n')
    stages = make_stages(tmp_path / "r.toml", Store(tmp_path / "store"))
    assert any("24 rows" in note for note in stages.prepared.notes)
    merged, _ = stages.merge("average")
    name = "model.bert.embeddings.word_embeddings.weight"
    tables = [stages.prepared.sources[one].load_state()[name] for one in "ab"]
    found = merged.module.state_dict()[name]
    torch.testing.assert_close(found[:20], (tables[0][:20] + tables[1]) / 2)
    assert torch.equal(found[20:], tables[0][20:])
    x = stages.prepared.data.test_inputs
    own = stages.prepared.sources["b"].make()
    own.load_state_dict(stages.prepared.sources["b"].load_state())
    with torch.inference_mode():
        torch.testing.assert_close(stages.load_source("b").module(*x), own(*x))
    stages.merge("joint")
