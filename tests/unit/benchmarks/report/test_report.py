import dataclasses
import html
import re
from pathlib import Path

import pytest

from make.artifacts import DENSE
from make.bundles import keep
from make.judged_runs import make_run
from make.pages import read_outline
from rankship_benchmarks.judge.energy_figures import CaseEnergy, EnergyEstimate
from rankship_benchmarks.judge.summary import summarise
from rankship_benchmarks.report import charts
from rankship_benchmarks.report.page import render_report, write_report
from rankship_pipeline.foundation.artifact_key import head_of
from rankship_pipeline.foundation.quality import Fidelity, Score
from rankship_pipeline.foundation.records import Refinement


def test_the_page_is_one_small_file_that_needs_nothing_else(tmp_path: Path) -> None:
    bundle = make_run(rounds=20, layers=20, samples=1000)
    path = write_report(keep(tmp_path / "run", bundle))
    assert path == tmp_path / "run" / "report.html"
    page = path.read_text()
    assert path.stat().st_size < 2_000_000
    addresses = set(re.findall(r'[\w:]*="https?:[^"]*"|https?:[^\s"<]*', page))
    assert {address.split("=")[0] for address in addresses} <= {"xmlns", "xmlns:xlink"}
    assert not re.search(r"@import|url\((?!#)|\bsrc=", page)
    assert str(tmp_path) not in page
    elsewhere = tmp_path / "site" / "index.html"
    assert write_report(tmp_path / "run", elsewhere).read_text() == page


def test_the_page_is_well_formed_and_the_same_each_time() -> None:
    bundle = make_run()
    page = render_report(bundle)
    outline = read_outline(page)
    assert "script" not in outline.tags
    assert len(outline.ids) == len(set(outline.ids))
    assert page == render_report(bundle)


def test_a_run_shows_the_like_runs_before_it_and_no_others(tmp_path: Path) -> None:
    def keep_run(name: str, created: str, conditions: dict[str, str] | None = None) -> None:
        header = dataclasses.replace(bundle.header, run_id=name, created_utc=created)
        header = header if conditions is None else dataclasses.replace(header, conditions=conditions)
        keep(tmp_path / name, dataclasses.replace(bundle, header=header))

    bundle = make_run(samples=5)
    keep_run("first", "2026-11-01T02:15:00+00:00")
    assert "Earlier runs" not in write_report(tmp_path / "first").read_text()
    keep_run("unlike", "2026-11-02T02:15:00+00:00", conditions={"kernel": "another"})
    keep_run("later", "2026-11-09T02:15:00+00:00")
    keep_run("this", "2026-11-03T02:15:00+00:00")
    page = write_report(tmp_path / "this").read_text()
    assert "2 runs, this one last." in page
    assert "11-01" in page
    assert "11-02" not in page
    assert "11-09" not in page


def test_the_verdict_comes_first_and_everything_asked_for_is_there() -> None:
    page = render_report(make_run())
    assert page.index("2.5\u00d7 fewer parameters") < page.index("compressed is not faster in executorch")
    assert page.index("compressed is not faster in executorch") < page.index("<h2>Results")
    for word in ("[0.45, 0.47]", "uniform", "stage2.block1.conv2", "3.1e-07", "onnxruntime 1.31.0", "No energy figure"):
        assert word in page
    bundle = make_run()
    for sha256 in (bundle.header.recipe_sha256, bundle.trials[0].agent_sha256, bundle.header.build_sha256):
        assert sha256 in page


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "</style><img src=x onerror=y>", 'a"b&c', "$\\alpha$"])
def test_names_are_shown_and_never_obeyed(text: str) -> None:
    bundle = make_run(recipe=text)
    layers = (dataclasses.replace(bundle.header.build.plan.layers[0], name=text), *bundle.header.build.plan.layers[1:])
    plan = dataclasses.replace(bundle.header.build.plan, layers=layers, method=text)
    build = dataclasses.replace(bundle.header.build, plan=plan)
    header = dataclasses.replace(bundle.header, build=build, conditions={text: text})
    outline = read_outline(render_report(dataclasses.replace(bundle, header=header)))
    assert not {"script", "img"} & outline.tags


def test_folders_of_the_host_stay_out_of_the_page() -> None:
    bundle = make_run()
    artifacts = tuple(
        dataclasses.replace(one, source_sha256={"/home/me/models/a.safetensors": "0" * 64})
        for one in bundle.header.build.artifacts
    )
    build = dataclasses.replace(bundle.header.build, artifacts=artifacts)
    header = dataclasses.replace(bundle.header, build=build, conditions={"python": "/opt/me/bin/python3"})
    page = render_report(dataclasses.replace(bundle, header=header))
    assert "a.safetensors" in page
    assert "/home/me" not in page
    assert "/opt/me" not in page


def test_a_run_with_little_in_it_still_has_a_page() -> None:
    bundle = make_run(rounds=1, samples=3)
    build = dataclasses.replace(bundle.header.build, alternatives=(), accuracies=())
    header = dataclasses.replace(bundle.header, build=build, verified=())
    trials = tuple(one for one in bundle.trials if one.key == dataclasses.replace(DENSE, format="tflite"))
    page = render_report(dataclasses.replace(bundle, header=header, trials=trials, finished=False))
    read_outline(page)
    assert "unfinished" in page
    assert "not proven" in page


def test_parity_is_shown_for_each_place_where_it_was_proven() -> None:
    bundle = make_run()
    page = render_report(bundle)
    assert page.count("<td>pi4-bench</td>") == page.count("<td>this host</td>") == len(bundle.header.verified)
    assert page.count("not proven") == len(bundle.header.verified), "an older bundle: the board's own is not there"
    there = tuple(dataclasses.replace(one, max_relative_error=4.2e-6) for one in bundle.header.verified)
    page = render_report(
        dataclasses.replace(bundle, header=dataclasses.replace(bundle.header, verified_on_device=there))
    )
    assert page.count("4.2e-06") == len(there)
    assert "not proven" not in page
    here = render_report(
        dataclasses.replace(
            bundle,
            header=dataclasses.replace(bundle.header, device="this-machine"),
            trials=tuple(dataclasses.replace(one, device="this-machine") for one in bundle.trials),
        )
    )
    assert "not proven" not in here


def test_charts_keep_their_text_as_text() -> None:
    summary = summarise(make_run())
    assert "compressed: calibrated" in charts.draw_accuracy_against_size(summary)
    assert "median latency (µs), 95 % interval" in charts.draw_accuracy_against_latency(summary)
    assert "svd 57" in charts.draw_ranks(summary.header.build.plan)
    assert "output energy lost (%), predicted" in charts.draw_errors(summary.header.build.plan)
    assert "compressed: 8 rounds" in charts.draw_latencies(make_run().trials, "tflite")


def test_files_of_several_precisions_are_drawn_by_bytes_and_a_plan_shows_bits_beside_ranks() -> None:
    summary = summarise(make_run())
    assert charts.draw_accuracy_against_bytes(summary) == ""
    *others, last = summary.results
    rounded = dataclasses.replace(last, key=dataclasses.replace(last.key, precision="int8"))
    drawing = charts.draw_accuracy_against_bytes(dataclasses.replace(summary, results=(*others, rounded)))
    assert "size of the file (MB)" in drawing
    assert f"{rounded.key.heading}, " in drawing
    plan = summary.header.build.plan
    layers = tuple(dataclasses.replace(one, weights="int8" if one.factors else "int4") for one in plan.layers)
    drawing = charts.draw_ranks(dataclasses.replace(plan, layers=layers))
    assert "svd 57, int8" in drawing
    assert "dense, int4" in drawing


def test_energy_has_a_front_of_its_own_where_a_meter_told_one() -> None:
    summary = summarise(make_run())
    assert charts.draw_accuracy_against_energy(summary) == ""
    total = EnergyEstimate(value_nj=12_400_000, bound_nj=200_000, spread_nj=100_000, rounds=6)
    energy = CaseEnergy(
        meter="hwmon",
        provenance="measured",
        rails=("supply",),
        total=total,
        marginal=None,
        ratio=None,
        refused=(),
        idle_uw=None,
        idle_drift_uw=None,
        calibration_ppm=None,
    )
    first, *others = summary.results
    drawing = charts.draw_accuracy_against_energy(
        dataclasses.replace(summary, results=(dataclasses.replace(first, energy=energy), *others))
    )
    assert "energy of an inference (mJ), meter's ± and 95 %" in html.unescape(drawing)
    assert first.key.heading in drawing
    assert not any(one.key.heading in drawing for one in others)


def test_formats_that_differ_greatly_share_a_logarithmic_axis() -> None:
    bundle = make_run()
    slow = tuple(
        dataclasses.replace(one, samples_ns=tuple(100 * time for time in one.samples_ns))
        if one.key.format == "tflite"
        else one
        for one in bundle.trials
    )
    drawing = charts.draw_accuracy_against_latency(summarise(dataclasses.replace(bundle, trials=slow)))
    assert "median latency (ms)" in drawing
    assert "mathdefault" not in drawing


def test_what_specialists_keep_and_whose_heads_stand_beside_is_told() -> None:
    bundle = make_run()
    build = bundle.header.build
    assert "What each specialist keeps" not in render_report(bundle)
    before = Score(stage="source:ink", samples=200, value=0.99, correct=198, low=0.96, high=0.997)
    after = Score(stage="merged", samples=200, value=0.915, correct=183, low=0.87, high=0.95)
    kept = Fidelity(stage="merged", source="ink", answers=64, agreement=0.875, before=before, after=after)
    untested = Fidelity(stage="merged", source="chalk", answers=32, agreement=0.75)
    head = dataclasses.replace(build.artifacts[0], key=dataclasses.replace(DENSE, part=head_of("ink")), sha256="e" * 64)
    refined = Refinement(steps=300, cpu_seconds=32.0, augment="none")
    changed = dataclasses.replace(build, fidelities=(kept, untested), heads=(head,), refinement=refined)
    page = render_report(dataclasses.replace(bundle, header=dataclasses.replace(bundle.header, build=changed)))
    read_outline(page)
    table = page[page.index("What each specialist keeps") : page.index("<h2>Ranks")]
    for shown in ("99.0 %", "91.5 %", "-7.5", "87.5 %", "of 64", "75.0 %", "300 steps without labels"):
        assert shown in table.replace("\u00a0", " "), shown
    assert "Only the backbone that all tasks share is timed" in page
    assert "dense onnx, head of ink" in page


def test_agreement_is_not_called_accuracy_where_the_data_have_no_labels() -> None:
    bundle = make_run()
    assert "no labels" not in render_report(bundle)
    build = dataclasses.replace(bundle.header.build, answers="predictions")
    page = render_report(dataclasses.replace(bundle, header=dataclasses.replace(bundle.header, build=build)))
    assert "The data have no labels: accuracy here means agreement with the dense model" in html.unescape(page)
    headline = page.partition("<h1>")[2].partition("</h1>")[0].replace("\u00a0", " ")
    assert "agreement with the dense model" in headline
    assert "accuracy" not in headline
