"""A rack seen from home: errands go to the hosts that hold the devices, and each bundle comes home exactly once.

A host, the network or the scheduler may be lost at any moment. The errand is then sent again under its ticket to the
same device, whose host goes on with it, or has it done. Only the sender writes to the results folder.
"""

import asyncio
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rankship_benchmarks.bundle.bundle import open_bundle
from rankship_benchmarks.measure.cases import list_cases
from rankship_benchmarks.measure.run_plan import RunPlan
from rankship_benchmarks.rack import calls
from rankship_benchmarks.rack.content import PART_BYTES
from rankship_benchmarks.rack.errand import Errand, describe_maker, write_errand
from rankship_benchmarks.rack.host import Answer
from rankship_benchmarks.rack.keys import Way
from rankship_benchmarks.rack.tickets import return_ticket, take_ticket
from rankship_pipeline.foundation.artifact_key import Delegate
from rankship_pipeline.foundation.codec import digest, encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import ConnectionLost, InputError, TargetError, Unreachable
from rankship_pipeline.foundation.files import publish_folder
from rankship_pipeline.foundation.formats import Format

if TYPE_CHECKING:
    from distributed import Client

PATIENCE_S = (
    150.0  # for a host or a scheduler that was there: a network cut for a minute is found after half of one more
)
_CHECK_PATIENCE_S = 15.0
_LOOK_S = 15.0  # longer than a call stays (host.WAIT_S): who waits for long looks whether the device is there
_PAUSE_S = 1.0
_BEGINNINGS = 5  # of an errand whose host was started anew meanwhile
_DEATHS = 3  # of a host's process over one call
_BRINGS = 3  # of files that the host lacks again
_HINT = "check that `rankship worker` runs on its host and offers it"


@contextmanager
def open_rack(way: Way, *, patience_s: float = PATIENCE_S, look_s: float = _LOOK_S) -> Iterator["Rack"]:
    """Connect to a rack's scheduler; InputError if none answers, or it would repeat errands by itself."""
    rack = Rack(way, patience_s, look_s)
    try:
        rack.connect()
    except OSError as failure:
        message = f"no scheduler of a rack at {way.address}: {failure}"
        hint = "start one there: `rankship scheduler`; both ends need the same keys, or none"
        raise InputError(message, hint=hint) from None
    try:
        yield rack
    finally:
        rack.close()


@dataclass
class _Progress:
    """Shows the parts of an errand as its host tells of them."""

    steps: Steps
    advance: Callable[[str], None]
    number: int = 0

    def show(self, answer: Answer) -> None:
        """Show what is done now, unless that was shown."""
        for _ in range(answer.number - self.number):
            self.advance(answer.part)
        self.number = answer.number


class Rack:
    """The devices of a rack's hosts; a Lab. Its methods may be called from a thread for each device."""

    def __init__(self, way: Way, patience_s: float, look_s: float) -> None:
        self._way = way
        self._patience_s = patience_s
        self._look_s = look_s
        self._client: Client | None = None
        self._connecting = threading.Lock()
        self._writing = threading.Lock()
        self._written: tuple[RunPlan, Errand] | None = None
        self._bringing: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # by host
        self._sender = secrets.token_hex(8)

    def check(
        self, device: str, wanted: Mapping[Format, Collection[Delegate]], steps: Steps, *, with_energy: bool
    ) -> None:
        """Let a device's host check that it answers and can run what will be pushed."""
        with steps.step(f"check that {device} is ready"):
            arguments = (encode(describe_maker()), {name: tuple(some) for name, some in wanted.items()}, with_energy)
            self._call(device, calls.check, *arguments, patience_s=_CHECK_PATIENCE_S)

    def measure(self, plan: RunPlan, device: str, steps: Steps) -> Path:
        """Send a build to a device's host, let it be measured there, and bring its bundle home."""
        errand = self._write(plan)
        errand_sha256 = digest(errand)
        ticket = take_ticket(plan.results, device, plan.build.recipe, errand_sha256)
        with steps.track(f"measure on {device}", _count_parts(plan)) as advance:
            answer = self._ask(device, ticket.name, errand, plan, _Progress(steps, advance))
        folder = land(plan, device, answer)
        return_ticket(plan.results, device, errand_sha256)
        with suppress(TargetError):  # a week later its host forgets it by itself
            self._call(device, calls.forget, ticket.name, patience_s=_CHECK_PATIENCE_S)
        return folder

    def connect(self) -> "Client":
        """Return the connection to the scheduler, a new one if the last was lost; OSError if there is none."""
        import distributed

        with self._connecting:
            if self._client is not None and self._client.status == "running":
                return self._client
            self.close()
            calls.silence_dask()
            start: Any = distributed.Client
            client = start(self._way.address, timeout=10, set_as_default=False, security=self._way.secure())
            allowed = client.run_on_scheduler(calls.read_allowed_failures)
            if allowed != 0:
                client.close()
                message = f"the scheduler at {self._way.address} repeats a lost errand {allowed} times by itself"
                raise InputError(message, hint="start it with `rankship scheduler`")
            self._client = client
            return client  # type: ignore[no-any-return]

    def close(self) -> None:
        """Close the connection."""
        client, self._client = self._client, None
        if client is not None:
            with suppress(Exception):  # whatever it was, the connection is gone
                client.close(timeout=1)  # type: ignore[no-untyped-call]

    def _write(self, plan: RunPlan) -> Errand:
        """Describe a plan, once for all devices: this reads every file."""
        with self._writing:
            if self._written is None or self._written[0] is not plan:
                self._written = plan, write_errand(plan)
            return self._written[1]

    def _ask(self, device: str, ticket: str, errand: Errand, plan: RunPlan, progress: "_Progress") -> Answer:
        """Send an errand and follow it to its end, bringing the files that its host lacks."""
        text, begun, brought, known = encode(errand), 0, 0, False
        while begun < _BEGINNINGS and brought < _BRINGS:
            answer: Answer
            if known:
                answer = self._call(device, calls.follow, ticket)
            else:
                answer = self._call(device, calls.carry_out, ticket, text)
            progress.show(answer)
            if answer.files:
                return answer
            begun += known and answer.unknown  # its host was started anew
            known = not (answer.unknown or answer.missing)
            if answer.missing:
                brought += 1
                with self._bringing[answer.host]:  # another device of the same host may have been faster
                    lacking = self._call(device, calls.list_missing, answer.missing)
                    self._bring(device, errand, plan, lacking, progress.steps)
        if brought == _BRINGS:
            raise TargetError(f"{answer.host} loses the files that it is sent", hint="check the spool of its worker")
        message = f"the process on the host of {device} ended {begun} times over this errand"
        raise ConnectionLost(message, hint="look at what `rankship worker` says there")

    def _bring(self, device: str, errand: Errand, plan: RunPlan, lacking: Collection[str], steps: Steps) -> None:
        paths = {sha256: plan.store.root / name for name, sha256 in errand.files.items() if sha256 in set(lacking)}
        sizes = {sha256: path.stat().st_size for sha256, path in paths.items()}
        sent = 0
        with steps.transfer(f"files to the host of {device}") as on_progress:
            for sha256, path in paths.items():
                with path.open("rb") as stream:
                    for offset in range(0, max(1, sizes[sha256]), PART_BYTES):
                        data = stream.read(PART_BYTES)
                        part = (sha256, self._sender, offset, data, sizes[sha256])
                        self._call(device, calls.add_part, *part)
                        sent += len(data)
                        on_progress(sent, sum(sizes.values()))

    def _call(
        self,
        device: str,
        function: Callable[..., Any],
        *arguments: object,
        patience_s: float | None = None,
    ) -> Any:  # noqa: ANN401 - what the function returns
        """Call a function on a device's host, again if the way there was lost meanwhile: each may be repeated.

        Unreachable if no host offers the device, or no scheduler answers, for `patience_s`.
        """
        limit_s, away_since, deaths = patience_s or self._patience_s, None, 0
        call: _Call | None = None
        while True:
            try:
                client = self.connect()
                if call is None:
                    options = {"resources": {calls.name_resource(device): 1}, "retries": 0, "pure": False}
                    call = _Call(client, client.submit(function, device, *arguments, **options))
                try:
                    return client.sync(call.wait, callback_timeout=self._look_s)  # type: ignore[no-untyped-call]
                except TimeoutError:
                    offered = bool(_look(client, calls.is_offered, device))
            except Exception as failure:
                if not _is_loss(failure):
                    raise
                offered, call = False, None
                deaths += _is_death(failure)
                if deaths >= _DEATHS:
                    message = f"the process on the host of {device} died {deaths} times over this errand"
                    raise ConnectionLost(message, hint="look at what `rankship worker` says there") from None
                time.sleep(_PAUSE_S)
            away_since = None if offered else away_since or time.monotonic()
            if away_since is not None and time.monotonic() - away_since > limit_s:
                self._give_up(device, call)

    def _give_up(self, device: str, call: "_Call | None") -> None:
        """Raise Unreachable, with the devices that are there."""
        try:
            known = ", ".join(_look(self.connect(), calls.list_offered)) or "none"
        except Exception as failure:
            if not _is_loss(failure):
                raise
            message = f"the rack's scheduler at {self._way.address} cannot be reached any more"
            raise Unreachable(message, hint="start it again: nothing is lost, the same command goes on") from None
        if call is not None:
            call.future.cancel()
        raise Unreachable(f"no host of the rack offers {device}", hint=f"{_HINT}; offered now: {known}")


class _Call:
    """A task of Dask's whose result is waited for in turns.

    Dask gathers results for all threads in one request, which a thread whose time is up would cancel for all others.
    """

    def __init__(self, client: "Client", future: Any) -> None:  # noqa: ANN401 - Dask's future
        self.future = future
        self._client = client
        self._gathering: asyncio.Future[Any] | None = None

    async def wait(self) -> Any:  # noqa: ANN401 - what the task returns
        """Return the task's result, or raise its error; may be given up and called again."""
        if self._gathering is None:
            gather: Any = self._client.gather
            self._gathering = asyncio.ensure_future(gather(self.future, asynchronous=True))
            self._gathering.add_done_callback(lambda one: one.cancelled() or one.exception())  # seen, if nobody waits
        try:
            return await asyncio.shield(self._gathering)
        except asyncio.CancelledError:
            if self._gathering.cancelled():  # by Dask, as the connection was lost
                raise ConnectionError from None
            raise


def land(plan: RunPlan, device: str, answer: Answer) -> Path:
    """Publish a run's folder; one that is here already stays. TargetError if it is not the run that was asked for."""
    with TemporaryDirectory(dir=plan.results, prefix=".errand-", suffix=".tmp") as folder:
        arrived = Path(folder)
        for name, data in answer.files.items():
            (arrived / Path(name).name).write_bytes(data)
        bundle = open_bundle(arrived)
        header = bundle.header
        asked = (header.device, header.build_sha256) == (device, digest(plan.build))
        if not asked or not bundle.finished or Path(header.run_id).name != header.run_id:
            message = f"{answer.host} sent {header.run_id} of {header.device}, which was not asked for"
            raise TargetError(message, hint="run the same release on every host of the rack")
        with publish_folder(plan.results / header.run_id) as private:
            for path in arrived.iterdir():
                path.rename(private / path.name)
    return plan.results / header.run_id


def _count_parts(plan: RunPlan) -> int:
    timed = len(list_cases(plan.build.artifacts, plan.suite)) + (plan.canary is not None)
    return timed * (plan.suite.rounds + (plan.suite.energy.rounds if plan.suite.energy else 0))


def _look(client: "Client", function: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401 - what it returns
    """Call a function in the scheduler."""
    return client.run_on_scheduler(function, *arguments)  # type: ignore[no-untyped-call]


def _is_death(failure: Exception) -> bool:
    from distributed.scheduler import KilledWorker

    return isinstance(failure, KilledWorker)


def _is_loss(failure: Exception) -> bool:
    """Whether the way to a host was lost, which Dask says in several ways."""
    from distributed import CancelledError
    from distributed.client import ClosedClientError

    return isinstance(failure, OSError | CancelledError | ClosedClientError) or _is_death(failure)
