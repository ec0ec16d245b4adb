"""How many tokens a request gives at once, and how many a sequence holds."""

from __future__ import annotations

from typing import NamedTuple

from .protocol import Fault, Request


class Limits(NamedTuple):
    """The tokens that are given at once, and the most of a sequence."""

    prompt: int
    context: int


def read_limits(request: Request) -> Limits:
    """Read a request's limits; Fault bad_request if they are not whole numbers above 0."""
    numbers = [request["generation"].get(name) for name in ("prompt_tokens", "context")]
    if any(type(one) is not int or one < 1 for one in numbers):
        raise Fault("bad_request", f"wrong in the request: generation {request['generation']}")
    return Limits(*numbers)
