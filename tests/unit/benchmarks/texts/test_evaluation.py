"""What the verb `eval` refuses before any work; tests/flow evaluates a whole build."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from make.token_files import CONTEXT, GENERATION
from rankship_benchmarks.texts.evaluation import TextChoice, evaluate_build, open_file
from rankship_benchmarks.verbs.evaluate import evaluate
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.store import Store
from rankship_targets.session.runner import HostRunner

CHOICE = TextChoice(windows=2, formats=("onnx",))


def start(tmp_path: Path, generation: object, length: int = 8) -> None:
    tokens = torch.ones(4, length, dtype=torch.int64)
    data = SimpleNamespace(test_inputs=(tokens,), labels=tokens)
    prepared: Any = SimpleNamespace(generation=generation, data=data, recipe=SimpleNamespace(name="r"))
    build: Any = SimpleNamespace(artifacts=())
    next(iter(evaluate_build(prepared, build, Store(tmp_path), Steps(quiet=True), HostRunner(), CHOICE)))


def test_a_build_that_says_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the models of r do not generate text"):
        start(tmp_path, None)
    artifact: Any = SimpleNamespace(generation=None, key=SimpleNamespace(title="dense onnx"))
    with pytest.raises(InputError, match="dense onnx does not generate text"):
        open_file(artifact, Store(tmp_path), HostRunner())


def test_windows_longer_than_the_files_take_are_refused_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"windows of {CONTEXT + 1} tokens do not fit the files, which take {CONTEXT}"):
        start(tmp_path, GENERATION, CONTEXT + 1)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--tasks", "a"], "--tasks and --task-folder go together"),
        (["--windows", "0"], "--windows is 0"),
        (["--limit", "-3"], "--limit is -3"),
    ],
)
def test_flags_are_checked_before_anything_is_read(flags: list[str], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        evaluate(["nowhere.toml", *flags])
