"""A fleet over several machines: Dask runs each job on the worker whose machine has the device; our schedule decides.

Each machine offers its devices as resources, one of each, to a shared scheduler:

    DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=0 dask scheduler
    dask worker tcp://HOST:8786 --nthreads 4 --resources "pi4=1 pixel6=1"

Two of Dask's defaults do not suit a fleet. A worker runs as many tasks at once as it has threads: only a resource
limits a device to one job. And a task whose worker dies is given to another, four times, so that one bad job takes
four devices down: `allowed-failures` must be 0, otherwise connect() raises.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from rankship_benchmarks.fleet.schedule import Job, Schedule
from rankship_benchmarks.fleet.threads import Ended, list_ended
from rankship_pipeline.foundation.errors import ConnectionLost, InputError, RankshipError, TargetError

if TYPE_CHECKING:
    from distributed import Client

Result = TypeVar("Result")
_LOOK_S = 5.0


def connect(address: str) -> "Client":
    """Connect to a Dask scheduler; InputError if none answers, or it would repeat jobs by itself."""
    import distributed

    start: Any = distributed.Client
    try:
        client = start(address, timeout=10, set_as_default=False)
    except OSError as failure:
        raise InputError(f"no Dask scheduler at {address}: {failure}", hint="start one: dask scheduler") from None
    allowed = client.run_on_scheduler(_read_allowed_failures)
    if allowed != 0:
        client.close()
        hint = "start it with DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=0 in its environment"
        raise InputError(f"the scheduler at {address} repeats a lost job {allowed} times by itself", hint=hint)
    return cast("Client", client)


def run_over_machines(
    client: "Client", jobs: Sequence[Job], work: Callable[[str, str], Result], *, look_s: float = _LOOK_S
) -> Mapping[str, Ended[Result]]:
    """Do every job by `work(device, job's name)` on the worker that offers the device; returns the result of each.

    A device whose worker is gone is given up: its jobs go to a twin on another machine or fail with that reason.
    """
    from distributed import wait

    logging.getLogger("distributed.scheduler").setLevel(logging.ERROR)  # we report what it warns of
    state: _State[Result] = _State(jobs)
    while not state.schedule.finished:
        offered = _list_offered(client)
        state.drop_vanished(offered)
        for device, job in state.hand_out(offered):
            options = {"resources": {device: 1}, "retries": 0, "pure": False}
            state.going[client.submit(work, device, job.name, **options)] = (device, job)
        with client.as_current():
            ended = _await_some(wait, state.going, look_s)
        for future in ended:
            state.collect(future)
    return list_ended(jobs, state.schedule, state.results, state.errors)


class _State(Generic[Result]):
    """The state of the jobs; `going` maps Dask's futures to the device and the job."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.devices = tuple(dict.fromkeys(device for job in jobs for device in job.devices))
        self.schedule = Schedule(jobs, self.devices)
        self.results: dict[str, Result] = {}
        self.errors: dict[str, RankshipError] = {}
        self.going: dict[Any, tuple[str, Job]] = {}

    def drop_vanished(self, offered: set[str]) -> None:
        """Take back the jobs of machines that left, for which Dask would wait for ever."""
        for future, (device, _) in list(self.going.items()):
            if device not in offered and not future.done():
                future.cancel()
                self._lose(future, ConnectionLost("its machine left the fleet", hint=_HINT))

    def hand_out(self, offered: set[str]) -> Iterator[tuple[str, Job]]:
        """Yield each free device with its next job; give up a device that no machine offers."""
        for device in self.devices:
            if device not in offered and device not in self.schedule.running:
                self.schedule.give_up(device, "no machine offers it")
            elif (job := self.schedule.take(device)) is not None:
                yield device, job

    def collect(self, future: Any) -> None:  # noqa: ANN401 - Dask's future
        """Record how a job ended."""
        device, job = self.going[future]
        failure = future.exception()
        if failure is None:
            del self.going[future]
            self.results[job.name] = future.result()
            self.schedule.finish(device)
        elif isinstance(failure, RankshipError) and not isinstance(failure, TargetError):
            del self.going[future]
            self.errors[job.name] = failure
            self.schedule.fail(device, str(failure))
        else:
            self._lose(future, _explain(failure))

    def _lose(self, future: Any, failure: TargetError) -> None:  # noqa: ANN401 - Dask's future
        device, job = self.going.pop(future)
        self.errors[job.name] = failure
        reason = f"{type(failure).__name__}: {failure}"
        self.schedule.lose(device, reason)
        self.schedule.give_up(device, reason)


_HINT = "check that its `dask worker` is running and offers the device as a resource"


def _read_allowed_failures(dask_scheduler: Any) -> int:  # noqa: ANN401 - Dask passes its scheduler by this name
    return int(dask_scheduler.allowed_failures)


def _list_offered(client: "Client") -> set[str]:
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return {name for worker in workers for name, count in worker["resources"].items() if count > 0}


def _await_some(wait: Callable[..., Any], going: Mapping[Any, object], look_s: float) -> set[Any]:
    """Wait until a job ends, at most `look_s` seconds, after which the machines are checked again."""
    if not going:
        return set()
    try:
        done: set[Any] = wait(list(going), timeout=look_s, return_when="FIRST_COMPLETED").done
    except TimeoutError:
        return set()
    return done


def _explain(failure: BaseException) -> TargetError:
    """Turn Dask's error for a lost worker into a TargetError; any other error is raised as it is."""
    from distributed import CancelledError
    from distributed.scheduler import KilledWorker

    if isinstance(failure, TargetError):
        return failure
    if isinstance(failure, KilledWorker | CancelledError):
        return ConnectionLost("its machine's worker died", hint=_HINT)
    raise failure
