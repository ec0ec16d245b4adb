"""A language model through the whole build: text in, files that generate in all three formats, judged and timed."""

import json
from pathlib import Path

import pytest

from make.adapters import train_adapter
from make.writers import save_writer, write_text
from rankship_pipeline.cli import main
from rankship_pipeline.foundation.formats import FORMATS

pytestmark = pytest.mark.slow

RECIPE = """
name = "writer"
[[models]]
name = "writer"
huggingface = "writer"
[data]
text = "corpus.txt"
tokens = 16
[budget]
kept_parameters = 0.8
[ranks]
step = 4
forms = ["svd", "width"]
[refine]
steps = 12
by = "blocks"
step_size = 1e-3
[precision]
weights = ["int8"]
[export]
context = 40
"""
SUITE = """
recipe = "recipe.toml"
rounds = 2
min_samples = 8
min_duration_ms = 1
max_warmup_ms = 200
"""
KINDS = 2  # dense, and compressed in int8


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a writer")
    save_writer(folder / "writer", vocab_size=48)  # as many as adapters are tried with
    write_text(folder / "corpus.txt")
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "suite.toml").write_text(SUITE)
    return folder


def test_it_is_built_proven_timed_judged_and_heard(written: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe, store = str(written / "recipe.toml"), str(written / "store")
    results, figures = str(written / "results"), str(written / "figures.json")
    measuring = ["--on", "this-machine", "--store", store, "--results", results]
    asked = ["--suite", str(written / "suite.toml"), "--prompt", "the cat sees"]
    assert main(["run", recipe, *measuring, *asked]) == 0, capfd.readouterr().err
    shown = capfd.readouterr().out
    assert shown.count("decode") >= KINDS * len(FORMATS), shown
    assert "perplexity" in shown
    assert "the cat sees" in shown
    beside = {one.name for one in (written / "store").glob("artifact-*/*")}
    assert {"genai_config.json", "tokenizer.json", "model.litertlm"} <= beside
    assert main(["eval", recipe, "--store", store, "--windows", "2", "--to", figures]) == 0, capfd.readouterr().err
    rows = json.loads(Path(figures).read_text())
    assert len(rows) == KINDS * (1 + len(FORMATS))
    found = {(row["variant"], row["precision"], row["runner"]): row["perplexity"]["perplexity"] for row in rows}
    for (variant, precision, runner), value in found.items():
        within = 1e-3 if precision == "float32" else 0.03
        assert value == pytest.approx(found[variant, precision, "torch"], rel=within), (variant, precision, runner)


def test_two_adapters_of_one_model_are_merged_compressed_and_heard(
    written: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapters = ("first", "second")
    for seed, name in enumerate(adapters):
        train_adapter(written / "writer", written / name, r=2 + seed, target_modules=["q_proj", "v_proj"])
    models = "".join(f'[[models]]\nname = "{one}"\nhuggingface = "writer"\nadapter = "{one}"\n' for one in adapters)
    text = RECIPE.replace('[[models]]\nname = "writer"\nhuggingface = "writer"\n', models)
    text = text.replace("context = 40", 'context = 40\nformats = ["onnx"]\n[merge]\nmethod = "ties"')
    (written / "merged.toml").write_text(text)
    flags = [str(written / "merged.toml"), "--store", str(written / "store")]
    measuring = ["--on", "this-machine", "--results", str(written / "results"), "--prompt", "the dog"]
    assert main(["run", *flags, *measuring]) == 0, capfd.readouterr().err
    shown = capfd.readouterr().out
    assert "the dog" in shown
    assert shown.count("decode") >= KINDS
