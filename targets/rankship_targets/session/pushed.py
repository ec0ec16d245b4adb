"""The files that a session has put on its device: artifacts only as they were proven and signed."""

from collections.abc import Iterable
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
from rankship_targets.trials.request import MeasureRequest


class PushedFiles:
    """What lies in one device's working folder by this session's doing; files are named by their content."""

    def __init__(self, device: Device, link: Link, workdir: str) -> None:
        self._device = device
        self._link = link
        self._workdir = workdir
        self._proven: dict[str, str] = {}  # path on the device → SHA-256

    def push_artifact(self, artifact: Path, verified: Verified, on_progress: OnProgress | None = None) -> str:
        """Copy an artifact that was proven and signed, and no other; gives its path on the device.

        BuildError where it is not the file that was proven, ManifestRefused where this user did not sign that.
        """
        sha256 = hash_file(artifact)
        if sha256 != verified.artifact_sha256:
            message = f"{artifact} has SHA-256 {sha256}, verified was {verified.artifact_sha256}: nothing was pushed"
            raise BuildError(message, hint="the file changed after `rankship verify`: build and verify again")
        manifest = read_manifest(artifact)
        if manifest.verified != verified:
            message = f"{manifest_path(artifact)} is signed for another proof: nothing was pushed"
            raise ManifestRefused(message, hint="`rankship verify` with the same recipe signs anew")
        name = f"artifacts/{sha256}/model.{FACTS[verified.key.format].suffix}"
        remote = self.copy(artifact, sha256, name, on_progress)
        note = manifest_path(artifact)
        self.copy(note, hash_file(note), name + MANIFEST_SUFFIX)
        self._link.call(lambda transport: check_pushed(transport, remote, manifest))
        self._proven[remote] = sha256
        return remote

    def push_file(self, path: Path, on_progress: OnProgress | None = None) -> str:
        """Copy any other file; gives its path on the device."""
        sha256 = hash_file(path)
        return self.copy(path, sha256, f"files/{sha256}{path.suffix}", on_progress)

    def copy(self, path: Path, sha256: str, name: str, on_progress: OnProgress | None = None) -> str:
        """Copy a file to a place below the working folder, unless the very file is there."""
        remote = f"{self._workdir}/{name}"
        self._link.call(
            lambda transport: copy_verified(transport, path, remote, sha256, on_progress=on_progress), patient=True
        )
        return remote

    def refuse_unproven(self, request: MeasureRequest) -> None:
        """Raise BuildError where what is to be measured was not pushed as proven."""
        if self._proven.get(request.artifact) != request.artifact_sha256:
            message = f"{request.artifact} was not pushed as verified in this session: nothing was measured"
            raise BuildError(message, hint="push(file, verified) gives the path to measure")

    def check_unchanged(self, transport: Transport, requests: Iterable[MeasureRequest]) -> None:
        """Raise CommandFailed where an artifact on the device is not the file that was pushed any more."""
        expected = {request.artifact: request.artifact_sha256 for request in requests}
        hashes = hash_many(transport, list(expected))
        for path, sha256 in expected.items():
            if hashes.get(path) != sha256:
                message = f"{path} on {self._device.name} has SHA-256 {hashes.get(path)}, not {sha256}"
                raise CommandFailed(message, hint="something changed it after the push: push again")

    def remove_left(self, transport: Transport) -> None:
        """Remove what broken sessions left: parts of copies, and outputs, which only the lease's holder makes."""
        remove_old_parts(transport, self._workdir)
        run_checked(transport, ["rm", "-rf", "--", f"{self._workdir}/outputs"])
