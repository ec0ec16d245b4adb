"""What a build's files say after a prompt, as text beside what the dense torch model says."""

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from rankship_benchmarks.measure.continuations import Continuation
from rankship_pipeline.flow.prompt import Prompt
from rankship_pipeline.foundation.units import show_ns

if TYPE_CHECKING:
    from rich.console import Console

Said = tuple[str, Continuation]  # the device's name before what a file said there


def print_continuations(prompt: Prompt, dense: Sequence[int], said: Iterable[Said], console: "Console") -> None:
    """Print the prompt, what dense torch says after it, and each file's text with its times and where it departs."""
    for line in list_lines(prompt, dense, said):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def list_lines(prompt: Prompt, dense: Sequence[int], said: Iterable[Said]) -> list[str]:
    """Return the lines: a heading and a text for dense torch, and for each file."""
    lines = [f"After {prompt.text!r}, the likeliest token each time:", "dense, torch on this host:"]
    lines.append(_quote(prompt, dense))
    for device, one in said:
        lines.append(f"{one.key.title} on {device}, {_state_times(one)}, {_compare(one.tokens, dense)}:")
        lines.append(_quote(prompt, one.tokens))
    return lines


def _quote(prompt: Prompt, tokens: Sequence[int]) -> str:
    return f"  {prompt.write(tuple(tokens))!r}"


def _state_times(one: Continuation) -> str:
    """The times of this one text: no rounds, so no interval."""
    first = f"first token after {show_ns(one.first_ns)}"
    return f"{first}, then {len(one.ns) * 1e9 / sum(one.ns):.1f} tokens/s" if one.ns else first


def _compare(tokens: Sequence[int], dense: Sequence[int]) -> str:
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, dense, strict=False)))
    if alike == len(tokens) == len(dense):
        return f"all {alike} tokens as dense torch"
    return f"the first {alike} of {len(dense)} tokens as dense torch"
