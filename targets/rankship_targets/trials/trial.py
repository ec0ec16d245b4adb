"""The record of one measurement on a device: every raw sample and the conditions it was taken under."""

from typing import Literal

from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.frozen import record
from rankship_targets.trials.trace import PowerTrace


@record
class DeviceState:
    """A device's condition at one moment; None where the device does not report it.

    `clock_offset_ns` is the wall clock minus the monotonic one: it changes when the clock is set, and when the device
    sleeps. `throttled_bits` are the flags of a Raspberry Pi's firmware (bits 0 to 3 now, 16 to 19 since boot),
    `throttle_count` the throttling events that x86 kernels count since boot, `cooling_steps` the number of steps by
    which the kernel now slows the processors down.
    """

    governor: str | None
    frequency_khz: tuple[int, ...] | None
    temperature_mc: int | None
    load_1m_milli: int | None
    available_memory_bytes: int | None
    boot_id: str | None = None
    uptime_ms: int | None = None
    clock_offset_ns: int | None = None
    throttled_bits: int | None = None
    throttle_count: int | None = None
    cooling_steps: int | None = None
    battery_percent: int | None = None
    charging: bool | None = None


@record
class Conditions:
    """The conditions set on the device before a trial.

    `cpus` are the cores that the process could run on, None if not known. `unmet` holds a phrase for each condition
    of the inventory that could not be set: "governor performance: Permission denied".
    """

    cpus: tuple[int, ...] | None = None
    cooling_ms: int = 0
    unmet: tuple[str, ...] = ()


@record
class RuntimeReading:
    """A runtime as the agent found it on the device.

    `process` is what runs the files: the agent's own Python, or a program that it starts; in both cases started by a
    shell, not by an Android app. `binary_sha256` is the program's, or the digest of the hashes of all shared libraries
    in the Python package as its installer recorded them. `build` is what the runtime says of how it was built. None
    where nothing says it.
    """

    name: str
    version: str
    python: str
    machine: str
    kernel: str
    process: Literal["python", "program"] | None = None
    binary_sha256: str | None = None
    build: str | None = None


@record
class Span:
    """An interval of the device's monotonic clock."""

    start_ns: int
    end_ns: int

    @property
    def length_ns(self) -> int:
        """Its length."""
        return self.end_ns - self.start_ns


@record
class Trial:
    """One artifact timed once on one device, in a fresh process.

    `samples_ns` are single inferences in the order they were taken, after warm-up; `warmup_ns` are the ones before
    (the first is the cold inference). `load_ns` is opening the file to being ready; `peak_rss_bytes` is the process's
    peak resident memory after load and warm-up, `runtime_rss_bytes` the resident memory with the runtime imported
    and no model loaded. `retries` counts transient target errors met on the way. `loop` is when the samples were taken
    (None: the runner does not report it), `idle` the rests before and after the trial, if requested. `waited_ns` is how
    long in `loop` the timing thread was ready to run but waited for a processor (None: not reported).
    """

    round: int
    key: ArtifactKey
    artifact_sha256: str
    device: str
    started_utc: str
    threads: int
    load_ns: int
    warmup_ns: tuple[int, ...]
    warmed_up: bool
    samples_ns: tuple[int, ...]
    peak_rss_bytes: int | None
    runtime_rss_bytes: int | None
    runtime: RuntimeReading
    before: DeviceState
    after: DeviceState
    agent_sha256: str
    retries: int
    conditions: Conditions = Conditions()
    loop: Span | None = None
    idle: tuple[Span, ...] = ()
    waited_ns: int | None = None


@record
class MeteredTrial:
    """A trial and the power trace recorded during it; `trace_sha256` is the digest of the trace.

    Its samples are not latencies: where the device itself reads the meter, this takes time from what is measured.
    """

    trial: Trial
    trace: PowerTrace
    trace_sha256: str
