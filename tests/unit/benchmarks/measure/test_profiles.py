"""Profiles and fronts: what is shown of many operators, and what no other choice beats."""

import types
from dataclasses import replace
from pathlib import Path
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from make.artifacts import DENSE, make_request
from make.judged_runs import make_run
from rankship_benchmarks.measure.profiles import RUNS, Profile, Profiles, profile_run, read_profiles
from rankship_benchmarks.report.page import render_report
from rankship_benchmarks.report.profile_charts import draw_profile, list_rows
from rankship_benchmarks.stats.pareto import find_front
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import ConnectionLost, Lacks
from rankship_pipeline.foundation.formats import Format
from rankship_targets.session.session import Session
from rankship_targets.trials.events import OperatorTime, Profiled
from rankship_targets.trials.request import MeasureRequest


def make_profile(*middles_us: int) -> Profile:
    operators = tuple(
        OperatorTime(name=f"node_{place}", kind="Conv", ns=((us - 1) * 1000, us * 1000, (us + 1) * 1000))
        for place, us in enumerate(middles_us)
    )
    return Profile(key=DENSE, artifact_sha256="0", threads=1, operators=operators, inference_ns=(1, 2, 3))


def test_small_operators_share_one_row_and_nothing_is_lost() -> None:
    profile = make_profile(500, 1, 300, 2, 200)
    rows = list_rows(profile)
    assert [name for name, *_ in rows] == ["node_0 Conv", "node_2 Conv", "node_4 Conv", "2 others"]
    assert sum(middle for _, middle, _, _ in rows) == profile.operators_ns
    assert rows[0][2] < rows[0][1] < rows[0][3]


def test_of_very_many_operators_the_longest_are_shown_in_running_order() -> None:
    rows = list_rows(make_profile(*range(100, 180)))
    assert len(rows) == 41
    assert rows[0][0] == "node_40 Conv"
    assert rows[-1][0] == "40 others"


def test_a_chart_says_that_it_is_profiled_and_in_what_unit() -> None:
    svg = draw_profile([make_profile(500, 300)], "onnx")
    assert "profiled time of one inference (\u00b5s)" in svg
    assert "dense: 800 \u00b5s in 2 operators" in svg
    assert draw_profile([make_profile(500)], "tflite") == ""


def test_a_page_with_profiles_keeps_them_apart_from_latencies_and_says_what_is_missing() -> None:
    bundle = make_run()
    assert "as profiled" not in render_report(bundle)
    found = Profiles(taken_utc="", profiles=(make_profile(500, 300),), missing={"tflite": "the runtime <offers> none"})
    page = render_report(bundle, found)
    section = page[page.index("Where the time goes, as profiled") :]
    assert "read shares here, not latencies" in section
    assert "800.0 \u00b5s" in section
    assert "No profile of tflite: the runtime &lt;offers&gt; none" in section


class Device:
    """Profiles ONNX, lacks a profiler for TFLite, and goes away at ExecuTorch."""

    device = types.SimpleNamespace(name="pi")

    def profile(self, request: MeasureRequest, runs: int) -> Profiled:
        if request.key.format == "tflite":
            raise Lacks("offers none", hint="look")
        if request.key.format == "executorch":
            raise ConnectionLost("gone", hint="look")
        operator = OperatorTime(name="a", kind="Conv", ns=(1000,) * runs)
        return Profiled(event="profiled", operators=(operator,), inference_ns=(2000,) * runs)


def ask(format_: Format) -> MeasureRequest:
    return make_request("model", "0", key=replace(DENSE, format=format_), min_samples=1, max_warmup_ms=1)


def test_what_cannot_be_profiled_is_named_and_a_device_that_left_spoils_no_run(tmp_path: Path) -> None:
    session = cast("Session", Device())
    profile_run(tmp_path, [ask("executorch"), ask("onnx")], session, Steps())
    assert read_profiles(tmp_path) is None
    profile_run(tmp_path, [ask("tflite"), ask("onnx")], session, Steps())
    found = read_profiles(tmp_path)
    assert found is not None
    assert [one.key.format for one in found.profiles] == ["onnx"]
    assert "offers none" in found.missing["tflite"]
    assert len(found.profiles[0].inference_ns) == RUNS


POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12)


@given(points=POINTS)
def test_the_front_is_what_none_beats(points: list[tuple[float, float]]) -> None:
    front = find_front(points)
    beaten = {
        place
        for place, (cost, gain) in enumerate(points)
        if any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points)
    }
    assert {points[place] for place in front} == {points[place] for place in range(len(points)) if place not in beaten}
    assert [points[place] for place in front] == sorted({points[place] for place in front})
