import base64
import struct

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from hypothesis import given
from hypothesis import strategies as st

from rankship_pipeline.foundation.errors import (
    AmbiguousDevice,
    ConnectionLost,
    NoSpace,
    ReadOnly,
    TargetError,
    Unauthorised,
    Unreachable,
)
from rankship_targets.transport.adb.client import AdbClient, Attached, explain, read_attached
from rankship_targets.transport.adb.state import is_address
from rankship_targets.transport.protocol import Completed
from rankship_targets.twin.adbd_keys import TOKEN_BYTES, PublicKey, is_signed_by, read_key

WORDS = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1)


@given(serial=WORDS, state=st.sampled_from(["device", "offline", "unauthorized", "recovery"]), model=WORDS)
def test_a_line_of_devices_is_read(serial: str, state: str, model: str) -> None:
    line = f"{serial}   {state} usb:1-2 product:oriole model:{model} device:oriole transport_id:7"
    assert read_attached(line) == Attached(serial=serial, state=state, model=model)
    assert read_attached(f"{serial}\t{state}") == Attached(serial=serial, state=state)


@given(st.text().filter(lambda text: text.strip()))
def test_any_line_of_devices_is_read_without_failing(line: str) -> None:
    assert line.lstrip().startswith(read_attached(line).serial.lstrip())


@pytest.mark.parametrize("details", ["", " product:lynx model:Pixel_7a device:lynx transport_id:3", " usb:1-2"])
@pytest.mark.parametrize("state", ["device", "offline", "unauthorized", "recovery"])
@pytest.mark.parametrize(
    "serial",
    ["adb-35XYZ-abCDef (2)._adb-tls-connect._tcp", "my device  2", "a device", "größe;$(x) 'y'", "192.168.1.7:5555"],
)
def test_a_serial_may_have_blanks_and_any_characters(serial: str, state: str, details: str) -> None:
    found = read_attached(f"{serial:22} {state}{details}")
    assert (found.serial, found.state) == (serial, state)
    assert found.model == ("Pixel 7a" if "model:" in details else "")


def test_a_phone_that_this_user_may_not_open_keeps_its_reason() -> None:
    why = "no permissions (user in plugdev group; are your udev rules wrong?); see [http://developer.android.com/x]"
    assert read_attached(f"my phone             {why} usb:1-2") == Attached(serial="my phone", state=why)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("error: device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set", Unauthorised),
        ("error: device offline", ConnectionLost),
        ("error: device '1A2B' not found", Unreachable),
        ("error: no devices/emulators found", Unreachable),
        ("error: more than one device with serial X", AmbiguousDevice),
        ("adb: error: failed to copy 'a' to 'b': remote write failed: No space left on device", NoSpace),
        ("adb: error: failed to copy 'a' to 'b': remote couldn't create file: Read-only file system", ReadOnly),
        ("adb: failed to check server version: cannot connect to daemon", Unreachable),
        ("words that nobody knows", ConnectionLost),
    ],
)
def test_what_adb_says_becomes_the_error_that_it_means(said: str, kind: type[TargetError]) -> None:
    failure = explain(Completed(code=1, stdout="", stderr=said), "copying")
    assert type(failure) is kind
    assert said.splitlines()[0] in str(failure)
    assert failure.hint


def test_a_server_and_a_serial_are_named_in_every_call() -> None:
    assert AdbClient(program="adb").argv("devices") == ["adb", "devices"]
    client = AdbClient(program="adb", server=("host", 5038), serial="1A2B")
    assert client.argv("shell", "x") == ["adb", "-H", "host", "-P", "5038", "-s", "1A2B", "shell", "x"]


@pytest.mark.parametrize("serial", ["192.168.1.7:5555", "phone.local:5555", "[fe80::1]:5555"])
def test_an_address_is_told_from_a_serial(serial: str) -> None:
    assert is_address(serial)
    assert not is_address("1A2B3C4D5E")
    assert not is_address(":5555")


def test_only_the_keys_owner_signs() -> None:
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    numbers = private.public_key().public_numbers()
    key = PublicKey(numbers.n, numbers.e)
    token = bytes(range(TOKEN_BYTES))
    signature = private.sign(token, padding.PKCS1v15(), Prehashed(hashes.SHA1()))  # noqa: S303 - adb's own scheme
    assert is_signed_by(key, token, signature)
    assert not is_signed_by(key, token[::-1], signature)
    assert not is_signed_by(key, token, bytes(len(signature)))
    words = numbers.n.to_bytes(256, "little") + bytes(256)
    raw = struct.pack("<II", 64, 0) + words + struct.pack("<I", numbers.e)
    assert read_key(base64.b64encode(raw) + b" user@host\0") == key
