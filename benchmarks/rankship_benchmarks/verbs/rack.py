"""The verbs of a rack's hosts: `worker` and `scheduler`."""

import importlib.util
from pathlib import Path

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.flags import parse, start_parser


def worker(argv: list[str]) -> int:
    """`rankship worker --scheduler ADDRESS --devices A,B`: offer devices; `--init FOLDER`: make a rack's keys."""
    parser = start_parser(
        "worker",
        "Offer devices of this host's inventory to a rack, until interrupted. With --init: make a rack's keys.",
        "--inventory",
        "--scheduler",
        "--keys",
        epilog="Interrupted, it lets the trials that run end, and keeps what was measured for the next start.",
    )
    parser.add_argument("--devices", metavar="A,B", help="the devices to offer, separated by commas")
    parser.add_argument("--spool", type=Path, metavar="FOLDER", help="for files and unfetched runs (default: a cache)")
    parser.add_argument(
        "--init", type=Path, metavar="FOLDER", help="make a rack's keys there; where keys are, add this user to them"
    )
    arguments = parse(parser, argv)

    from rankship_benchmarks.rack.keys import find_way, make_keys
    from rankship_pipeline.foundation.console import Steps

    steps = Steps()
    if arguments.init is not None:
        made = "made" if make_keys(arguments.init) else "were there; this user's signing key is among them"
        steps.note(f"keys in {arguments.init}: {made}")
        steps.note("copy the folder to every host, readable by its user only: whoever has it can run programs there")
        return 0
    for flag in ("scheduler", "devices"):
        if getattr(arguments, flag) is None:
            raise InputError(f"--{flag} is missing", hint="rankship worker --scheduler tcp://HOST:8786 --devices A,B")
    way, names = find_way(arguments.scheduler, arguments.keys), arguments.devices.split(",")
    _need_dask()

    from rankship_benchmarks.measure.one_device import measure_build
    from rankship_benchmarks.rack.host import Host
    from rankship_benchmarks.rack.serve import serve_devices
    from rankship_pipeline.foundation.files import ensure_writable
    from rankship_targets.devices.device import THIS_MACHINE, find_device, user_folder

    devices = {name.strip(): find_device(name.strip(), arguments.inventory) for name in names}
    if THIS_MACHINE in devices:
        hint = 'give it a name of its own in the inventory: transport = "local"'
        raise InputError(f"{THIS_MACHINE} is every host's name for itself", hint=hint)
    spool = (arguments.spool or user_folder("XDG_CACHE_HOME", ".cache") / "rankship" / "rack").resolve()
    ensure_writable(spool, "--spool")
    host = Host(devices, spool, way.read_signers(), measure_build, on_news=steps.note)
    serve_devices(way, host, spool / "dask", steps.note)
    return 0


def scheduler(argv: list[str]) -> int:
    """`rankship scheduler ADDRESS`: serve a rack's scheduler until interrupted."""
    parser = start_parser("scheduler", "Serve the scheduler that joins a rack's hosts, until interrupted.", "--keys")
    parser.add_argument("address", nargs="?", default="tcp://127.0.0.1:8786", help="default: %(default)s")
    arguments = parse(parser, argv)

    from rankship_benchmarks.rack.keys import find_way

    way = find_way(arguments.address, arguments.keys)
    _need_dask()

    from rankship_benchmarks.rack.serve import serve_scheduler
    from rankship_pipeline.foundation.console import Steps

    serve_scheduler(way, Steps().note)
    return 0


def _need_dask() -> None:
    if importlib.util.find_spec("distributed") is None:
        raise InputError("Dask is not installed", hint="pip install 'rankship[dask]'")
