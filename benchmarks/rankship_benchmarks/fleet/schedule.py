"""The schedule of a fleet: which device does which job next; without threads or clocks, to be tested in virtual time.

Every job ends with exactly one outcome. A job whose device is lost goes back to the front: to a twin, or it waits.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.frozen import record

MOST_LOSSES = 3


@record
class Job:
    """One piece of work and the devices that may do it: equivalent twins.

    With a `home`, the others stand in only while that device is lost; without one, any free device takes it.
    """

    name: str
    devices: tuple[str, ...]
    home: str | None = None


@record
class Outcome:
    """How a job ended: done by `device`, or failed (`failure` says why); `losses` are the devices lost on the way."""

    job: Job
    device: str | None
    failure: str | None
    losses: tuple[str, ...]


class Schedule:
    """Waiting jobs, running jobs and lost devices; not thread-safe, so the caller locks it."""

    def __init__(self, jobs: Iterable[Job], devices: Iterable[str]) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self._waiting: dict[tuple[tuple[str, ...], str | None], deque[Job]] = {}
        self._running: dict[str, Job] = {}
        self._lost: set[str] = set()
        self._gone: dict[str, str] = {}
        self._losses: dict[str, list[str]] = {}
        self._devices = tuple(dict.fromkeys(devices))
        names: Counter[str] = Counter()
        for job in jobs:
            names[job.name] += 1
            if names[job.name] > 1 or not set(job.devices) <= set(self._devices) or not job.devices:
                raise ValueError(f"job {job.name}: its name occurs twice, or it names an unknown device")
            self._waiting.setdefault((job.devices, job.home), deque()).append(job)
        self._count = len(names)
        # A device first takes jobs that few others may do: they would otherwise be left over at the end.
        ranked = sorted(self._waiting, key=lambda key: (len(key[0]), key[0], key[1] or ""))
        self._queues = {device: [self._waiting[key] for key in ranked if device in key[0]] for device in self._devices}

    @property
    def finished(self) -> bool:
        """Whether every job has an outcome."""
        return len(self.outcomes) == self._count

    @property
    def running(self) -> dict[str, Job]:
        """The job that each busy device does."""
        return dict(self._running)

    def take(self, device: str) -> Job | None:
        """Return a free device's next job, which it then runs; None if no waiting job is for it now."""
        if device in self._running or device in self._lost or device in self._gone:
            return None
        for queue in self._queues[device]:
            if queue and self._may_take(device, queue[0]):
                self._running[device] = queue.popleft()
                return self._running[device]
        return None

    def finish(self, device: str) -> None:
        """Record that a device did its job."""
        self._end(self._running.pop(device), device, None)

    def fail(self, device: str, reason: str) -> None:
        """Record that a job failed for a reason of its own; the device is free again."""
        self._end(self._running.pop(device), device, reason)

    def lose(self, device: str, reason: str) -> None:
        """Record that a device is lost; its job goes back, unless it has lost too many devices already."""
        job = self._running.pop(device)
        self._lost.add(device)
        losses = self._losses.setdefault(job.name, [])
        losses.append(f"{device}: {reason}")
        if len(losses) >= MOST_LOSSES or all(one in self._gone for one in job.devices):
            self._end(job, None, losses[-1])
        else:
            self._waiting[job.devices, job.home].appendleft(job)

    def restore(self, device: str) -> None:
        """Record that a lost device is back."""
        self._lost.discard(device)

    def give_up(self, device: str, reason: str) -> None:
        """Record that a device will not come back; jobs that only such devices could do fail with their reasons."""
        self._lost.discard(device)
        self._gone[device] = reason
        for (devices, _), queue in self._waiting.items():
            if device in devices and all(one in self._gone for one in devices):
                while queue:
                    self._end(queue.popleft(), None, "; ".join(f"{one}: {self._gone[one]}" for one in devices))

    def _may_take(self, device: str, job: Job) -> bool:
        return job.home in {None, device} or job.home in self._lost or job.home in self._gone

    def _end(self, job: Job, device: str | None, failure: str | None) -> None:
        losses = tuple(self._losses.pop(job.name, ()))
        self.outcomes[job.name] = Outcome(job=job, device=device, failure=failure, losses=losses)


def list_devices(jobs: Sequence[Job]) -> tuple[str, ...]:
    """Return every device that a job names, twins too, once."""
    return tuple(dict.fromkeys(device for job in jobs for device in job.devices))


def read_jobs(text: str) -> tuple[Job, ...]:
    """Read `--on`: a job per device, separated by commas; after slashes, the twins that stand in while it is lost."""
    jobs: dict[str, Job] = {}
    for part in text.split(","):
        names = tuple(dict.fromkeys(name.strip() for name in part.split("/")))
        if jobs.setdefault(names[0], Job(name=names[0], devices=names, home=names[0])).devices != names:
            hint = "name it once: DEVICE, or DEVICE/TWIN"
            raise InputError(f"{names[0]} is in --on twice, with different twins", hint=hint)
    return tuple(jobs.values())
