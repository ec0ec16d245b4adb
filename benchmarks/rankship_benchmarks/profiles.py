"""Where an inference's time goes, operator by operator: a pass of its own once a run is measured, kept beside it.

A profiler slows what it looks at. So nothing here is a latency, nothing of it enters a trial or a verdict, and every
place that shows it says "profiled".
"""

from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from rankship_benchmarks.gate import find_inputs
from rankship_benchmarks.results import open_bundle
from rankship_pipeline.codec import decode, encode
from rankship_pipeline.errors import Lacks, TargetError
from rankship_pipeline.files import write_atomic
from rankship_pipeline.progress import Steps
from rankship_pipeline.records import FORMATS, Artifact, Format, Variant, Verified, record
from rankship_pipeline.store import Store
from rankship_targets.device import Device
from rankship_targets.events import OperatorTime, Profiled
from rankship_targets.session import MeasureRequest, Session, open_session

RUNS = 20  # profiled inferences of each artifact
_FILE = "profiles.json"


@record
class Profile:
    """One artifact's operators in running order, profiled on a run's device; `inference_ns` includes the profiler."""

    variant: Variant
    format: Format
    artifact_sha256: str
    threads: int
    operators: tuple[OperatorTime, ...]
    inference_ns: tuple[int, ...]

    @property
    def told_ns(self) -> float:
        """What the operators' medians add up to."""
        return sum(median(one.ns) for one in self.operators)

    @property
    def middle_ns(self) -> float:
        """The median of whole inferences under the profiler."""
        return median(self.inference_ns)


@record
class Profiles:
    """Every profile of a run, and why a format has none."""

    taken_utc: str
    profiles: tuple[Profile, ...]
    missing: dict[Format, str]


def profile_run(folder: Path, store: Store, device: Device, threads: int, steps: Steps) -> None:
    """Profile what a run has measured, once; where the device cannot be reached the run stays without profiles."""
    if (folder / _FILE).exists():
        return
    header = open_bundle(folder).header
    profiles: list[Profile] = []
    missing: dict[Format, str] = {}
    try:
        with open_session(device, tell=steps.note) as session, steps.step(f"profile on {device.name}"):
            for artifact, proof in zip(header.build.artifacts, header.verified, strict=False):
                if artifact.format in missing:
                    continue
                try:
                    profiles.append(_profile(session, artifact, proof, store, threads))
                except Lacks as lacking:
                    missing[artifact.format] = str(lacking)
    except TargetError as failure:  # what was measured stays measured
        steps.note(f"{device.name} was not profiled: {failure}")
        return
    taken = datetime.now(UTC).isoformat(timespec="seconds")
    ordered = sorted(profiles, key=lambda one: FORMATS.index(one.format))  # dense before compressed, as it was
    found = Profiles(taken_utc=taken, profiles=tuple(ordered), missing=missing)
    write_atomic(folder / _FILE, encode(found).encode())


def read_profiles(folder: Path) -> Profiles | None:
    """A run's profiles; None where none were taken."""
    with suppress(FileNotFoundError):
        return decode(Profiles, (folder / _FILE).read_bytes(), where=str(folder / _FILE))
    return None


def _profile(session: Session, artifact: Artifact, proof: Verified, store: Store, threads: int) -> Profile:
    request = MeasureRequest(
        round=0,
        variant=artifact.variant,
        format=artifact.format,
        artifact=session.push(store.root / artifact.file, proof),
        artifact_sha256=artifact.sha256,
        inputs=tuple(session.push_file(path) for path in find_inputs((artifact,), store)),
        threads=threads,
        min_samples=RUNS,
        min_duration_ms=0,
        max_warmup_ms=0,
    )
    found: Profiled = session.profile(request, RUNS)
    return Profile(
        variant=artifact.variant,
        format=artifact.format,
        artifact_sha256=artifact.sha256,
        threads=threads,
        operators=found.operators,
        inference_ns=found.inference_ns,
    )
