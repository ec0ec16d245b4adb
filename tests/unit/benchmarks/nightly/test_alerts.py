"""Alerts: what programs and people are told of a night, and that no address shows anywhere."""

import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest

from make.artifacts import DENSE
from make.nights import QUIET, make_device_night, make_night
from rankship_benchmarks.judge.changes import Change, Explanation
from rankship_benchmarks.nightly.alerts import (
    URLS,
    URLS_FILE,
    NightSummary,
    read_addresses,
    send_message,
    summarise_night,
    write_message,
)
from rankship_benchmarks.nightly.records import CaseVerdict, NightRecord
from rankship_benchmarks.verbs.nightly import _tell
from rankship_pipeline.foundation.codec import decode
from rankship_pipeline.foundation.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")  # Apprise imports it

needs_apprise = pytest.mark.skipif(find_spec("apprise") is None, reason="no apprise here: the extra alerts")
SECRET = "s3cr3t-token"  # noqa: S105 - of nobody
CHANGE = Change(about="file", what="package torch", before="2.1", after="2.2")
WHY = Explanation(baseline="one", candidate="two", finding="The file is another one.", changes=(CHANGE,))
WORSE = CaseVerdict(key=DENSE, verdict="worse", reason="+5.0% time", why=WHY)


def make_bad_night(status: int = 1) -> NightRecord:
    night = make_night(7, [make_device_night("pi4", None, (WORSE,)), make_device_night("pi5", "Unreachable")])
    return replace(night, exit_code=status)


@pytest.fixture
def posted() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A web server on this machine: its address, and the bodies that were sent to it."""
    bodies: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            refused = self.path.endswith("/refuse")
            self.send_response(500 if refused else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"json://user:{SECRET}@127.0.0.1:{server.server_port}", bodies
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_summary_has_what_the_night_found_and_reads_back(tmp_path: Path) -> None:
    _tell([make_bad_night()], None, tmp_path / "night.json", QUIET)
    read = decode(NightSummary, (tmp_path / "night.json").read_bytes(), where="night.json")
    assert read == summarise_night(make_bad_night())
    assert (read.night, read.exit_code, [one.device for one in read.worse]) == (7, 1, ["pi4"])
    assert read.worse[0].why == WHY
    assert read.gaps == ("pi5: Unreachable",)


def test_a_message_says_what_is_worse_and_what_differs() -> None:
    title, text = write_message(make_bad_night())
    assert title == "Rankship, night 7 of tiny: exit 1"
    assert "▲ pi4, onnx dense: +5.0% time\n    The file is another one.\n    package torch: 2.1 → 2.2" in text
    assert "! pi5: Unreachable" in text


def test_without_addresses_nothing_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apprise", None)
    assert read_addresses({}) is None
    assert read_addresses({URLS: "\n# json://nowhere\n"}) is None
    with pytest.raises(InputError, match="Apprise is not installed") as told:
        read_addresses({URLS: f"json://{SECRET}"})
    assert SECRET not in str(told.value)


@needs_apprise
def test_a_webhook_gets_the_message_and_nobody_gets_the_address(
    posted: tuple[str, list[dict[str, str]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    address, bodies = posted
    caplog.set_level("DEBUG")
    (tmp_path / "addresses").write_text(f"# the team's\n{address}/{SECRET}\n")
    addresses = read_addresses({URLS_FILE: str(tmp_path / "addresses")})
    night = make_bad_night()
    _tell([night], addresses, tmp_path / "night.json", QUIET)
    (body,) = bodies
    assert (body["title"], body["message"].strip()) == write_message(night)
    assert SECRET not in (tmp_path / "night.json").read_text()
    _tell([make_bad_night(0)], addresses, None, QUIET)
    assert len(bodies) == 1  # nothing to say of a good night
    refusing = read_addresses({URLS: f"{address}/{SECRET}/refuse"})
    assert refusing is not None
    assert not send_message(refusing, "title", "text")
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err + caplog.text


@needs_apprise
def test_an_address_that_is_none_is_refused_by_its_place_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with pytest.raises(InputError, match="alert address 2 of 2 is none that Apprise knows") as told:
        read_addresses({URLS: f"json://127.0.0.1/a\nno-such-kind://{SECRET}"})
    with pytest.raises(InputError, match="cannot be read: FileNotFoundError"):
        read_addresses({URLS_FILE: str(tmp_path / "none")})
    said = capsys.readouterr()
    assert SECRET not in str(told.value) + said.out + said.err + caplog.text
