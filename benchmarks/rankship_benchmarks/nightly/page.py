"""The page over all devices, cases and nights: tonight's verdict first, then every history."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rankship_benchmarks.judge.changes import list_words
from rankship_benchmarks.judge.summary import TIMES
from rankship_benchmarks.nightly.figures import NO_FIGURES, Figures
from rankship_benchmarks.nightly.histories import Case
from rankship_benchmarks.nightly.judge import show_step
from rankship_benchmarks.nightly.records import CaseVerdict, DeviceNight, NightRecord
from rankship_benchmarks.nightly.sections import draw_sections
from rankship_benchmarks.report.page import read_style
from rankship_benchmarks.report.words import UNKNOWN, show_ratio_interval, show_time, show_time_interval
from rankship_benchmarks.stats.estimates import Estimate, estimate_median
from rankship_benchmarks.stats.steps import Night, find_steps
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.frozen import record

if TYPE_CHECKING:
    from jinja2 import Template

PAGE = "nightly.html"
SIGNS = {"worse": "▲", "better": "▼", "same": "✓", "unknown": "?"}  # in the order in which they are shown
_GAP, _ABSENT = "×", "–"
_CALENDAR_NIGHTS = 30
_STANDING_NIGHTS = 14


@record
class Row:
    """One case as the table shows it, all as text."""

    device: str
    format: str
    model: str
    variant: str
    verdict: str
    sign: str
    latency: str
    interval: str
    ratio: str
    ratio_interval: str
    reason: str


@record
class Cell:
    """One device in one night: a sign, a word or two, and the full reason."""

    sign: str
    short: str
    reason: str


@record
class Line:
    """One night of the calendar."""

    number: int
    began: str
    cells: tuple[Cell, ...]
    exit: str


@record
class Alarm:
    """One case that is worse in a sentence, and what differs between the two nights, the likeliest cause first."""

    text: str
    reasons: tuple[str, ...]


def write_page(
    results: Path,
    night: NightRecord,
    nights: Sequence[NightRecord],
    histories: Mapping[Case, Sequence[Night]],
    figures: Figures = NO_FIGURES,
    note: str = "",
) -> Path:
    """Write the page for `night`, the last of `nights`, beside the runs; returns its path. `note` labels the data."""
    path = results / PAGE
    write_atomic(path, render_page(night, nights, histories, figures, note).encode())
    return path


def render_page(
    night: NightRecord,
    nights: Sequence[NightRecord],
    histories: Mapping[Case, Sequence[Night]],
    figures: Figures = NO_FIGURES,
    note: str = "",
) -> str:
    """Fill the page's template; every text is escaped, only the charts are markup."""
    sections, undrawn = draw_sections(night, histories, figures)
    alarms = list_alarms(night)
    columns, calendar = list_calendar(nights[-_CALENDAR_NIGHTS:])
    return open_template("page.html.j2").render(
        night=night,
        note=note,
        headline=state_headline(night),
        alarms=alarms,
        differs=any(one.reasons for one in alarms),
        standing=list_standing(nights, histories),
        gaps=list_gaps(night),
        rows=list(_list_rows(night, histories)),
        energies=list_energies(night),
        sections=sections,
        undrawn=undrawn,
        columns=columns,
        calendar=calendar,
        style=read_style(),
    )


def open_template(name: str) -> "Template":
    """Open a template of this room, which escapes every text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def list_calendar(nights: Sequence[NightRecord]) -> tuple[tuple[str, ...], list[Line]]:
    """Return the devices of some nights, and one line for each night, the newest first."""
    columns = tuple(dict.fromkeys(one.device for each in nights for one in each.devices))
    return columns, [_make_line(each, columns) for each in reversed(nights)]


def state_headline(night: NightRecord) -> str:
    """Return the night in one sentence: how many cases are worse, better or the same; devices without a number."""
    verdicts = [case.verdict for one in night.devices for case in one.cases]
    energies = [case.verdict for one in night.devices for case in one.energies]
    missing = [one.device for one in night.devices if one.gap is not None]
    text = f"{len(verdicts)} cases: {_count(verdicts)}" if verdicts else "No case was compared"
    text += f"; energy: {_count(energies)}" if energies else ""
    return f"{text}; no number from {', '.join(missing)}." if missing else f"{text}."


def _count(verdicts: Sequence[str]) -> str:
    counted = (f"{verdicts.count(one)} {one}" for one in SIGNS if one in verdicts)
    return ", ".join(counted)


def list_alarms(night: NightRecord) -> list[Alarm]:
    """List each case that is worse, in time first, with what differs between the two nights."""
    return [
        Alarm(
            text=f"{one.shown}, {case.key.heading}: {case.step or case.reason}",  # whose reason says "energy"
            reasons=tuple(list_words(case.why)) if case.why else (),
        )
        for figure in ("cases", "energies")
        for one in night.devices
        for case in getattr(one, figure)
        if case.verdict == "worse"
    ]


def list_energies(night: NightRecord) -> list[str]:
    """List a sentence for each metered case: its verdict, tonight's energy over the last night's, and the reason."""
    return [
        f"{SIGNS.get(case.verdict, '?')} {case.verdict}: {one.shown}, {case.key.heading}"
        + (f", {TIMES} {case.ratio.value:.3f} {_show_fine_interval(case.ratio)}" if case.ratio else "")
        + f": {case.reason}"
        for one in night.devices
        for case in one.energies
    ]


def list_standing(nights: Sequence[NightRecord], histories: Mapping[Case, Sequence[Night]]) -> list[str]:
    """List a sentence for each step found in one of the last nights, so that a weekend does not hide it."""
    recent = {one.run for night in nights[-_STANDING_NIGHTS:] for one in night.devices}
    return [
        f"{case.device}, {case.key.heading}: {show_step(step)}, found on {step.found_utc[:10]}"
        for case, history in histories.items()
        if case.recipe == nights[-1].recipe
        for step in find_steps(history)
        if step.found_run_id in recent
    ]


def list_gaps(night: NightRecord) -> list[str]:
    """List a sentence for each device without a number that counts tonight, and for each stand-in."""
    whole = [f"{one.device}: {one.gap}" for one in night.devices if one.gap is not None]
    instead = [
        f"{one.device}: {one.measured_on} stood in for it ({'; '.join(one.losses)})"
        for one in night.devices
        if one.measured_on not in {None, one.device}
    ]
    return [*whole, *instead]


def _list_rows(night: NightRecord, histories: Mapping[Case, Sequence[Night]]) -> Iterable[Row]:
    for one in night.devices:
        for case in one.cases:
            known = Case(device=one.shown, recipe=night.recipe, key=case.key)
            rounds = next((each.rounds_ns for each in histories.get(known, ()) if each.run_id == one.run), ())
            yield _describe_row(one.shown, case, estimate_median(rounds) if rounds else None)


def _describe_row(device: str, case: CaseVerdict, latency: Estimate | None) -> Row:
    return Row(
        device=device,
        format=case.key.format,
        model=case.key.model,
        variant=case.key.variant,
        verdict=case.verdict,
        sign=SIGNS.get(case.verdict, "?"),
        latency=show_time(latency),
        interval=show_time_interval(latency) if latency else "",
        ratio=f"{TIMES} {case.ratio.value:.3f}" if case.ratio else UNKNOWN,
        ratio_interval=_show_fine_interval(case.ratio) if case.ratio else "",
        reason=f"{case.step}; against the last night: {case.reason}" if case.step else case.reason,
    )


def _show_fine_interval(ratio: Estimate) -> str:
    """Show an interval with three decimals: nights are compared for changes of one per cent."""
    if ratio.low is None or ratio.high is None:
        return show_ratio_interval(ratio)
    return f"[{ratio.low:.3f}, {ratio.high:.3f}]"


def _make_line(night: NightRecord, columns: Sequence[str]) -> Line:
    return Line(
        number=night.number,
        began=night.started_utc[:16].replace("T", " "),
        cells=tuple(_make_cell(night.find(device)) for device in columns),
        exit=UNKNOWN if night.exit_code is None else str(night.exit_code),
    )


def _make_cell(one: DeviceNight | None) -> Cell:
    if one is None:
        return Cell(sign="", short="", reason="not planned")
    if one.gap is not None:
        sign = _GAP if one.run else _ABSENT
        return Cell(sign=sign, short=one.error or one.gap, reason=one.gap)
    verdicts = [case.verdict for case in (*one.cases, *one.energies)]
    for verdict in ("worse", "better", "unknown"):
        if verdict in verdicts:
            many = f"{verdicts.count(verdict)} {verdict}"
            return Cell(sign=SIGNS[verdict], short=many, reason=many)
    return Cell(sign=SIGNS["same"], short="", reason="every case the same")
