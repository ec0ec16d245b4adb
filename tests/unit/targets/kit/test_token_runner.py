"""The C++ program and a file that generates: ids in, and what the Python binding gives out."""

import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from make.agents import call_agent, find_event
from make.generating import CONTEXT, PROMPT, TOKENS, export_generating

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="ExecuTorch's libraries are looked for as x86_64's"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here: apt-get install g++"),
]
LIMITS = {"prompt_tokens": PROMPT, "context": CONTEXT}
LOOP = {"min_samples": 30, "min_duration_ms": 2, "max_warmup_ms": 50}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = export_generating("qwen2", "executorch", tmp_path_factory.mktemp("model"))
    np.save(built.path.with_name("x.npy"), np.stack([TOKENS, TOKENS[::-1]]).astype(np.int64))
    return built.path


def call(command: str, model: Path, runner: Path | None, **more: object) -> list[dict[str, Any]]:
    request = {"command": command, "format": "executorch", "artifact": str(model), "threads": 1, "generation": LIMITS}
    return call_agent({**request, "inputs": [str(model.with_name("x.npy"))], **more}, runner=runner)[0]


def test_its_logits_are_the_bindings(runner: Path, model: Path, tmp_path: Path) -> None:
    for program, name in ((runner, "a"), (None, "b")):
        assert call("infer", model, program, output=str(tmp_path / name))[-1] == {"event": "done", "outputs": 1}
    mine, theirs = (np.load(tmp_path / f"{name}.0.npy", allow_pickle=False) for name in "ab")
    assert mine.shape == (2, len(TOKENS) - PROMPT + 1, theirs.shape[2])
    np.testing.assert_array_equal(mine, theirs)
    assert np.abs(mine[0] - mine[1]).max() > 0.01


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_it_times_a_phase(runner: Path, model: Path, phase: str) -> None:
    events = call("measure", model, runner, phase=phase, **LOOP)
    names = [event["event"] for event in events]
    assert names == ["hello", "settled", "state", "opened", "loaded", "state", "warmed", "samples", "done"], events
    assert len(find_event(events, "samples")["ns"]) >= LOOP["min_samples"]  # more than there are tokens: it rewinds
    assert min(find_event(events, "samples")["ns"]) > 0


def test_it_continues_a_prompt_like_the_binding(runner: Path, model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", TOKENS[None, :2].astype(np.int64))
    more: dict[str, object] = {"inputs": [str(tmp_path / "x.npy")], "new_tokens": CONTEXT}

    def generate(program: Path | None, *ends: int) -> list[int]:
        made = find_event(call("generate", model, program, ends=list(ends), **more), "generated")
        assert len(made["ns"]) == len(made["tokens"]) - 1
        assert min([made["first_ns"], made["peak_rss_bytes"], *made["ns"]]) > 0
        return list(made["tokens"])

    found = generate(runner)
    assert found == generate(None)
    assert len(found) == CONTEXT - 1
    assert generate(runner, found[3], 10**6) == found[: found.index(found[3]) + 1]


def test_what_does_not_fit_is_refused(runner: Path, model: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    for changes, message in (
        ({"prompt_tokens": len(TOKENS) + 1}, f"{len(TOKENS)} tokens, expected {len(TOKENS) + 1} or more"),
        ({"context": len(TOKENS) - 1}, f"{len(TOKENS)} tokens do not fit the context of {len(TOKENS) - 1}"),
    ):
        last = call("infer", model, runner, output=output, generation={**LIMITS, **changes})[-1]
        assert (last["kind"], message in last["message"]) == ("bad_input", True), last
    np.save(tmp_path / "long.npy", np.zeros((1, CONTEXT + 1), np.int64))
    np.save(tmp_path / "floats.npy", np.zeros((1, CONTEXT), np.float32))
    for name in ("long", "floats", "absent"):
        inputs = [str(tmp_path / f"{name}.npy")]
        last = call("infer", model, runner, output=output, inputs=inputs, generation={**LIMITS, "context": 10**6})[-1]
        assert last["kind"] == "bad_input", (name, last)
