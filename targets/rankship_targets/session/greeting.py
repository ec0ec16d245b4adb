"""A session's first step on a device: checks that its Python can run the agent, and makes the working directory."""

import json
from contextlib import suppress

from rankship_pipeline.foundation.errors import CommandFailed, Lacks
from rankship_targets.devices.device import Device
from rankship_targets.devices.installing import show_kit
from rankship_targets.transport.protocol import NOT_EXECUTABLE, NOT_FOUND, STEP_TIMEOUT_S, Transport, explain_failure

OLDEST_PYTHON = [3, 9]
# Makes the working directory and prints its path, so that all later paths are absolute, and whether a session that was
# killed left the frequency governor set.
_GREETING = (
    "import json, os, sys; folder = os.path.abspath(sys.argv[1]); os.makedirs(folder, exist_ok=True); "
    "print(json.dumps([list(sys.version_info[:2]), folder, os.path.exists(folder + '/governor.json')]))"
)


def greet(transport: Transport, device: Device) -> tuple[str, bool]:
    """Make the working directory; returns its absolute path, and whether a killed session left the governor set.

    Lacks if there is no Python that can run the agent.
    """
    argv = [device.python, "-c", _GREETING, device.workdir]
    done = transport.run(argv, timeout_s=STEP_TIMEOUT_S)
    hint = f"{show_kit(device.name)} installs one; or correct `python` in the inventory's [{device.name}]"
    if done.code in {NOT_EXECUTABLE, NOT_FOUND}:
        raise Lacks(f"{device.name} cannot start {device.python}: {done.stderr.strip()}", hint=hint)
    if done.code != 0:
        raise explain_failure(argv, done.code, done.stderr)
    version, workdir, left_tuned = read_greeting(done.stdout, device)
    if version < OLDEST_PYTHON:
        message = f"{device.name}: {device.python} is Python {version[0]}.{version[1]}, expected 3.9 or newer"
        raise Lacks(message, hint=hint)
    return workdir, left_tuned


def read_greeting(text: str, device: Device) -> tuple[list[int], str, bool]:
    """Parse the interpreter's version, the absolute working directory, and whether the governor was left set."""
    with suppress(ValueError, RecursionError):
        match json.loads(text):
            case [[int(major), int(minor)], str(folder), bool(left_tuned)] if folder.startswith("/"):
                return [major, minor], folder, left_tuned
    message = f"{device.python} on {device.name} printed {text[:200]!r}, expected its version and folder"
    raise CommandFailed(message, hint="check `python` in the inventory: it must print nothing of its own")
