"""The host's side of the protocol: whatever the device says, the host answers with its own errors."""

import json
from collections.abc import Sequence
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankship_pipeline.foundation.errors import (
    AgentDied,
    AgentMismatch,
    CommandFailed,
    Lacks,
    NoSpace,
    ReadOnly,
    Rebooted,
    TargetBusy,
    TargetError,
)
from rankship_targets.client.calls import call_agent, pick
from rankship_targets.devices.device import Device
from rankship_targets.transport.fake import FakeTransport
from rankship_targets.transport.protocol import Completed
from rankship_targets.trials.events import _RECORDS, Done, Event, Failure, Hello, Samples, Warmed, read_event

DEVICE = Device(name="board", transport="local", python="python3")
HELLO = '{"event": "hello", "protocol": 2}'
DONE = '{"event": "done"}'
REQUEST = {"command": "infer", "format": "tflite"}


def speak(*lines: str, code: int = 0, stderr: str = "") -> list[Event]:
    """Let a device say these lines and end so."""
    stdout = "".join(f"{line}\n" for line in lines)

    def answer(_: FakeTransport, __: Sequence[str]) -> Completed:
        return Completed(code=code, stdout=stdout, stderr=stderr)

    with FakeTransport({"python3": answer}) as transport:
        return list(call_agent(transport, DEVICE, "agent.py", REQUEST, timeout_s=1))


def test_events_come_as_records() -> None:
    events = speak(HELLO, '{"event": "samples", "ns": [3, 1]}', DONE)
    assert events == [Samples(event="samples", ns=(3, 1)), Done(event="done")]
    assert pick(events, Samples, DEVICE).ns == (3, 1)
    with pytest.raises(AgentMismatch, match="never sent 'warmed'"):
        pick(events, Warmed, DEVICE)


@pytest.mark.parametrize("protocol", ["1", "null", '"1"', "1.5", "[]"])
def test_another_protocol_is_a_mismatch(protocol: str) -> None:
    with pytest.raises(AgentMismatch, match="protocol"):
        speak(f'{{"event": "hello", "protocol": {protocol}, "more": 1}}', DONE)


@pytest.mark.parametrize("first", [DONE, "Welcome to Debian!", "", "{}", "null"])
def test_anything_before_the_greeting_is_a_mismatch_that_shows_it(first: str) -> None:
    with pytest.raises(AgentMismatch) as caught:
        speak(first, HELLO, DONE)
    assert first in str(caught.value)


@pytest.mark.parametrize(
    "line", ["noise", '{"event": "dance"}', '{"event": "samples", "ns": ["3"]}', "[1]", '{"event": 1}']
)
def test_noise_between_events_is_a_mismatch_that_shows_it(line: str) -> None:
    with pytest.raises(AgentMismatch) as caught:
        speak(HELLO, line, DONE)
    assert line in str(caught.value)


def test_missing_runtime_is_lacking_and_says_how_to_install_it() -> None:
    with pytest.raises(Lacks, match="board: no runtime") as caught:
        speak(HELLO, '{"event": "error", "kind": "lacks_runtime", "message": "no runtime"}', code=1)
    assert "python3 -m pip install ai-edge-litert" in caught.value.hint


@pytest.mark.parametrize("kind", ["bad_artifact", "bad_input", "bad_request", "failed"])
def test_other_failures_keep_the_devices_words(kind: str) -> None:
    with pytest.raises(CommandFailed, match="board: it broke") as caught:
        speak(HELLO, json.dumps({"event": "error", "kind": kind, "message": "it broke"}), code=1)
    assert caught.value.hint


@pytest.mark.parametrize(
    "said",
    [
        "Unsupported model IR version: 13, max supported IR version: 10",
        "Current official support for domain ai.onnx is till opset 21.",
        "Didn't find op for builtin opcode 'CONV_2D' version '6'",
    ],
)
def test_a_runtime_that_is_too_old_says_so_and_how_to_renew_it(said: str) -> None:
    with pytest.raises(CommandFailed) as caught:
        speak(HELLO, json.dumps({"event": "error", "kind": "bad_artifact", "message": said}), code=1)
    assert caught.value.hint.startswith("the device's runtime is older than the file: `rankship kit build board && ")
    assert "pip install --upgrade ai-edge-litert" in caught.value.hint


def test_native_crash_shows_the_end_of_stderr() -> None:
    with pytest.raises(CommandFailed, match=r"signal 6: .*abort: kaboom"):
        speak(HELLO, code=134, stderr="x" * 9000 + " abort: kaboom\n")


def test_killed_agent_has_died() -> None:
    with pytest.raises(AgentDied, match="ended by signal 9"):
        speak(HELLO, code=137)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("busy", TargetBusy),
        ("agent_died", AgentDied),
        ("rebooted", Rebooted),
        ("no_space", NoSpace),
        ("read_only", ReadOnly),
        ("unknown_run", AgentDied),
    ],
)
def test_what_befell_a_run_has_an_error_of_its_own(kind: str, error: type[TargetError]) -> None:
    with pytest.raises(error, match="board: why") as caught:
        speak(HELLO, json.dumps({"event": "error", "kind": kind, "message": "why"}), code=1)
    assert type(caught.value) is error
    assert "{" not in caught.value.hint


def test_end_without_a_last_word_is_a_failure() -> None:
    with pytest.raises(AgentDied, match="without a last event"):
        speak(HELLO, '{"event": "loaded", "load_ns": 3}')


def test_silence_is_a_mismatch_and_an_early_end_shows_stderr() -> None:
    with pytest.raises(AgentMismatch):
        speak()
    with pytest.raises(CommandFailed, match="SyntaxError"):
        speak(code=1, stderr="SyntaxError: invalid syntax")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
names = st.sampled_from(sorted(_RECORDS))
fields = st.sampled_from(
    ["event", "protocol", "ns", "state", "when", "runtime", "load_ns", "kind", "message", "steady"]
)


@given(st.text() | st.builds(json.dumps, json_values))
def test_reading_any_text_gives_an_event_or_our_error(line: str) -> None:
    read_safely(line)


@given(names, st.dictionaries(fields, json_values, max_size=5))
def test_reading_anything_like_an_event_gives_an_event_or_our_error(name: str, content: dict[str, object]) -> None:
    read_safely(json.dumps({**content, "event": name}))


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"event":' * 50_000, "9" * 5_000, '{"event": "loaded", "load_ns": 1e999}', "\ud800"]
)
def test_reading_hostile_text_gives_our_error(line: str) -> None:
    with pytest.raises(AgentMismatch):
        read_event(line)


def read_safely(line: str) -> None:
    with suppress(AgentMismatch):  # any other error fails the test
        assert isinstance(read_event(line), Event)


@given(st.sampled_from(["lacks_runtime", "failed"]), st.text())
def test_every_failure_survives_the_way(kind: str, message: str) -> None:
    event = read_event(json.dumps({"event": "error", "kind": kind, "message": message}))
    assert isinstance(event, Failure)
    assert (event.kind, event.message) == (kind, message)


def test_greeting_is_read() -> None:
    assert read_event(HELLO) == Hello(event="hello", protocol=2)
