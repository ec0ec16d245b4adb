"""Every transport in turn, with a folder on its device."""

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from make.transports import FLOOD, FLOOD_BYTES, REAL, Bench
from rankship_targets.transport import receiving
from rankship_targets.transport.adb.connection import open_adb
from rankship_targets.transport.fake import COMMANDS, FakeTransport
from rankship_targets.transport.local import LocalTransport
from rankship_targets.transport.protocol import Completed, run_checked
from rankship_targets.transport.ssh.connection import open_ssh


@pytest.fixture(params=[*REAL, "fake"])
def bench(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    # "shell" is a device without a Python: it hashes what lies there afterwards.
    monkeypatch.setattr(receiving, "PYTHON_FROM_BYTES", 1 << 60 if request.param == "shell" else 1 << 20)
    folder = tmp_path / "device"
    folder.mkdir()
    if request.param == "fake":
        fake = FakeTransport({"sh": _answer_script})
        fake.folders.add("/device")
        yield Bench(fake, "/device", "fake")
        return
    if request.param == "adb":
        with open_adb(request.getfixturevalue("pixel")) as transport:
            inside = f"/data/local/tmp/{secrets.token_hex(4)}"
            run_checked(transport, ["mkdir", "--", inside])
            yield Bench(transport, inside, "adb")
            run_checked(transport, ["rm", "-rf", "--", inside])
        return
    ssh = request.param == "ssh"
    with open_ssh(request.getfixturevalue("ssh_server").device) if ssh else LocalTransport() as transport:
        yield Bench(transport, str(folder), request.param)


def _answer_script(fake: FakeTransport, argv: Sequence[str]) -> Completed:
    """Say what `sh -c` would say to the scripts used below."""
    answers = {
        "exit 7": Completed(code=7, stdout="", stderr=""),
        "echo out; echo err >&2": Completed(code=0, stdout="out\n", stderr="err\n"),
        "cat; echo end": Completed(code=0, stdout="end\n", stderr=""),
        "kill -TERM $$": Completed(code=143, stdout="", stderr=""),
        "echo one; echo two; echo why >&2; exit 3": Completed(code=3, stdout="one\ntwo\n", stderr="why\n"),
        "printf 'a\\n\\nb'": Completed(code=0, stdout="a\n\nb", stderr=""),
        FLOOD: Completed(code=0, stdout="o" * FLOOD_BYTES, stderr="e" * FLOOD_BYTES),
    }
    return answers[argv[2]] if argv[2] in answers else COMMANDS["sh"](fake, argv)
