"""The first word with a device: whether its Python can run the agent, and where the working folder is."""

import json
from contextlib import suppress

from rankship_pipeline.foundation.errors import CommandFailed, Lacks
from rankship_targets.devices.device import Device
from rankship_targets.transport.protocol import NOT_EXECUTABLE, NOT_FOUND, STEP_TIMEOUT_S, Transport, explain_failure

OLDEST_PYTHON = [3, 9]
# Makes the working folder and says where it is, so that from then on every path is absolute, and whether a session
# that never ended left the frequency governor set.
_GREETING = (
    "import json, os, sys; folder = os.path.abspath(sys.argv[1]); os.makedirs(folder, exist_ok=True); "
    "print(json.dumps([list(sys.version_info[:2]), folder, os.path.exists(folder + '/governor.json')]))"
)


def greet(transport: Transport, device: Device) -> tuple[str, bool]:
    """Make the working folder; gives its absolute path, and whether a dead session left the governor set.

    Lacks where there is no Python that can run the agent.
    """
    argv = [device.python, "-c", _GREETING, device.workdir]
    done = transport.run(argv, timeout_s=STEP_TIMEOUT_S)
    kit = f"rankship kit build {device.name} && rankship kit install {device.name}"
    hint = f"`{kit}` brings one; or correct `python` in the inventory's [{device.name}]"
    if done.code in {NOT_EXECUTABLE, NOT_FOUND}:
        raise Lacks(f"{device.name} cannot start {device.python}: {done.stderr.strip()}", hint=hint)
    if done.code != 0:
        raise explain_failure(argv, done.code, done.stderr)
    version, workdir, left_tuned = read_greeting(done.stdout, device)
    if version < OLDEST_PYTHON:
        raise Lacks(f"{device.name} has Python {version[0]}.{version[1]} as {device.python}", hint=hint)
    return workdir, left_tuned


def read_greeting(text: str, device: Device) -> tuple[list[int], str, bool]:
    """Read the interpreter's version, the absolute working folder, and whether a dead session left something set."""
    with suppress(ValueError, RecursionError):
        match json.loads(text):
            case [[int(major), int(minor)], str(folder), bool(left_tuned)] if folder.startswith("/"):
                return [major, minor], folder, left_tuned
    message = f"{device.python} on {device.name} said {text[:200]!r}, expected its version and folder"
    raise CommandFailed(message, hint="what does `python` in the inventory start? It must print nothing of its own")
