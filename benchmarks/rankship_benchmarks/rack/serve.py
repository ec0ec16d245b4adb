"""The two programs of a rack: its scheduler, and on each host the workers that offer its devices, one for each.

Of Dask come connections, calls, and who is there. What Dask does with long tasks does not suit a rack: one whose worker
dies is given to another, four times, so that one bad errand takes four devices down; one whose sender is gone goes on
and keeps its worker. So errands are no tasks of Dask's (host.py). Its tasks are short calls, bound to a device's worker
by a resource, and repeated by their sender alone. Dask's pages over HTTP stay on this machine.
"""

import asyncio
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from rankship_benchmarks.rack.calls import CALLS, HOSTS, name_resource, silence_dask
from rankship_benchmarks.rack.host import Host
from rankship_benchmarks.rack.keys import Way
from rankship_pipeline.foundation.errors import InputError

_PAUSE_S = 2.0
_DAY_S = 86_400.0
_NO_PAGES = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}
News = Callable[[str], None]


def serve_scheduler(way: Way, on_news: News) -> None:
    """Serve a rack's scheduler until this process is asked to end; InputError if the address cannot be had."""
    _run(_serve_scheduler(way, on_news))


def serve_devices(way: Way, host: Host, folder: Path, on_news: News) -> None:
    """Offer a host's devices until this process is asked to end; `folder` is Dask's own.

    A scheduler that is not there, or not any more, is waited for. Asked to end, it lets trials that run end first;
    asked again, it ends at once.
    """
    HOSTS.update(dict.fromkeys(host.devices, host))
    host.sweep()
    _run(_serve_devices(way, host, folder, on_news))


def _run(service: Coroutine[Any, Any, None]) -> None:
    import dask

    silence_dask()
    with dask.config.set(
        {
            "distributed.scheduler.allowed-failures": 0,
            "distributed.scheduler.http.routes": [],
            "distributed.worker.http.routes": [],
            "distributed.worker.profile.enabled": False,
        }
    ):
        asyncio.run(service)


async def _serve_scheduler(way: Way, on_news: News) -> None:
    from distributed import Scheduler

    create: Any = Scheduler
    scheduler = create(
        host=way.host, port=way.port, protocol=way.address.split(":", maxsplit=1)[0], security=way.secure(), **_NO_PAGES
    )
    try:
        await scheduler
    except OSError as failure:
        raise InputError(f"{way.address}: {failure}", hint="name an address of this machine, and a free port") from None
    on_news(f"scheduler at {scheduler.address}")
    await _await_end()
    await scheduler.close()


async def _serve_devices(way: Way, host: Host, folder: Path, on_news: News) -> None:
    ended = asyncio.Event()
    offers = [asyncio.create_task(_offer(way, device, folder, on_news, ended)) for device in host.devices]
    sweeping = asyncio.create_task(_sweep_daily(host))
    waiting = asyncio.create_task(_await_end())
    await asyncio.wait([waiting, *offers], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    sweeping.cancel()
    ended.set()
    await asyncio.gather(*offers)  # raises a mistake in the program
    on_news("no more errands: those that run end after their trial")
    await host.stop()


async def _sweep_daily(host: Host) -> None:
    """Delete what is old, also where the same process serves for months."""
    while True:
        await asyncio.sleep(_DAY_S)
        await asyncio.to_thread(host.sweep)


async def _offer(way: Way, device: str, folder: Path, on_news: News, ended: asyncio.Event) -> None:
    """Keep a worker for one device at the scheduler; Dask's end with the connection, so another is begun."""
    from distributed import Worker

    create: Any = Worker
    at_home = None if way.keys else "127.0.0.1"
    while not ended.is_set():
        worker = create(
            way.address,
            name=device,
            nthreads=CALLS,
            resources={name_resource(device): CALLS},
            security=way.secure(),
            host=at_home,
            memory_limit=0,
            local_directory=str(folder),
            **_NO_PAGES,
        )
        try:
            if await _first(worker.start(), ended):
                on_news(f"{device}: offered to {way.address}")
                await _first(worker.finished(), ended)
                on_news(f"{device}: no longer offered")
        except ValueError:  # the name is taken, for half a minute by our own predecessor
            on_news(f"{device}: another worker offers it: waiting")
        except (OSError, RuntimeError) as failure:
            on_news(f"{device}: not offered: {failure}")
        await worker.close(timeout=_PAUSE_S)
        await _first(asyncio.sleep(_PAUSE_S), ended)


async def _first(one: Coroutine[Any, Any, Any], ended: asyncio.Event) -> bool:
    """Await a coroutine, unless the end comes first; returns whether it was done."""
    task, end = asyncio.ensure_future(one), asyncio.create_task(ended.wait())
    await asyncio.wait([task, end], return_when=asyncio.FIRST_COMPLETED)
    end.cancel()
    if task.done():
        task.result()
        return True
    task.cancel()
    return False


async def _await_end() -> None:
    """Return when this process is asked to end; the second request has its usual effect."""
    loop, asked = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked.set)
    try:
        await asked.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
