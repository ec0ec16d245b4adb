"""The parity gate on the host for a whole build: proofs are kept in the store; changed files are always detected."""

from collections.abc import Sequence
from pathlib import Path

from rankship_pipeline.export.artifact import find_proof, find_proofs
from rankship_pipeline.export.parity import refuse_changed, verify_proofs
from rankship_pipeline.export.runner import Runner
from rankship_pipeline.foundation.codec import decode, digest, encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import ManifestRefused
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.formats import FACTS
from rankship_pipeline.foundation.records import Artifact, Build, Verified
from rankship_pipeline.foundation.store import Entry, Store
from rankship_pipeline.foundation.toolchain import find_version, hash_code
from rankship_pipeline.recipe.export_choices import ParityChoice
from rankship_targets.client.agent_file import find_agent
from rankship_targets.session.manifest import read_manifest, sign_artifact
from rankship_targets.session.runner import HostRunner

_RECORD = "verified.json"


def verify_build(
    build: Build, store: Store, runner: Runner, runner_sha256: str, limits: ParityChoice, steps: Steps, *, fresh: bool
) -> tuple[Verified, ...]:
    """Verify every file, in the build's order, heads last; ParityFailed at the first that fails.

    Unless `fresh`, an earlier proof by the same runner, runtime and limits is taken from the store, if this user
    signed it for this file. Files that pass are signed.
    """
    verified = []
    for artifact in build.files:
        made_from: dict[str, object] = {
            "artifact": artifact.sha256,
            "file": artifact.file,
            "limits": digest(limits),
            "runtime": find_version(FACTS[artifact.key.format].runtime_distribution),
            "runner": runner_sha256,
            "code": hash_code(),
        }
        path, proofs = find_proofs(artifact, store)
        refuse_changed(artifact, path)
        entry = store.find("verified", made_from)
        proof = None if fresh or entry is None else _read_signed(entry, path)
        if proof is None:
            with steps.step(f"verify {artifact.key.title}"):
                proof = verify_proofs(artifact, path, proofs, runner, limits)
            if entry is not None and _read_proof(entry) != proof:
                store.discard(entry)
            _keep(store, made_from, proof)
            sign_artifact(path, proof, artifact.recipe_sha256)
        verified.append(proof)
    return tuple(verified)


def verify_on_host(
    build: Build, store: Store, limits: ParityChoice, steps: Steps, *, fresh: bool = False
) -> tuple[Verified, ...]:
    """Verify every artifact by the agent in fresh processes on this machine, the same way as it is timed."""
    return verify_build(build, store, HostRunner(), hash_file(find_agent()), limits, steps, fresh=fresh)


def _read_signed(entry: Entry, artifact: Path) -> Verified | None:
    """Read a kept proof; None if this user did not sign it."""
    proof = _read_proof(entry)
    try:
        return proof if read_manifest(artifact).verified == proof else None
    except ManifestRefused:
        return None


def _read_proof(entry: Entry) -> Verified:
    return decode(Verified, entry.read(_RECORD).read_bytes(), where=str(entry.folder))


def _keep(store: Store, made_from: dict[str, object], proof: Verified) -> None:
    def make(target: Path) -> None:
        (target / _RECORD).write_text(encode(proof), encoding="utf-8")

    store.produce("verified", made_from, make)


def find_inputs(artifacts: Sequence[Artifact], store: Store) -> list[Path]:
    """Return the files of the parity inputs, which are also the inputs of the measurement."""
    return find_proof(artifacts[0], store)[1]
