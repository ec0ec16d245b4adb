"""What the agent's rooms share: the shape of requests and events, and the failure that becomes the last event."""

from __future__ import annotations

from typing import Any

PROTOCOL = 1
Event = dict[str, Any]
Request = dict[str, Any]


class Fault(Exception):
    """A kind (lacks_runtime, bad_artifact, bad_request, bad_input, failed) and a message for the host."""
