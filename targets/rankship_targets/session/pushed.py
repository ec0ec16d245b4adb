"""The files that a session copies to its device; artifacts only if they are verified and signed."""

from collections.abc import Collection, Iterable
from pathlib import Path

from rankship_pipeline.foundation.errors import BuildError, CommandFailed, ManifestRefused
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.formats import FACTS
from rankship_pipeline.foundation.records import Verified
from rankship_targets.devices.device import Device
from rankship_targets.session.manifest import SUFFIX as MANIFEST_SUFFIX
from rankship_targets.session.manifest import check_pushed, manifest_path, read_manifest
from rankship_targets.transport.copying import OnProgress, copy_verified, remove_old_parts
from rankship_targets.transport.link import Link
from rankship_targets.transport.protocol import Transport, hash_many, run_checked
from rankship_targets.trials.request import GenerateRequest, MeasureRequest


class PushedFiles:
    """The files that this session put into one device's working directory; they are named by their content."""

    def __init__(self, device: Device, link: Link, workdir: str, signers: Collection[str] = ()) -> None:
        self._device = device
        self._link = link
        self.workdir = workdir
        self._signers = signers
        self._proven: dict[str, str] = {}  # path on the device → SHA-256

    def push_artifact(self, artifact: Path, verified: Verified, on_progress: OnProgress | None = None) -> str:
        """Copy a verified and signed artifact; returns its path on the device.

        BuildError if it is not the file that was verified, ManifestRefused if nobody trusted signed it.
        """
        sha256 = hash_file(artifact)
        if sha256 != verified.artifact_sha256:
            message = f"{artifact} has SHA-256 {sha256}, expected {verified.artifact_sha256}: nothing was pushed"
            raise BuildError(message, hint="the file changed after `rankship verify`: build and verify again")
        manifest = read_manifest(artifact, self._signers)
        if manifest.verified != verified:
            message = f"{manifest_path(artifact)} is signed for another proof: nothing was pushed"
            raise ManifestRefused(message, hint="run `rankship verify` with the same recipe: it signs again")
        name = f"artifacts/{sha256}/model.{FACTS[verified.key.format].suffix}"
        remote = self.copy(artifact, sha256, name, on_progress)
        note = manifest_path(artifact)
        self.copy(note, hash_file(note), name + MANIFEST_SUFFIX)
        self._link.call(lambda transport: check_pushed(transport, remote, manifest, self._signers))
        self._proven[remote] = sha256
        return remote

    def push_file(self, path: Path, on_progress: OnProgress | None = None) -> str:
        """Copy any other file; returns its path on the device."""
        sha256 = hash_file(path)
        return self.copy(path, sha256, f"files/{sha256}{path.suffix}", on_progress)

    def copy(self, path: Path, sha256: str, name: str, on_progress: OnProgress | None = None) -> str:
        """Copy a file to `name` below the working directory, unless it is there already; returns its path."""
        remote = f"{self.workdir}/{name}"
        self._link.call(
            lambda transport: copy_verified(transport, path, remote, sha256, on_progress=on_progress), patient=True
        )
        return remote

    def refuse_unproven(self, request: MeasureRequest | GenerateRequest) -> None:
        """Raise BuildError if the artifact to measure was not pushed as verified."""
        if self._proven.get(request.artifact) != request.artifact_sha256:
            message = f"{request.artifact} was not pushed as verified in this session: nothing was measured"
            raise BuildError(message, hint="measure the path that push(file, verified) returns")

    def check_unchanged(self, transport: Transport, requests: Iterable[MeasureRequest]) -> None:
        """Raise CommandFailed if an artifact on the device is no longer the file that was pushed."""
        expected = {request.artifact: request.artifact_sha256 for request in requests}
        hashes = hash_many(transport, list(expected))
        for path, sha256 in expected.items():
            if hashes.get(path) != sha256:
                message = f"{path} on {self._device.name} has SHA-256 {hashes.get(path)}, expected {sha256}"
                raise CommandFailed(message, hint="something changed it after the push: push again")

    def remove_left(self, transport: Transport) -> None:
        """Remove what interrupted sessions left: parts of copies, and outputs, which only the lease's owner makes."""
        remove_old_parts(transport, self.workdir)
        run_checked(transport, ["rm", "-rf", "--", f"{self.workdir}/outputs"])
