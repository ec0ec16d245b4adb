"""Counts the instructions of a model on a virtual Cortex-A72: repeatable, but not the time of any board.

The machine models no caches and no memory bandwidth, and each step is one instruction. Counts show whether a change
made a model cheaper or dearer to compute, but not how long a Raspberry Pi takes.
"""

from collections.abc import Sequence
from pathlib import Path

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.records import Verified
from rankship_targets.session.session import open_session
from rankship_targets.trials.request import MeasureRequest
from rankship_targets.twin.machine import Machine

SAMPLES = 15
# By the machine's own clock. Following the measurement starts a second interpreter, which takes half a second and
# shares the one core until then.
_WARM_UP_MS, _SAMPLED_MS = 200, 1000


@record
class Instructions:
    """The instructions of one artifact: `per_inference` is the least of `samples`, `loading` is for opening the file.

    The clock counts every process on the one core, so another process can only add to a sample. There are as many
    samples as requested, or more if these took less than a second of the machine's clock.
    """

    artifact_sha256: str
    runtime: str
    runtime_version: str
    loading: int
    first_inference: int
    per_inference: int
    samples: tuple[int, ...]


def count_instructions(
    machine: Machine, artifact: Path, verified: Verified, inputs: Sequence[Path], *, samples: int = SAMPLES
) -> Instructions:
    """Count a verified artifact's instructions per inference of the first sample, on one core, in a fresh process."""
    if not machine.icount:
        message = f"{machine.device.name} measures time, not instructions"
        raise InputError(message, hint="start the machine with boot(icount=True)")
    with open_session(machine.device) as session:
        request = MeasureRequest(
            round=0,
            key=verified.key,
            artifact=session.push(artifact, verified),
            artifact_sha256=verified.artifact_sha256,
            inputs=tuple(session.push_file(path) for path in inputs),
            threads=1,
            min_samples=samples,
            min_duration_ms=_SAMPLED_MS,
            max_warmup_ms=_WARM_UP_MS,
        )
        trial = session.measure(request)
    return Instructions(
        artifact_sha256=verified.artifact_sha256,
        runtime=trial.runtime.name,
        runtime_version=trial.runtime.version,
        loading=trial.load_ns,
        first_inference=trial.warmup_ns[0],
        per_inference=min(trial.samples_ns),
        samples=trial.samples_ns,
    )
