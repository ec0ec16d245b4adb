"""Cautions in groups: nothing is lost, one line says a group, and the terminal and the page fold what stands behind."""

import io
import re
from dataclasses import replace

from rich.console import Console

from make.bundles import change_trial
from make.judged_runs import QUIET, make_run
from make.pages import read_outline
from rankship_benchmarks.bundle.bundle import Bundle
from rankship_benchmarks.judge.summary import Summary, summarise
from rankship_benchmarks.report.page import render_report
from rankship_benchmarks.report.words import print_summary
from rankship_targets.devices.device import THIS_MACHINE

SILENT = replace(QUIET, governor=None, temperature_mc=None)
BUSY = replace(SILENT, load_1m_milli=9_000)


def on_a_laptop() -> Bundle:
    """A run as a busy laptop leaves it: load all along, a stall, an unsteady round, and nothing told of its speed."""
    bundle = make_run()
    trials = [replace(one, device=THIS_MACHINE, before=BUSY, after=BUSY) for one in bundle.trials]
    trials[0] = replace(trials[0], samples_ns=(*trials[0].samples_ns, 10**9), warmed_up=False)
    return replace(bundle, header=replace(bundle.header, device=THIS_MACHINE), trials=tuple(trials))


def print_text(summary: Summary, *, verbose: bool = False) -> str:
    stream = io.StringIO()
    print_summary(summary, Console(file=stream, width=500), verbose=verbose)
    return stream.getvalue()


def test_a_busy_laptop_gets_a_line_for_each_cause() -> None:
    busy, rounds, silent = summarise(on_a_laptop()).caution_groups
    assert busy.heading == "This machine was busy during 48 of 48 trials."
    assert [one.partition(" in ")[0] for one in busy.details] == ["Doubted: other load", "Doubted: interrupted"]
    assert rounds.heading == "Rounds differ: 1 of 6 artifacts changed speed."
    assert silent.heading == "This machine does not report its governor and temperature."
    assert all(group.advice for group in (busy, rounds, silent))


def test_the_groups_hold_every_caution_once() -> None:
    summary = summarise(on_a_laptop())
    assert len(summary.cautions) == len(set(summary.cautions)) == 6
    assert summary.cautions == tuple(one for group in summary.caution_groups for one in group.details)


def test_a_caution_that_stands_alone_is_its_own_line() -> None:
    (group,) = summarise(make_run()).caution_groups
    assert group.details == ()
    assert group.cautions == (group.heading,)
    assert group.heading.startswith("Rounds: 8 cannot show")


def test_another_device_is_called_by_its_name() -> None:
    (*_, silent) = summarise(change_trial(make_run(), 0, before=SILENT)).caution_groups
    assert silent.heading == "pi4-bench does not report its governor and temperature."
    assert silent.advice == "`rankship doctor pi4-bench` says more."


def test_the_terminal_folds_the_details_unless_asked() -> None:
    summary = summarise(on_a_laptop())
    folded, full = print_text(summary), print_text(summary, verbose=True)
    assert [one for one in summary.cautions if one in folded] == []
    assert "6 cautions in all" in folded
    assert [one for one in summary.cautions if one not in full] == []
    assert all(group.heading in text for group in summary.caution_groups for text in (folded, full))


def test_the_page_folds_the_details() -> None:
    page = render_report(on_a_laptop())
    read_outline(page)
    note = page[page.index("Reasons to distrust") :].partition("</section>")[0]
    assert note.count("<details>") == note.count("<summary>") == 3
    assert re.search(r'<span class="code">rankship doctor this-machine</span>', note)
    outside = re.sub(r"</summary>.*?</details>", "", note, flags=re.DOTALL)
    assert "Doubted" in note
    assert "Doubted" not in outside
