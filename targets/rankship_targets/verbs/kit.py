"""The command `rankship kit`; what it needs is imported when it runs."""

import argparse
from pathlib import Path

from rankship_pipeline.foundation.delegates import DELEGATES
from rankship_pipeline.foundation.errors import InputError, UnlikeConditions
from rankship_pipeline.foundation.flags import parse, parse_formats, share, start_parser
from rankship_pipeline.foundation.formats import FORMATS, Format
from rankship_targets.devices.device import Device, find_device, inventory_path

BENCHMARK_TIMEOUT_S = 600.0
MEASURED = ("cpu", *(one.delegate for one in DELEGATES["tflite"] if one.asked == "benchmark_model"))
_VERBS = {
    "build": "build a kit for DEVICE on this host (needs a package index)",
    "install": "copy the kit to DEVICE, unpack it and check that it runs there (needs no internet on the device)",
    "benchmark": "run your copy of LiteRT's benchmark_model on DEVICE, for its GPU and NNAPI delegates",
}


def kit(argv: list[str]) -> int:
    """Build a device's kit, install it, or run the user's copy of LiteRT's benchmark program."""
    parser = start_parser("kit", "Build the runtimes that a device needs here, and install them there.", "--inventory")
    verbs = parser.add_subparsers(dest="verb", required=True)
    shared = share("--inventory", again=True)
    building, installing, measuring = (
        verbs.add_parser(name, help=summary, description=summary, parents=[shared]) for name, summary in _VERBS.items()
    )
    measuring.add_argument("--binary", required=True, help="path of benchmark_model on the device")
    measuring.add_argument(
        "--model", required=True, help="path of a .tflite on the device (`rankship deploy` prints it)"
    )
    measuring.add_argument("--delegate", choices=MEASURED, default="cpu")
    measuring.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    measuring.add_argument("--runs", type=int, default=50, help="least number of timed inferences (default: 50)")
    formats = f"formats to run, separated by commas, of {', '.join(FORMATS)} (default: all)"
    building.add_argument("--formats", type=parse_formats, default=FORMATS, metavar="A,B", help=formats)
    for one in (building, installing, measuring):
        one.add_argument("device", help="a name from `rankship devices`")
    arguments = parse(parser, argv)
    device = find_device(arguments.device, arguments.inventory)
    if arguments.verb == "build":
        return _build(device, list(arguments.formats))
    if arguments.verb == "install":
        return _install(device, arguments.inventory or inventory_path())
    return _benchmark(device, arguments)


def _build(device: Device, formats: list[Format]) -> int:
    from rankship_pipeline.foundation.commands import quote_words
    from rankship_pipeline.foundation.units import show_bytes
    from rankship_targets.client.connect import open_transport
    from rankship_targets.kit.build import build_kit
    from rankship_targets.kit.system import ask_system

    with open_transport(device) as transport:
        system = ask_system(transport, device)
    _say(f"{device.name} is {system}")
    lock, folder = build_kit(system, device.name, formats, _say)
    names = ", ".join(f"{name} {version}" for name, version in dict.fromkeys(lock.runtimes.values()))
    size = show_bytes(sum(file.size_bytes for file in lock.files))
    print(f"kit {lock.name} for {device.name}: {names}; {size} in {folder}")  # noqa: T201 - the verb's answer
    print(f"install it with: {quote_words(['rankship', 'kit', 'install', device.name])}")  # noqa: T201 - as above
    return 0


def _install(device: Device, inventory: Path) -> int:
    from rankship_pipeline.foundation.units import show_bytes
    from rankship_targets.client.connect import open_transport
    from rankship_targets.kit.install import install_kit
    from rankship_targets.kit.lock import find_kit

    lock, folder = find_kit(device.name)
    with open_transport(device) as transport:
        done = install_kit(transport, device, lock, folder, _say)
    news = "already installed, nothing sent" if done.was_there else f"installed, {show_bytes(done.sent_bytes)} sent"
    print(f"kit {lock.name} on {device.name}: {news}")  # noqa: T201 - the verb's answer
    if device.python != done.python:
        _name_python(device, done.python, inventory)
    return 0


def _name_python(device: Device, python: str, inventory: Path) -> None:
    """Write the kit's interpreter into the inventory, for the next session; if that fails, print what to write."""
    from rankship_targets.devices.inventory import set_value

    try:
        set_value(inventory, device.name, "python", python)
    except (InputError, OSError) as failure:
        by_hand = f'in {inventory}, under [{device.name}], write\n    python = "{python}"'
        print(f"the inventory could not be changed ({failure}); {by_hand}")  # noqa: T201 - the verb's answer
    else:
        print(f"{inventory} now has python = {python} (before: {device.python})")  # noqa: T201 - as above


def _benchmark(device: Device, arguments: argparse.Namespace) -> int:
    from rankship_pipeline.foundation.units import show_ns
    from rankship_targets.client.connect import open_transport
    from rankship_targets.kit.benchmark_model import run_benchmark

    wanted = {"threads": arguments.threads, "runs": arguments.runs, "timeout_s": BENCHMARK_TIMEOUT_S}
    with open_transport(device) as transport:
        found = run_benchmark(transport, arguments.binary, arguments.model, arguments.delegate, **wanted)
    deviation = "" if found.std_ns is None else f", standard deviation {show_ns(found.std_ns)}"
    median = "" if found.median_ns is None else f", median {show_ns(found.median_ns)}"
    shares = [f"{name} delegate: {share} applied" for name, share in found.delegated.items()]
    share = ", ".join(shares) or "no delegate reported"
    print(  # noqa: T201 - the verb's answer
        f"{found.count} inferences: mean {show_ns(found.mean_ns)}{median}{deviation}, "
        f"from {show_ns(found.min_ns)} to {show_ns(found.max_ns)}; first {show_ns(found.first_ns)}, "
        f"initialised in {show_ns(found.init_ns)}; {share}"
    )
    print("benchmark_model gives only this summary, no samples: so no interval and no comparison")  # noqa: T201 - as above
    if arguments.delegate != "cpu" and found.delegated.get(arguments.delegate.upper(), "not") == "not":
        message = f"nothing shows that the {arguments.delegate} delegate ran any part of {arguments.model}"
        raise UnlikeConditions(message, hint="take these times as the CPU's, and read benchmark_model's output there")
    return 0


def _say(text: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True, highlight=False).print(f"[dim]·[/] {escape(text)}", soft_wrap=True)
