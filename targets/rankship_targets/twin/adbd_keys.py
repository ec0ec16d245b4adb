"""The keys by which a computer authenticates to a phone, in Android's own format."""

import base64
import struct
from typing import NamedTuple

TOKEN_BYTES = 20
_KEY_BYTES = 256  # adb supports only RSA-2048
# PKCS#1 v1.5: the prefix of a SHA-1 digest. The token is signed as if it were one.
_PREFIX = bytes.fromhex("3021300906052b0e03021a05000414")


class PublicKey(NamedTuple):
    """An RSA key."""

    modulus: int
    exponent: int


def read_key(text: bytes) -> PublicKey:
    """Read a key as adb sends it: base64 of the size in words, n0inv, modulus, R², exponent; then a user's name."""
    raw = base64.b64decode(text.split(b" ")[0].strip(b"\0\n"))
    (words,) = struct.unpack_from("<I", raw)
    (exponent,) = struct.unpack_from("<I", raw, 8 + words * 8)
    return PublicKey(int.from_bytes(raw[8 : 8 + words * 4], "little"), exponent)


def is_signed_by(key: PublicKey, token: bytes, signature: bytes) -> bool:
    """Return whether the key's owner signed the token."""
    padding = b"\xff" * (_KEY_BYTES - 3 - len(_PREFIX) - len(token))
    message = pow(int.from_bytes(signature, "big"), key.exponent, key.modulus).to_bytes(_KEY_BYTES, "big")
    return message == b"\0\1" + padding + b"\0" + _PREFIX + token
