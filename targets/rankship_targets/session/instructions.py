"""Instructions that a model costs, counted on a virtual Cortex-A72: repeatable, and no time of any board.

There are no caches, no memory bandwidth and one instruction per step: right for telling whether a change made a model
cheaper or dearer to compute, and silent on how long a Raspberry Pi takes.
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
# Of the machine's own clock. Who follows the measurement starts an interpreter beside it, which takes half a second:
# before that is over the one core is shared.
_WARM_UP_MS, _SAMPLED_MS = 200, 1000


@record
class Instructions:
    """What one artifact cost: `per_inference` is the least of `samples`, `loading` what opening the file took.

    The clock counts every process of the one core: a slice that another gets in mid-inference only adds to a sample.
    There are as many samples as were asked for, and more where they took less than a second of the machine's clock.
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
    """Count what a proven artifact costs per inference of the first sample, on one core, in a fresh process."""
    if not machine.icount:
        message = f"{machine.device.name} tells time, not instructions"
        raise InputError(message, hint="boot(icount=True) gives a machine that counts")
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
