"""Whatever a device says, the host ends with what was said or with an error of ours, and with no other number."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from rankship_pipeline.foundation.errors import AgentMismatch, CommandFailed, TargetBusy, TargetError
from rankship_targets.devices.device import Device
from rankship_targets.session import greeting
from rankship_targets.transport.copying import LOOK, NO_FOLDER, copy_verified, name_part
from rankship_targets.transport.fake import COMMANDS, FakeTransport
from rankship_targets.transport.lease import Lease, describe_owner
from rankship_targets.transport.protocol import Completed, hash_many, hash_remote, read_hashes, read_numbers
from rankship_targets.transport.ssh.command import read_group
from rankship_targets.trials import events
from rankship_targets.trials.events import read_event

DEVICE = Device(name="pi", transport="local")
HASH = hashlib.sha256(b"").hexdigest()
# What tools print, cut, doubled and mixed, beside arbitrary text.
WORDS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            HASH,
            f"\\{HASH}",
            "  ",
            " *",
            "a",
            "b c",
            "\n",
            "-",
            "0",
            "1700000000",
            "9" * 5000,
            "\uff11\uff12",
            "NaN",
            "1e9",
        ]
    ),
)
SAID = st.lists(WORDS, max_size=8).map("".join)
CODES = st.sampled_from([0, 0, 0, 1, 2, 126, 127, 137, 255])


def answer(text: str, code: int = 0) -> Callable[[FakeTransport, Sequence[str]], Completed]:
    return lambda _, __: Completed(code=code, stdout=text, stderr="")


@given(said=SAID, code=CODES)
def test_hashes_are_what_was_said_or_an_error(said: str, code: int) -> None:
    with FakeTransport({"sha256sum": answer(said, code)}) as fake:
        for names in (["a"], ["a", "b c"]):
            try:
                found = hash_many(fake, names)
            except TargetError as failure:
                str(failure).encode()
                continue
            assert set(found) <= set(names)
            assert all(re.fullmatch("[0-9a-f]{64}", one) and one in said for one in found.values())
            assert code in {0, 1}
            assert code == 1 or len(found) == len(names)


@given(names=st.sets(st.text(st.characters(exclude_characters="\0\\\n\r", codec="utf-8"), min_size=1), max_size=6))
@example(names={"two  words", " *", " x", "a\u2028b", "\x0b", "\x85"})
def test_printed_hashes_are_read_back_whatever_the_names(names: set[str]) -> None:
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in names}
    printed = "".join(f"{sha256}  {name}\n" for name, sha256 in hashes.items())
    assert read_hashes(printed, list(names)) == hashes


@pytest.mark.parametrize("printed", ["{hash}  line\nbreak\n", "\\{hash}  line\\nbreak\n", "{hash} *line\nbreak\n"])
def test_a_name_with_a_line_break_is_read_however_it_is_printed(printed: str) -> None:
    with FakeTransport({"sha256sum": answer(printed.format(hash=HASH))}) as fake:
        assert hash_remote(fake, "line\nbreak") == HASH


@given(said=SAID, count=st.integers(1, 3))
@example(said="12 " + "9" * 5000, count=2)
@example(said="\uff11\uff12", count=1)
@example(said="1_000", count=1)
def test_numbers_are_what_was_said_or_an_error(said: str, count: int) -> None:
    try:
        numbers = read_numbers(said, count, "free space")
    except CommandFailed:
        pass
    else:
        assert len(numbers) == count
        assert [int(word) for word in said.split()] == list(numbers)


@given(head=st.one_of(st.binary(max_size=60), st.from_regex(rb"[0-9]{1,12}\n.*", fullmatch=True)))
@example(head=b"9" * 5000 + b"\n")
@example(head=b"0\n")
@example(head=b"-5\n")
def test_a_process_group_is_a_positive_number_or_an_error(head: bytes) -> None:
    try:
        group, rest = read_group(head)
    except CommandFailed:
        assert not re.match(rb"[1-9][0-9]{0,8}\n", head)
    else:
        assert group > 0  # 0 and -1 would be every process of ours
        assert head == b"%d\n%s" % (group, rest)


@given(listing=SAID, note=SAID, changed=SAID, now=SAID, codes=st.tuples(CODES, CODES, CODES, CODES))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_lease_is_busy_or_an_error_whatever_its_owner_left(
    listing: str, note: str, changed: str, now: str, codes: tuple[int, int, int, int]
) -> None:
    commands = {
        "ls": answer(listing, codes[0]),
        "cat": answer(note, codes[1]),
        "stat": answer(changed, codes[2]),
        "date": answer(now, codes[3]),
    }
    with FakeTransport(commands) as fake:
        fake.folders.add("lease")
        lease = Lease(device=DEVICE, folder="lease", owner=describe_owner())
        try:
            lease.take(fake)
        except (TargetBusy, TargetError) as failure:
            str(failure).encode(errors="surrogatepass")
        else:  # only an age that was said can have freed it
            age = int(now) - int(changed)
            assert age >= lease.stale_s


@given(said=SAID, code=CODES)
def test_what_is_said_of_a_part_is_believed_only_when_right(
    said: str, code: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assume(code != NO_FOLDER)
    local: Path = tmp_path_factory.getbasetemp() / "part source"
    local.write_bytes(b"x" * (1 << 20))
    sha256 = hashlib.sha256(local.read_bytes()).hexdigest()

    def say(fake: FakeTransport, argv: Sequence[str]) -> Completed:
        return Completed(code=code, stdout=said, stderr="") if argv[2] == LOOK else COMMANDS["sh"](fake, argv)

    with FakeTransport({"sh": say}) as fake:
        fake.files[name_part("place", sha256)] = b"y" * 100
        assert copy_verified(fake, local, "place", sha256)
        assert fake.files == {"place": local.read_bytes()}


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=10,
)
FIELDS = sorted({field for kind in events._RECORDS.values() for field in kind.__annotations__})
EVENTS = st.builds(
    lambda name, fields: {"event": name, **fields},
    st.sampled_from(sorted(events._RECORDS)),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6),
).map(json.dumps)


@given(line=st.one_of(SAID, EVENTS, JSON.map(json.dumps)))
@example(line='{"event": "error", "kind": "failed", "message": "\\ud800"}')
@example(line='{"event": "loaded", "load_ns": 1e400}')
@example(line='{"event": "loaded", "load_ns": NaN}')
@example(line='{"event": "loaded", "load_ns": true}')
@example(line='{"event": "loaded", "load_ns": 1.0}')
@example(line='{"event": "loaded", "load_ns": "1"}')
@example(line='{"event": "loaded", "load_ns": ' + "9" * 5000 + "}")
@example(line='{"event": "samples", "ns": [1, null]}')
@example(line='{"event": "loaded", "load_ns": 1, "load_ns": 2}')
@example(line="[" * 100_000)
def test_an_event_is_what_was_said_or_a_mismatch(line: str) -> None:
    try:
        event = read_event(line)
    except AgentMismatch as failure:
        str(failure).encode()
        return
    said = json.loads(line)
    for name in {field.name for field in fields(event)} & set(said):
        value = getattr(event, name)
        if isinstance(value, int):
            assert type(said[name]) is type(value)
            assert said[name] == value
    repr(event).encode()


@given(said=st.one_of(SAID, JSON.map(json.dumps)))
@example(said='[[3, 11], "relative", false]')
@example(said='[[3, "11"], "/home", false]')
@example(said='[[3, 11], "/home", 0]')
@example(said="[" * 100_000)
def test_a_greeting_is_a_version_and_a_folder_or_an_error(said: str) -> None:
    try:
        version, folder, left = greeting.read_greeting(said, DEVICE)
    except CommandFailed:
        pass
    else:
        assert json.loads(said) == [version, folder, left]
        assert folder.startswith("/")
