"""Whatever a phone's and a board's own tools print: what was said, or an error of ours, and never another number."""

import json
import re
from collections.abc import Sequence

from hypothesis import example, given
from hypothesis import strategies as st

from rankship_pipeline.foundation.errors import CommandFailed, TargetError, WrongSystem
from rankship_targets.kit.benchmark_model import parse_output
from rankship_targets.kit.system import Board, judge_board, read_answer
from rankship_targets.transport.adb.command import read_group
from rankship_targets.transport.adb.connection import read_properties
from rankship_targets.transport.fake import FakeTransport
from rankship_targets.transport.protocol import Completed

SAID = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(["12", " ", "regular file", "regular empty file", "directory", "\n", "9" * 5000, "\uff11"]),
    ),
    max_size=6,
).map("".join)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
ANSWERS = st.fixed_dictionaries(
    {
        "machine": st.one_of(JSON, st.sampled_from(["aarch64", "x86_64", "armv7l"])),
        "bits": st.one_of(JSON, st.sampled_from([32, 64])),
        "libc": st.one_of(JSON, st.sampled_from(["glibc 2.36", "glibc 2.36.1", "glibc 2", "glibc 2.x", "musl 1.2"])),
        "python": st.one_of(JSON, st.sampled_from([[3, 11], [3, "11"], ["3", 11], [True, 1]])),
        "implementation": st.one_of(JSON, st.just("cpython")),
        "interpreter": st.one_of(JSON, st.just("/usr/bin/python3")),
    }
)


@given(line=st.one_of(st.binary(max_size=30), st.from_regex(rb"[0-9]{1,12}\s*", fullmatch=True)))
@example(line=b"9" * 5000)
@example(line=b"0")
def test_a_group_is_a_positive_number_or_none(line: bytes) -> None:
    group = read_group(line)
    assert group is None or (group > 0 and line.strip() == b"%d" % group)


@given(said=st.one_of(SAID, st.lists(st.sampled_from(["[", "]: [", "]", "ro.x", "\n", "a"]), max_size=12).map("".join)))
def test_properties_are_pairs_of_what_was_said(said: str) -> None:
    def answer(_: FakeTransport, __: Sequence[str]) -> Completed:
        return Completed(code=0, stdout=said, stderr="")

    with FakeTransport({"getprop": answer}) as fake:
        found = read_properties(fake)  # type: ignore[arg-type]  # it only runs commands
    assert all(name in said and value in said for name, value in found.items())


@given(said=st.one_of(SAID, JSON.map(json.dumps), ANSWERS.map(json.dumps)))
@example(said="[" * 100_000)
def test_a_boards_answer_is_a_system_or_an_error(said: str) -> None:
    try:
        answer = read_answer("pi", said)
        board = judge_board("pi", answer)
    except (TargetError, WrongSystem):
        return
    told = json.loads(said)
    assert isinstance(board, Board)
    assert (board.machine, list(board.python), told["bits"]) == (told["machine"], told["python"], 64)
    assert re.match(rf"glibc {board.glibc[0]}\.{board.glibc[1]}(\D|$)", told["libc"])


@given(count=st.sampled_from(["3", "0", "1e999", "-1", "1" * 400]), first=st.sampled_from(["5", "1e999", "1e308", "x"]))
def test_a_benchmarks_numbers_are_finite_or_an_error(count: str, first: str) -> None:
    run = f"count={count} first={first} curr={first} min=5 max=7 avg=6 std=0"
    lines = [
        run,
        f"Inference timings in us: Init: {first}, First inference: {first}, Warmup (avg): 1, Inference: 6",
        run,
    ]
    try:
        found = parse_output(lines)
    except CommandFailed:
        return
    assert (found.count, found.first_ns) == (int(count), round(float(first) * 1000))
