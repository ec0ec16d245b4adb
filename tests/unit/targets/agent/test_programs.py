"""Runtimes that are programs: the agent passes on what they say, and says what happened where they say nothing."""

from pathlib import Path
from typing import Any

import pytest

from make.agents import call_agent
from rankship_targets.trials.events import read_event

VERSION = (
    'if [ "$1" = version ]; then echo \'{"event": "version", "runtime": "executorch", "version": "9.8"}\'; exit; fi\n'
)
OPENED = """echo '{"event": "opened", "rss_bytes": 4096}'\n"""
LOADED = """echo '{"event": "loaded", "load_ns": 7}'\n"""


def write_program(folder: Path, text: str) -> Path:
    path = folder / "a runner"
    path.write_text("#!/bin/sh\n" + VERSION + text)
    path.chmod(0o755)
    return path


def call(command: str, program: Path, **more: object) -> list[dict[str, Any]]:
    request: dict[str, object] = {"command": command, **more}
    if command != "probe":
        request |= {"format": "executorch", "artifact": "/m odel.pte", "inputs": ["/x.npy"], "threads": 3}
    events, done = call_agent(request, runner=program)
    assert all(read_event(line) for line in done.stdout.splitlines())  # the host understands every one
    assert (done.returncode == 0) == (events[-1]["event"] == "done")
    return events


LIMITS = {"min_samples": 20, "min_duration_ms": 5, "max_warmup_ms": 9}


def test_a_measurement_has_the_same_events_in_the_same_order_as_one_in_process(tmp_path: Path) -> None:
    said = OPENED + LOADED
    said += """echo '{"event": "warmed", "ns": [9, 8], "steady": true, "peak_rss_bytes": null}'\n"""
    said += (
        """echo '{"event": "samples", "ns": [5]}'; echo '{"event": "done"}'; printf '%s\\n' "$@" > "${0%/*}/argv"\n"""
    )
    events = call("measure", write_program(tmp_path, said), **LIMITS)
    names = [event["event"] for event in events]
    assert names == ["hello", "settled", "state", "opened", "loaded", "state", "warmed", "samples", "done"]
    assert (events[3]["runtime"]["name"], events[3]["runtime"]["version"]) == ("executorch", "9.8")
    assert [events[2]["when"], events[5]["when"]] == ["before", "after"]
    words = (tmp_path / "argv").read_text().splitlines()
    assert words[:3] == ["measure", "--threads", "3"]
    limits = ["--min-samples", "20", "--min-duration-ms", "5", "--max-warmup-ms", "9"]
    assert words[3:] == [*limits, "--", "/m odel.pte", "/x.npy"]


def test_a_file_that_generates_is_run_within_its_limits(tmp_path: Path) -> None:
    program = write_program(
        tmp_path, """printf '%s\\n' "$@" > "${0%/*}/argv"; echo '{"event": "done", "outputs": 1}'\n"""
    )
    limits = {"generation": {"prompt_tokens": 4, "context": 9}}
    told = ["--prompt-tokens", "4", "--context", "9"]

    def read_options() -> list[str]:
        words = (tmp_path / "argv").read_text().splitlines()
        return words[words.index("3") + 1 : words.index("--")]  # after --threads 3

    call("infer", program, output="/o", **limits)
    assert read_options() == ["--output", "/o", *told]
    call("measure", program, **limits, **LIMITS, phase="decode")
    assert read_options()[-6:] == [*told, "--phase", "decode"]
    call("generate", program, **limits, new_tokens=5, ends=[1, 2])
    assert read_options() == ["--new-tokens", "5", "--end=1", "--end=2", *told]


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (OPENED + "kill -9 $$", "bad_artifact"),
        (OPENED + LOADED + "kill -9 $$", "failed"),
        (OPENED + LOADED, "failed"),
        (OPENED + """echo '{"event": "error", "kind": "bad_input", "message": "2 inputs"}'; exit 1""", "bad_input"),
        (OPENED + "echo no json", "failed"),
    ],
)
def test_a_program_that_fails_is_one_error(tmp_path: Path, said: str, kind: str) -> None:
    events = call("measure", write_program(tmp_path, said), **LIMITS)
    assert (events[-1]["event"], events[-1]["kind"]) == ("error", kind), events


def test_a_program_that_does_not_run_here_is_lacking_and_not_probed(tmp_path: Path) -> None:
    broken = tmp_path / "runner"
    for content in (None, "\x7fELF of another machine", "#!/bin/sh\nexit 1\n", "#!/bin/sh\necho '[]'\n"):
        if content is not None:
            broken.write_text(content)
            broken.chmod(0o755)
        events = call("infer", broken, output=str(tmp_path / "out"))
        assert (events[-1]["event"], events[-1]["kind"]) == ("error", "lacks_runtime"), events
        assert str(broken) in events[-1]["message"]
        assert call("probe", broken, workdir=".")[1]["runtimes"]["executorch"] is None


def test_the_probe_names_the_programs_version(tmp_path: Path) -> None:
    events = call("probe", write_program(tmp_path, ""), workdir=".")
    assert events[1]["runtimes"]["executorch"] == ["executorch", "9.8"]
