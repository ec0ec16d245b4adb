"""Signed manifests: what is refused, and that the key stays where it is."""

import json
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from make.artifacts import COMPRESSED, make_proof
from rankship_pipeline.foundation.codec import encode
from rankship_pipeline.foundation.errors import InputError, ManifestRefused
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.records import Verified
from rankship_targets.devices.device import Device
from rankship_targets.session.manifest import check_pushed, find_signer, manifest_path, read_manifest, sign_artifact
from rankship_targets.session.pushed import PushedFiles
from rankship_targets.session.session import open_session
from rankship_targets.transport.local import LocalTransport

RECIPE = "ab" * 32


@pytest.fixture(autouse=True)
def own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "rankship" / "signing-key"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    path = tmp_path / "model größe.onnx"
    path.write_bytes(b"weights")
    return path


def prove(path: Path) -> Verified:
    return make_proof(hash_file(path), COMPRESSED, max_relative_error=1e-7)


def test_what_was_signed_is_read_again(artifact: Path) -> None:
    signed = sign_artifact(artifact, prove(artifact), RECIPE)
    assert read_manifest(artifact) == signed
    assert (signed.sha256, signed.size_bytes, signed.recipe_sha256) == (hash_file(artifact), 7, RECIPE)


def test_the_key_is_the_owners_only_is_made_once_and_is_never_shown(own_key: Path, artifact: Path) -> None:
    first = sign_artifact(artifact, prove(artifact), RECIPE)
    assert stat.S_IMODE(own_key.stat().st_mode) == 0o600
    assert sign_artifact(artifact, prove(artifact), RECIPE) == first
    secret = own_key.read_text()
    assert secret not in manifest_path(artifact).read_text()
    assert [path.name for path in own_key.parent.iterdir()] == ["signing-key"]
    for rights, text in ((0o644, secret), (0o600, secret[:40])):
        own_key.chmod(rights)
        own_key.write_text(text)
        with pytest.raises(InputError) as caught:
            read_manifest(artifact)
        assert secret[:40] not in f"{caught.value} {caught.value.hint}"


def change(key: str, value: object) -> Callable[[Path], None]:
    def spoil(artifact: Path) -> None:
        note = manifest_path(artifact)
        note.write_text(json.dumps({**json.loads(note.read_text()), key: value}))

    return spoil


def change_proof(artifact: Path) -> None:
    note = manifest_path(artifact)
    whole = json.loads(note.read_text())
    whole["verified"]["max_relative_error"] = 0.0
    note.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda artifact: manifest_path(artifact).unlink(),
        lambda artifact: manifest_path(artifact).write_text("no JSON"),
        lambda artifact: manifest_path(artifact).write_bytes(b"\xff\xfe"),
        lambda artifact: artifact.write_bytes(b"others!"),
        change("recipe_sha256", "cd" * 32),
        change("size_bytes", 8),
        change("signature", ""),
        change("signature", "zz"),
        change("signature", "00" * 64),
        change("key", "00" * 32),
        change("extra", 1),
        change("manifest", 1),
        change_proof,
    ],
)
def test_whatever_was_not_signed_like_this_is_refused(artifact: Path, spoil: Callable[[Path], None]) -> None:
    sign_artifact(artifact, prove(artifact), RECIPE)
    spoil(artifact)
    with pytest.raises(ManifestRefused):
        read_manifest(artifact)


def test_a_foreign_signature_is_refused(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sign_artifact(artifact, prove(artifact), RECIPE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "somebody else"))
    with pytest.raises(ManifestRefused, match="signed by another key"):
        read_manifest(artifact)


def test_another_users_signature_is_believed_where_that_user_is_named(
    artifact: Path, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed, signer = sign_artifact(artifact, prove(artifact), RECIPE), find_signer()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "somebody else"))
    assert find_signer() != signer
    assert read_manifest(artifact, (signer,)) == signed
    with open_session(device, signers=(signer,)) as session:
        assert session.push(artifact, prove(artifact))
    with pytest.raises(ManifestRefused, match="signed by another key"):
        read_manifest(artifact, ("ab" * 32,))
    manifest_path(artifact).write_text(encode(replace(signed, recipe_sha256="f" * 64)))
    with pytest.raises(ManifestRefused, match="signature does not match"):
        read_manifest(artifact, (signer,))


def test_a_proof_of_another_file_is_not_signed(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"other")
    with pytest.raises(ManifestRefused, match="proof is for another file"):
        sign_artifact(artifact, prove(tmp_path / "other"), RECIPE)
    assert not manifest_path(artifact).exists()


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(name="here", transport="local", python=sys.executable, workdir=str(tmp_path / "a device"))


def list_pushed(device: Device) -> list[str]:
    return sorted(path.name for path in Path(device.workdir).glob("artifacts/*/*"))


def test_the_manifest_travels_with_the_artifact(artifact: Path, device: Device) -> None:
    signed = sign_artifact(artifact, prove(artifact), RECIPE)
    with open_session(device) as session:
        remote = session.push(artifact, prove(artifact))
    assert list_pushed(device) == ["model.onnx", "model.onnx.manifest.json"]
    assert Path(f"{remote}.manifest.json").read_text() == encode(signed)


def test_nothing_is_copied_without_a_manifest_or_with_another_proof(artifact: Path, device: Device) -> None:
    with open_session(device) as session:
        with pytest.raises(ManifestRefused, match="no signed manifest"):
            session.push(artifact, prove(artifact))
        sign_artifact(artifact, prove(artifact), RECIPE)
        better = Verified(**{**json.loads(encode(prove(artifact))), "max_relative_error": 0.0})
        with pytest.raises(ManifestRefused, match="another proof"):
            session.push(artifact, better)
    assert list_pushed(device) == []


def test_what_is_changed_on_the_device_during_the_push_is_refused(
    artifact: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_artifact(artifact, prove(artifact), RECIPE)
    copy = PushedFiles.copy

    def meddle(files: PushedFiles, path: Path, sha256: str, name: str, *_: object) -> str:
        remote = copy(files, path, sha256, name)
        if name.endswith(".manifest.json"):
            Path(remote.removesuffix(".manifest.json")).write_bytes(b"others!")
        return remote

    monkeypatch.setattr(PushedFiles, "copy", meddle)
    with open_session(device) as session, pytest.raises(ManifestRefused, match="on the device has SHA-256"):
        session.push(artifact, prove(artifact))


def test_a_manifest_missing_changed_or_of_another_artifact_on_the_device_is_refused(
    artifact: Path, tmp_path: Path
) -> None:
    signed = sign_artifact(artifact, prove(artifact), RECIPE)
    other = tmp_path / "other.onnx"
    other.write_bytes(b"more weights")
    sign_artifact(other, prove(other), RECIPE)
    note, own = manifest_path(artifact), manifest_path(artifact).read_text()
    with LocalTransport() as transport:
        check_pushed(transport, str(artifact), signed)
        for text in (None, "{}", own.replace(RECIPE, "cd" * 32), manifest_path(other).read_text()):
            note.unlink() if text is None else note.write_text(text)
            with pytest.raises(ManifestRefused):
                check_pushed(transport, str(artifact), signed)
