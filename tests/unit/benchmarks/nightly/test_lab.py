"""The page of a lab: how every device is, what every case took last, and a filter that needs no network."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from make.bundles import keep
from make.devices import make_local
from make.nights import do_night, measure_with, plan_night
from make.pages import read_outline
from make.power import BASE, make_metered
from rankship_benchmarks.fleet.measure import Measure
from rankship_benchmarks.index.index import refresh_own_index
from rankship_benchmarks.nightly.lab import LAB_PAGE, render_lab
from rankship_benchmarks.nightly.records import list_nights
from rankship_pipeline.cli import main
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import ConnectionLost
from rankship_targets.devices.quarantine import watching


def read_cells(page: str, heading: str) -> list[list[str]]:
    """The rows of the table after a heading, as texts."""
    table = page[page.index(f'id="{heading}"') :].partition("<tbody")[2].partition("</tbody>")[0]
    rows = table.split("<tr")[1:]
    return [
        [re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", cell)).strip() for cell in re.split(r"<t[hd]", row)[1:]]
        for row in rows
    ]


def fail_on(name: str, folder: Path, measure: Measure) -> Measure:
    def work(device: str, steps: Steps) -> Path:
        with watching(make_local(folder, device)):
            if device == name:
                raise ConnectionLost("cable <out>", hint="")
        return measure(device, steps)

    return work


def test_devices_show_their_state_and_why(tmp_path: Path) -> None:
    results = tmp_path / "results"
    tonight = plan_night(results, "good,away,sick")
    for number in range(3):
        failing = "away" if number == 2 else "sick"
        do_night(tonight, fail_on(failing, tmp_path, measure_with(results)))
    for _ in range(3):
        do_night(plan_night(results, "sick"), fail_on("sick", tmp_path, measure_with(results)))
    devices = {name: make_local(tmp_path, name) for name in ("good", "away", "sick")}
    devices |= {"new": replace(devices["good"], name="new", transport="adb", serial="1")}
    page = render_lab(results, refresh_own_index(results), list_nights(results), devices)
    read_outline(page)
    states = {row[0].split()[0].lstrip("> "): row[1] for row in read_cells(page, "devices")}
    cells = {one.split("> ")[-1]: state.split("> ")[-1] for one, state in states.items()}
    assert {name: cells[next(key for key in cells if name in key)] for name in ("good", "away", "sick", "new")} == {
        "good": "good",
        "away": "failing",
        "sick": "quarantine",
        "new": "idle",
    }
    assert "cable &lt;out&gt;" in page
    assert "<out>" not in page
    assert "2 of its last 3 nights count" in page
    assert not re.search(r"@import|url\((?!#)|\bsrc=|https?://", page)


def test_cases_show_the_newest_run_and_runs_link_to_their_pages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(tmp_path / "one", BASE)
    metered = make_metered()
    keep(tmp_path / "two", replace(metered, header=replace(metered.header, created_utc="2030-01-01T00:00:00+00:00")))
    (tmp_path / "two/report.html").write_text("a page")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/trials.jsonl").write_text("{}\n")
    (tmp_path / "devices.toml").write_text("")
    assert main(["lab", "--results", str(tmp_path), "--inventory", str(tmp_path / "devices.toml")]) == 0
    page = (tmp_path / LAB_PAGE).read_text()
    assert str(tmp_path / LAB_PAGE) in capsys.readouterr().out
    read_outline(page)
    cases = read_cells(page, "cases")
    assert len(cases) == len({trial.key for trial in BASE.trials})
    assert all("2030-01-01" in row[-1] for row in cases)
    assert sum("measured" in row[3] for row in cases) == 2  # the two that have energy
    assert "accuracy 9" in page
    assert '<a href="two/report.html">two</a>' in page
    assert '<a href="one' not in page
    assert "cannot be read" in page
    assert "no night yet" in page


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert main(["lab", "--results", str(tmp_path / "none")]) == 2
