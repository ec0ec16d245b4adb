"""Files that generate, as the agent runs them: a sequence for its proof, a prompt or single tokens for its times."""

from pathlib import Path

import numpy as np
import pytest

from make.agents import ask_infer, ask_measure, call_agent, find_event
from make.token_files import CONTEXT, PROMPT, TOKENS, compute_logits, continue_greedily, save_decoder
from rankship_targets.agent import limits, tokens
from rankship_targets.agent.protocol import Fault

LIMITS = {"prompt_tokens": PROMPT, "context": CONTEXT}


class Recorder:
    """A decoder that notes what is asked of it."""

    context: int | None = 6
    position = 0

    def __init__(self) -> None:
        self.asked: list[object] = []

    def rewind(self, position: int) -> None:
        self.asked.append(position)

    def step(self, given: np.ndarray) -> np.ndarray:
        self.asked.append(given.tolist())
        return np.array([0.0, given[-1]], np.float32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_decoder(tmp_path / "model")


def test_infer_gives_the_logits_after_the_prompt_and_after_each_further_token(model: Path) -> None:
    for prompt in (1, PROMPT, TOKENS.shape[1]):
        events, done = call_agent(ask_infer(model, generation={**LIMITS, "prompt_tokens": prompt}))
        assert [event["event"] for event in events] == ["hello", "opened", "done"], done.stderr
        found = np.load(model.parent / "out.0.npy")
        np.testing.assert_allclose(found, compute_logits(TOKENS)[:, prompt - 1 :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_phase_is_measured_like_any_inference(model: Path, phase: str) -> None:
    events, done = call_agent(ask_measure(model, generation=LIMITS, phase=phase))
    assert done.returncode == 0, events
    names = [event["event"] for event in events]
    assert names == ["hello", "settled", "state", "opened", "loaded", "state", "warmed", "samples", "done"]
    assert len(find_event(events, "samples")["ns"]) >= 20
    assert find_event(events, "warmed")["peak_rss_bytes"] > 0


def test_a_timed_prefill_begins_with_an_empty_cache_each_time() -> None:
    decoder = Recorder()
    run = tokens.prefill(decoder, limits.Limits(2, 6))
    feed = run.prepare([np.array([[7, 8, 9]])])
    for _ in range(2):
        run.make_ready(feed)
        run.infer(feed)
    assert decoder.asked == [0, [7, 8], 0, [7, 8]]


def test_a_timed_token_comes_after_the_prompt_and_rewinding_is_not_timed() -> None:
    decoder = Recorder()
    run = tokens.decode(decoder, limits.Limits(2, 6))
    feed = run.prepare([np.array([[5, 6, 7, 8]])])
    assert decoder.asked == [0, [5, 6]]
    for token in (7, 8, 7):
        before = len(decoder.asked)
        run.make_ready(feed)
        assert decoder.asked[before:] == ([2] if before == 4 else [])
        run.infer(feed)
        assert decoder.asked[-1] == [token]
    with pytest.raises(Fault, match="2 tokens, expected 3 or more"):
        run.prepare([np.array([[5, 6]])])


def test_the_shorter_of_the_files_context_and_the_requests_holds() -> None:
    assert tokens.fit_limits(limits.Limits(2, 9), Recorder()).context == 6
    assert tokens.fit_limits(limits.Limits(2, 4), Recorder()).context == 4


@pytest.mark.parametrize(
    ("generation", "kind", "message"),
    [
        ({"prompt_tokens": 9, "context": CONTEXT}, "bad_input", "8 tokens, expected 9"),
        ({"prompt_tokens": 3, "context": 7}, "bad_input", "8 tokens do not fit the context of 7"),
        ({"prompt_tokens": 0, "context": 7}, "bad_request", "wrong in the request"),
        ({"prompt_tokens": 3, "context": "7"}, "bad_request", "wrong in the request"),
        ({"prompt_tokens": 3}, "bad_request", "wrong in the request"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(
    model: Path, generation: dict[str, object], kind: str, message: str
) -> None:
    events, _ = call_agent(ask_infer(model, generation=generation))
    assert (events[-1]["event"], events[-1]["kind"]) == ("error", kind), events
    assert message in events[-1]["message"]


def test_what_is_no_sequence_of_tokens_is_refused(model: Path) -> None:
    np.save(model.parent / "x.npy", TOKENS.astype(np.int32))
    events, _ = call_agent(ask_infer(model, generation=LIMITS))
    assert "given: int32 (1, 8)" in events[-1]["message"]
    events, _ = call_agent(ask_measure(model, generation=LIMITS, phase="sing"))
    assert events[-1]["kind"] == "bad_request"


def test_generate_continues_a_prompt_until_an_end_or_the_context(model: Path) -> None:
    wanted = continue_greedily(TOKENS[:1], CONTEXT - TOKENS.shape[1] + 1)
    request = {key: value for key, value in ask_infer(model).items() if key != "output"} | {"command": "generate"}

    def generate(count: int, *ends: int) -> list[int]:
        events, done = call_agent({**request, "generation": LIMITS, "new_tokens": count, "ends": list(ends)})
        assert done.returncode == 0, events
        made = find_event(events, "generated")
        assert len(made["ns"]) == len(made["tokens"]) - 1
        assert min([made["first_ns"], made["peak_rss_bytes"], *made["ns"]]) > 0
        return list(made["tokens"])

    assert generate(4) == wanted[:4]
    assert generate(1000) == wanted
    assert generate(1000, wanted[2]) == wanted[: wanted.index(wanted[2]) + 1]
    events, _ = call_agent({**request, "generation": LIMITS, "new_tokens": 0, "ends": []})
    assert events[-1]["kind"] == "bad_request"
