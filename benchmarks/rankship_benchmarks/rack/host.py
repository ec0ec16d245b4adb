"""A host of a rack: it holds devices, and does for each one errand after the other, in threads of its own.

An errand goes on while nobody can be reached: Dask's workers come and go with the connection to the scheduler, and its
sender, who asks for it all the time, finds it again by its ticket. Its bundle stays here until the sender says that it
is home. An errand that nobody asks for is ended, between two trials, when the device gets another one.

<spool>/content/…            files by their SHA-256
<spool>/errands/<ticket>/    store/ and results/ of one errand
"""

import asyncio
import shutil
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from rankship_benchmarks.bundle.bundle import BUNDLE_FILE, open_bundle
from rankship_benchmarks.measure.ready import check_ready
from rankship_benchmarks.measure.run_plan import RunPlan
from rankship_benchmarks.rack.content import Content
from rankship_benchmarks.rack.errand import Errand, Maker, read_plan, refuse_other
from rankship_pipeline.foundation.artifact_key import Delegate
from rankship_pipeline.foundation.codec import decode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError, RankshipError, TargetError
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.store import Store
from rankship_targets.devices.device import Device

Measuring = Callable[[RunPlan, Device, Steps], Path]
_KEPT_S = 7 * 24 * 3600  # an errand that nobody fetched


WAIT_S = 10.0  # how long a call stays for an errand's end
ASKED_S = 60.0  # an errand that nobody has asked about for so long is nobody's any more


class LeftBehind(Exception):
    """Ends an errand whose sender is gone, between two trials."""


@dataclass(frozen=True)
class Answer:
    """How an errand is: done, with the files of its bundle by name, or not yet.

    `missing` are hashes of files that this host lacks. `unknown` errands must be sent in full. `part` is what is done
    now, the `number`-th part since it was begun.
    """

    host: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unknown: bool = False
    part: str = ""
    number: int = 0


@dataclass
class _Going:
    """An errand that a device does, or whose end nobody has heard of yet; `ended` is its run or its error."""

    ticket: str
    ended: "asyncio.Future[Path]"
    stop: threading.Event
    asked: float
    part: str = ""
    number: int = 0


class Host:
    """Devices of one process, with a folder for their errands; `signers` are believed besides this user's own key."""

    def __init__(
        self,
        devices: Mapping[str, Device],
        spool: Path,
        signers: tuple[str, ...],
        measure: Measuring,
        *,
        on_news: Callable[[str], None] = lambda _: None,
        wait_s: float = WAIT_S,
        asked_s: float = ASKED_S,
    ) -> None:
        self.name = f"{socket.gethostname()}:{spool}"
        self.devices = devices
        self.content = Content(spool / "content")
        self._errands = spool / "errands"
        self._signers = signers
        self._measure = measure
        self._on_news = on_news
        self._wait_s = wait_s
        self._asked_s = asked_s
        self._going: dict[str, _Going] = {}
        self._checking = {name: threading.Lock() for name in devices}

    async def carry_out(self, device: str, ticket: str, text: str) -> Answer:
        """Do an errand, go on with it, or find it done; another one of the device comes first unless it is nobody's."""
        errand = decode(Errand, text, where=f"an errand for {device}")
        refuse_other(errand.maker, self.name)
        before = self._going.get(device)
        if before is not None and before.ticket != ticket and not before.ended.done():
            if time.monotonic() - before.asked > self._asked_s and not before.stop.is_set():
                before.stop.set()
                self._on_news(f"{device}: nobody asks for its errand any more: it is left after its trial")
            await asyncio.wait([before.ended], timeout=self._wait_s)
            if not before.ended.done():
                return Answer(host=self.name, unknown=True, part=f"{device} is at another errand")
        before = self._going.get(device)
        if before is None or before.ended.done():
            missing = self.content.list_missing(errand.files.values())
            if missing and self._find_done(ticket) is None:
                return Answer(host=self.name, missing=missing)
            self._going[device] = self._begin(device, ticket, errand)
        return await self.follow(device, ticket)

    async def follow(self, device: str, ticket: str) -> Answer:
        """Wait a while for the end of an errand; raises its error, once."""
        going = self._going.get(device)
        if going is None or going.ticket != ticket:
            return Answer(host=self.name, unknown=True)
        going.asked = time.monotonic()
        await asyncio.wait([going.ended], timeout=self._wait_s)
        going.asked = time.monotonic()
        if not going.ended.done():
            return Answer(host=self.name, part=going.part, number=going.number)
        if self._going.get(device) is going:
            del self._going[device]
        if isinstance(going.ended.exception(), LeftBehind):
            return Answer(host=self.name, unknown=True)
        return Answer(host=self.name, files=_read_files(going.ended.result()))

    def check(
        self, device: str, maker: Maker, wanted: Mapping[Format, Collection[Delegate]], *, with_energy: bool
    ) -> None:
        """Raise TargetError unless the device can run what will be pushed; one that is at work can."""
        refuse_other(maker, self.name)
        going = self._going.get(device)
        if going is None or going.ended.done():
            with self._checking[device]:
                steps = Steps(quiet=True)
                check_ready([self.devices[device]], wanted, steps, with_energy=with_energy)

    def forget(self, ticket: str) -> None:
        """Delete an errand's folder: its bundle is home."""
        shutil.rmtree(self._locate(ticket), ignore_errors=True)

    def sweep(self) -> None:
        """Delete errands that nobody has fetched for a week, and files that none has used for a month."""
        going = {one.ticket for one in list(self._going.values())}
        for folder in self._errands.glob("*"):
            if folder.name not in going and time.time() - folder.stat().st_mtime > _KEPT_S:
                shutil.rmtree(folder, ignore_errors=True)
        self.content.sweep()

    async def stop(self) -> None:
        """End every errand between two trials; what is measured stays here, and the same errand goes on later."""
        for going in self._going.values():
            going.stop.set()
        if ended := [going.ended for going in self._going.values()]:
            await asyncio.wait(ended)

    def _begin(self, device: str, ticket: str, errand: Errand) -> _Going:
        """Start an errand in a thread."""
        loop = asyncio.get_running_loop()
        going = _Going(ticket, loop.create_future(), threading.Event(), asked=time.monotonic())

        def listen(part: str) -> None:
            if going.stop.is_set():
                raise LeftBehind
            going.part, going.number = part, going.number + 1

        def work() -> None:
            result: Path | BaseException
            try:
                result = self._do(device, ticket, errand, Steps(quiet=True, on_part=listen))
            except BaseException as failure:  # noqa: BLE001 - whoever follows the errand raises it
                result = failure
            with suppress(RuntimeError):  # the process is ending: nobody waits
                loop.call_soon_threadsafe(end, result)

        def end(result: Path | BaseException) -> None:
            self._on_news(f"{device}: {_describe_end(result)}")
            if isinstance(result, BaseException):
                going.ended.set_exception(result)
                going.ended.exception()  # it counts as seen, should nobody follow
            else:
                going.ended.set_result(result)

        self._on_news(f"{device}: measures {errand.build.recipe}")
        threading.Thread(target=work, name=f"errand of {device}", daemon=True).start()
        return going

    def _do(self, device: str, ticket: str, errand: Errand, steps: Steps) -> Path:
        """Measure, unless that is done already; returns the run's folder."""
        done = self._find_done(ticket)
        if done is not None:
            return done
        folder = self._locate(ticket)
        self.content.lay_out(errand.files, folder / "store")
        plan = read_plan(errand, Store(folder / "store"), folder / "results", self._signers)
        plan.results.mkdir(exist_ok=True)
        return self._measure(plan, self.devices[device], steps)

    def _find_done(self, ticket: str) -> Path | None:
        for path in self._locate(ticket).glob(f"results/[!.]*/{BUNDLE_FILE}"):
            if open_bundle(path.parent).finished:
                return path.parent
        return None

    def _locate(self, ticket: str) -> Path:
        if not ticket.isalnum():
            raise InputError(f"{ticket!r} is no ticket", hint="run the same release on every host of the rack")
        return self._errands / ticket

    @contextmanager
    def naming_itself(self) -> Iterator[None]:
        """Say on which host an error happened: its hint is about files and devices there."""
        try:
            yield
        except RankshipError as failure:
            failure.hint = f"on {self.name}: {failure.hint}"
            raise
        except OSError as failure:
            raise TargetError(f"{self.name}: {failure}", hint="make room or grant access there") from None


def _describe_end(result: Path | BaseException) -> str:
    if isinstance(result, LeftBehind):
        return "its errand was left for later"
    return f"{type(result).__name__}: {result}" if isinstance(result, BaseException) else f"{result.name} is done"


def _read_files(run: Path) -> dict[str, bytes]:
    """Read a finished run's files; hidden ones are its writer's own."""
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name[0] != "."}
