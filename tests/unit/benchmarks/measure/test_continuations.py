"""Each file of a build continues a prompt in its runtime, and its text stands beside dense torch's."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from make.artifacts import DENSE
from make.builds import make_build
from make.devices import make_local
from make.token_files import GENERATION, continue_greedily, store_decoder
from rankship_benchmarks.bundle.suite import Suite
from rankship_benchmarks.measure.continuations import Continuation, read_continuations
from rankship_benchmarks.measure.host_gate import verify_on_host
from rankship_benchmarks.measure.one_device import measure_build
from rankship_benchmarks.measure.run_plan import RunPlan
from rankship_benchmarks.report.continuation_words import Said, list_lines
from rankship_pipeline.flow.prompt import Prompt
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.export_choices import ParityChoice

WORDS = SimpleNamespace(decode=lambda tokens, **_: " ".join(f"w{one}" for one in tokens))
PROMPT = Prompt(text="w5 w6", tokens=(5, 6), generation=replace(GENERATION, ends=()), tokenizer=WORDS)


def test_every_file_that_generates_continues_a_prompt_shorter_than_its_proofs(tmp_path: Path) -> None:
    store, steps, limits = Store(tmp_path / "store"), Steps(quiet=True), ParityChoice()
    build = make_build(store_decoder(store, generation=PROMPT.generation))
    verified = verify_on_host(build, store, limits, steps)
    suite = Suite(recipe="r", rounds=1, min_samples=3, min_duration_ms=1, max_warmup_ms=1)
    plan = RunPlan(build, verified, store, suite, tmp_path / "results", limits, prompt=PROMPT.tokens)
    folder = measure_build(plan, make_local(tmp_path / "a device"), steps)
    found = read_continuations(folder)
    wanted = continue_greedily(np.array([PROMPT.tokens]), GENERATION.context - 1)  # fewer than 64: it is full
    assert found is not None
    assert [(one.key, list(one.tokens)) for one in found.said] == [(DENSE, wanted)]
    assert len(found.said[0].ns) == len(wanted) - 1
    assert read_continuations(tmp_path) is None


def test_texts_stand_beside_dense_torch_with_where_they_depart() -> None:
    def say(*tokens: int) -> Said:
        return "pi4", Continuation(key=DENSE, tokens=tokens, first_ns=40_000_000, ns=(50_000_000,) * 2)

    lines = list_lines(PROMPT, (1, 2, 3), [say(1, 2, 3), say(1, 3, 2), say(1, 2)])
    assert lines[:3] == ["After 'w5 w6', the likeliest token each time:", "dense, torch on this host:", "  ' w1 w2 w3'"]
    assert "dense onnx on pi4, first token after 40.00 ms, then 20.0 tokens/s, all 3 tokens as dense torch:" in lines
    assert [line.rpartition("tokens/s, ")[2] for line in lines[5::2]] == [
        "the first 1 of 3 tokens as dense torch:",
        "the first 2 of 3 tokens as dense torch:",
    ]
