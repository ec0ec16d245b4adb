"""What the page of nights and its charts show."""

import re

import numpy as np
import pytest

from make.nights import make_device_night, make_night
from make.pages import read_outline
from rankship_benchmarks.nightly import sections
from rankship_benchmarks.nightly.histories import Case
from rankship_benchmarks.nightly.page import render_page
from rankship_benchmarks.report.history_charts import draw_history
from rankship_benchmarks.stats.steps import Night
from rankship_pipeline.foundation.artifact_key import ArtifactKey, Variant
from rankship_pipeline.foundation.formats import Format


def test_the_page_of_a_large_lab_is_one_small_file_and_says_what_it_leaves_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sections, "_MOST_BYTES", 70_000)  # so that few charts need be drawn
    names = [f"board <{place}>" for place in range(8)]
    nights = [make_night(number, [make_device_night(name, None) for name in names]) for number in range(60)]
    random = np.random.default_rng(3)
    kinds: list[tuple[Format, Variant]] = [("onnx", "dense"), ("tflite", "compressed"), ("executorch", "dense")]
    histories = {
        Case(device=name, recipe="r", key=ArtifactKey(variant=variant, format=format_)): tuple(
            Night(
                run_id=str(night.number),
                started_utc=night.started_utc,
                rounds_ns=tuple(412_000 * random.lognormal(0, 0.01, 7)) if night.number != 9 else (),
                gap=None if night.number != 9 else "throttled",
            )
            for night in nights
        )
        for name in names
        for format_, variant in kinds
    }
    page = render_page(nights[-1], nights, histories)
    read_outline(page)
    assert len(page.encode()) < 70_000 + 100_000
    assert "Not drawn, to keep this page below 2 MB" in page
    assert "board &lt;0&gt;" in page
    assert "<board" not in page
    assert not re.search(r"@import|url\((?!#)|\bsrc=", page)
    assert "night does not count" in page


@pytest.mark.parametrize(
    ("moments", "names"),
    [
        (("2026-11-26T02:15", "2026-11-26T14:30"), ("02:15", "14:30", "in UTC on 2026-11-26")),
        (("2026-11-25T02:15", "2026-11-26T02:15"), ("11-25", "11-26", "month-day")),
        (("2026-11-26T02:15",), ("11-26", "month-day")),
    ],
)
def test_nights_of_one_day_are_told_apart_by_their_time(moments: tuple[str, ...], names: tuple[str, ...]) -> None:
    nights = [
        Night(run_id=moment, started_utc=f"{moment}:00+00:00", rounds_ns=(5e6, 5.1e6, 5.2e6)) for moment in moments
    ]
    svg = draw_history("chart", "dense", nights, ())
    assert [name for name in names if name not in svg] == []
