"""Time per operator of an inference: a separate pass after a run is measured, kept in the run's folder.

Profiling slows inference. So nothing here is a latency or part of a trial or a verdict, and every place that shows it
says "profiled".
"""

from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import Lacks, TargetError
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.frozen import record
from rankship_targets.session.session import Session
from rankship_targets.trials.events import OperatorTime, Profiled
from rankship_targets.trials.request import MeasureRequest

RUNS = 20  # profiled inferences of each artifact
_FILE = "profiles.json"


@record
class Profile:
    """One artifact's operators in running order, profiled on a run's device; `inference_ns` includes profiling."""

    key: ArtifactKey
    artifact_sha256: str
    threads: int
    operators: tuple[OperatorTime, ...]
    inference_ns: tuple[int, ...]

    @property
    def operators_ns(self) -> float:
        """The sum of the operators' median times."""
        return sum(median(one.ns) for one in self.operators)

    @property
    def middle_ns(self) -> float:
        """The median of whole inferences under the profiler."""
        return median(self.inference_ns)


@record
class Profiles:
    """Every profile of a run; `missing` says why a format has none."""

    taken_utc: str
    profiles: tuple[Profile, ...]
    missing: dict[Format, str]


def profile_run(folder: Path, requests: Sequence[MeasureRequest], session: Session, steps: Steps) -> None:
    """Profile pushed artifacts once; if that fails, the run stays without profiles."""
    if (folder / _FILE).exists():
        return
    profiles: list[Profile] = []
    missing: dict[Format, str] = {}
    with steps.step(f"profile on {session.device.name}"):
        for request in sorted(requests, key=lambda one: one.key.order):
            if request.key.format in missing:
                continue
            try:
                profiles.append(_keep(request, session.profile(request, RUNS)))
            except Lacks as lacking:
                missing[request.key.format] = str(lacking)
            except TargetError as failure:
                steps.note(f"{session.device.name} was not profiled: {failure}")
                return
    taken = datetime.now(UTC).isoformat(timespec="seconds")
    found = Profiles(taken_utc=taken, profiles=tuple(profiles), missing=missing)
    write_atomic(folder / _FILE, encode(found).encode())


def read_profiles(folder: Path) -> Profiles | None:
    """Read a run's profiles; None if none were taken."""
    with suppress(FileNotFoundError):
        return decode(Profiles, (folder / _FILE).read_bytes(), where=str(folder / _FILE))
    return None


def _keep(request: MeasureRequest, found: Profiled) -> Profile:
    return Profile(
        key=request.key,
        artifact_sha256=request.artifact_sha256,
        threads=request.threads,
        operators=found.operators,
        inference_ns=found.inference_ns,
    )
