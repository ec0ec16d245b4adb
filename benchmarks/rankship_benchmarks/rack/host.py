"""A host of a rack: it holds devices, and does for each one errand after the other, in threads of its own.

An errand goes on while nobody can be reached: Dask's workers come and go with the connection to the scheduler, and the
errand is found again by its ticket. Its bundle stays here until its sender says that it is home. An errand that its
sender left is ended, between two trials, when the device gets another one.

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
from rankship_pipeline.foundation.codec import decode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError, RankshipError, TargetError
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.store import Store
from rankship_targets.devices.device import Device

Measuring = Callable[[RunPlan, Device, Steps], Path]
_KEPT_S = 7 * 24 * 3600  # an errand that nobody fetched


class LeftBehind(Exception):
    """Ends an errand whose sender is gone, between two trials."""


@dataclass(frozen=True)
class Answer:
    """What an errand brought: hashes of files that this host lacks, or the files of its bundle by name."""

    host: str
    missing: tuple[str, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass
class _Going:
    """The errand that a device does now; `ended` is awaited by whoever asks for it."""

    ticket: str
    ended: "asyncio.Future[Path]"
    stop: threading.Event


class Host:
    """Devices of one process, with a folder for their errands; `signers` are believed besides this user's own key."""

    def __init__(
        self,
        devices: Mapping[str, Device],
        spool: Path,
        signers: tuple[str, ...],
        measure: Measuring,
    ) -> None:
        self.name = f"{socket.gethostname()}:{spool}"
        self.devices = devices
        self.content = Content(spool / "content")
        self._errands = spool / "errands"
        self._signers = signers
        self._measure = measure
        self._going: dict[str, _Going] = {}

    async def carry_out(self, device: str, ticket: str, text: str, tell: Callable[[str], None]) -> Answer:
        """Do an errand, go on with it, or find it done; `tell` is called with each part of it as it begins."""
        errand = decode(Errand, text, where=f"an errand for {device}")
        refuse_other(errand.maker, self.name)
        while (before := self._going.get(device)) is not None and before.ticket != ticket:
            before.stop.set()
            await asyncio.wait([before.ended])
        going = self._going.get(device)
        if going is None:
            missing = self.content.list_missing(errand.files.values())
            if missing and self._find_done(ticket) is None:
                return Answer(host=self.name, missing=missing)
            going = self._begin(device, ticket, errand, tell)
        run = await asyncio.shield(going.ended)
        return Answer(host=self.name, files=_read_files(run))

    def check(self, device: str, maker: Maker, formats: Collection[Format], *, with_energy: bool) -> None:
        """Raise TargetError unless the device can run what will be pushed; one that is at work can."""
        refuse_other(maker, self.name)
        if device not in self._going:
            with self._naming_itself():
                steps = Steps(quiet=True)
                check_ready([self.devices[device]], tuple(formats), steps, with_energy=with_energy)

    def forget(self, ticket: str) -> None:
        """Delete an errand's folder: its bundle is home."""
        shutil.rmtree(self._locate(ticket), ignore_errors=True)

    def sweep(self) -> None:
        """Delete errands that nobody has fetched for a week, and files that none has used for a month."""
        for folder in self._errands.glob("*"):
            if time.time() - folder.stat().st_mtime > _KEPT_S:
                shutil.rmtree(folder, ignore_errors=True)
        self.content.sweep()

    async def stop(self) -> None:
        """End every errand between two trials; what is measured stays here, and the same errand goes on later."""
        for going in list(self._going.values()):
            going.stop.set()
        if ended := [going.ended for going in self._going.values()]:
            await asyncio.wait(ended)

    def _begin(self, device: str, ticket: str, errand: Errand, tell: Callable[[str], None]) -> _Going:
        """Start an errand in a thread; the device is free again when it ends."""
        loop = asyncio.get_running_loop()
        going = _Going(ticket, loop.create_future(), threading.Event())

        def listen(part: str) -> None:
            if going.stop.is_set():
                raise LeftBehind
            tell(part)

        def work() -> None:
            result: Path | BaseException
            try:
                result = self._do(device, ticket, errand, Steps(quiet=True, on_part=listen))
            except BaseException as failure:  # noqa: BLE001 - whoever awaits the errand raises it
                result = failure
            with suppress(RuntimeError):  # the process is ending: nobody waits
                loop.call_soon_threadsafe(end, result)

        def end(result: Path | BaseException) -> None:
            del self._going[device]
            if isinstance(result, BaseException):
                going.ended.set_exception(result)
                going.ended.exception()  # it counts as seen, should nobody wait
            else:
                going.ended.set_result(result)

        self._going[device] = going
        threading.Thread(target=work, name=f"errand of {device}", daemon=True).start()
        return going

    def _do(self, device: str, ticket: str, errand: Errand, steps: Steps) -> Path:
        """Measure, unless that is done already; returns the run's folder."""
        done = self._find_done(ticket)
        if done is not None:
            return done
        folder = self._locate(ticket)
        with self._naming_itself():
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
    def _naming_itself(self) -> Iterator[None]:
        """Say on which host an error happened: its hint is about files and devices there."""
        try:
            yield
        except RankshipError as failure:
            failure.hint = f"on {self.name}: {failure.hint}"
            raise
        except OSError as failure:
            raise TargetError(f"{self.name}: {failure}", hint="make room or grant access there") from None


def _read_files(run: Path) -> dict[str, bytes]:
    """Read a finished run's files; hidden ones are its writer's own."""
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name[0] != "."}
