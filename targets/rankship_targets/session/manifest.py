"""Signed manifests: what an artifact is, its parity proof, and who signed it; a device gets no artifact without one.

The key is made on this host at its first use and never leaves the user's configuration folder. A signature says that
this user's parity gate passed exactly this file; others who can write to a store, a cache or a device cannot forge it.
"""

import os
import secrets
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.errors import InputError, ManifestRefused
from rankship_pipeline.foundation.files import hash_file, write_atomic
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.records import Verified
from rankship_targets.devices.device import user_folder
from rankship_targets.transport.protocol import STEP_TIMEOUT_S, Transport, hash_remote

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SUFFIX = ".manifest.json"
_FOREIGN_BITS = 0o077
_HINT = "verify it on this host: `rankship verify RECIPE` signs the artifacts that pass"


@record
class Manifest:
    """What was signed; `key` is the Ed25519 public key and `signature` covers all other fields, both in hex."""

    manifest: Literal[2] = 2
    format: Format
    sha256: str
    size_bytes: int
    recipe_sha256: str
    verified: Verified
    key: str
    signature: str = ""


def manifest_path(artifact: Path) -> Path:
    """Return the path of an artifact's manifest, beside it."""
    return artifact.with_name(artifact.name + SUFFIX)


def sign_artifact(artifact: Path, verified: Verified, recipe_sha256: str) -> Manifest:
    """Sign a file that the parity gate passed, and write the manifest beside it."""
    key = _load_key()
    unsigned = Manifest(
        format=verified.key.format,
        sha256=hash_file(artifact),
        size_bytes=artifact.stat().st_size,
        recipe_sha256=recipe_sha256,
        verified=verified,
        key=key.public_key().public_bytes_raw().hex(),
    )
    signed = replace(unsigned, signature=key.sign(_bytes_to_sign(unsigned)).hex())
    _check_content(signed, artifact.name)
    write_atomic(manifest_path(artifact), encode(signed).encode())
    return signed


def find_signer() -> str:
    """Return this user's public signing key, in hex."""
    return _load_key().public_key().public_bytes_raw().hex()


def read_manifest(artifact: Path, signers: Collection[str] = ()) -> Manifest:
    """Read the manifest beside an artifact; ManifestRefused unless it was signed for exactly this file.

    Trusted are this user's own key and those of other `signers`, public keys in hex.
    """
    path = manifest_path(artifact)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise ManifestRefused(f"{artifact} has no signed manifest beside it", hint=_HINT) from None
    signed = parse_manifest(text, str(path), signers)
    if (signed.sha256, signed.size_bytes) != (hash_file(artifact), artifact.stat().st_size):
        raise ManifestRefused(f"{artifact} is not the file that {path.name} was signed for", hint=_HINT)
    return signed


def parse_manifest(text: str | bytes, where: str, signers: Collection[str] = ()) -> Manifest:
    """Parse a manifest and check its signature; only this user's own key and those of `signers` are trusted."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        signed = decode(Manifest, text, where=where)
    except InputError as failure:
        raise ManifestRefused(f"{failure}: this is not a manifest", hint=_HINT) from None
    own = find_signer()
    if signed.key not in {own, *signers}:
        message = f"{where} is signed by another key, {signed.key[:16]}…"
        raise ManifestRefused(message, hint=f"{_HINT}; this host's key is {own[:16]}…")
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signed.key))
        public.verify(bytes.fromhex(signed.signature), _bytes_to_sign(signed))
    except (InvalidSignature, ValueError):
        raise ManifestRefused(f"{where}: the signature does not match the manifest's content", hint=_HINT) from None
    _check_content(signed, where)
    return signed


def check_pushed(transport: Transport, artifact: str, expected: Manifest, signers: Collection[str] = ()) -> None:
    """Read the manifest back from the device and hash the artifact there; both must be as signed here."""
    remote = artifact + SUFFIX
    done = transport.run(["cat", "--", remote], timeout_s=STEP_TIMEOUT_S)
    if done.code != 0:
        raise ManifestRefused(f"{artifact} has no manifest on the device", hint="push it again")
    if parse_manifest(done.stdout, f"{remote} on the device", signers) != expected:
        raise ManifestRefused(f"{remote} on the device is another artifact's manifest", hint="push it again")
    found = hash_remote(transport, artifact)
    if found != expected.sha256:
        message = f"{artifact} on the device has SHA-256 {found}, its manifest says {expected.sha256}"
        raise ManifestRefused(message, hint="find out what else writes to the device's workdir")


def _check_content(signed: Manifest, where: str) -> None:
    if (signed.verified.artifact_sha256, signed.verified.key.format) != (signed.sha256, signed.format):
        message = f"{where}: the proof is for another file ({signed.verified.artifact_sha256[:16]}…)"
        raise ManifestRefused(message, hint=_HINT)


def _bytes_to_sign(manifest: Manifest) -> bytes:
    """Return the canonical text of everything but the signature, with a prefix that no other use of the key has."""
    return b"rankship manifest\n" + encode(replace(manifest, signature="")).encode()


def _load_key() -> "Ed25519PrivateKey":
    """Read this user's signing key, made at its first use; InputError if others can read it."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    path = user_folder("XDG_CONFIG_HOME", ".config") / "rankship" / "signing-key"
    if not path.exists():
        _make_key(path, Ed25519PrivateKey.generate().private_bytes_raw())
    if path.stat().st_mode & _FOREIGN_BITS:
        message = f"the signing key {path} can be read by others, so its signatures prove nothing"
        hint = "delete it: a new one is made, and `rankship verify` signs again"
        raise InputError(message, hint=hint)
    try:
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text(encoding="ascii").strip()))
    except ValueError:  # its text would show the content
        message = f"{path} is not a signing key"
        raise InputError(message, hint="delete it: a new one is made, and `rankship verify` signs again") from None


def _make_key(path: Path, key: bytes) -> None:
    """Write a key if there is none; if two processes do so at once, the first one's key stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    write_atomic(temporary, key.hex().encode(), mode=0o600)
    try:
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()
