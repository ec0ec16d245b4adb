"""The types that the agent's modules share: requests, events, and the failure that becomes the last event."""

from __future__ import annotations

from typing import Any

PROTOCOL = 2
Event = dict[str, Any]
Request = dict[str, Any]


class Fault(Exception):
    """A kind and a message for the host.

    Kinds: lacks_runtime, bad_artifact, bad_request, bad_input, failed; no_space and read_only for the device's disk;
    busy, unknown_run, agent_died and rebooted for detached runs.
    """
