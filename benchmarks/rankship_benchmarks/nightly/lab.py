"""The page of a lab: its devices and their health, every case's last figures, the last nights, and every run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median

from sqlalchemy import Engine, select

from rankship_benchmarks.bundle.bundle import Bundle, open_bundle
from rankship_benchmarks.index.tables import CASES, RUNS
from rankship_benchmarks.nightly.histories import list_histories
from rankship_benchmarks.nightly.page import PAGE, SIGNS, list_calendar, list_standing, open_template, state_headline
from rankship_benchmarks.nightly.records import DeviceNight, NightRecord
from rankship_benchmarks.report.energy_words import energy_unit
from rankship_benchmarks.report.page import read_style
from rankship_benchmarks.report.words import UNKNOWN
from rankship_pipeline.foundation.artifact_key import VARIANTS, ArtifactKey
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.quality import Measure
from rankship_pipeline.foundation.units import show_bytes, show_celsius, show_ns
from rankship_targets.devices.device import Device
from rankship_targets.devices.quarantine import LIMIT, Troubles, describe, read_troubles

LAB_PAGE = "lab.html"
_NIGHTS = 30  # that a device's health is counted over
_MOST_RUNS = 1000  # rows of the table of runs: the newest
_KEY = tuple(one.name for one in fields(ArtifactKey))


@record
class DeviceLine:
    """One device: how it is (`state` is good, failing, quarantine or idle), why, and what it is."""

    name: str
    state: str
    way: str
    health: tuple[str, ...]
    facts: tuple[str, ...]


@record
class CaseLine:
    """One case's last figures, as text; `night` is the number of the night that they are from, or the run's day."""

    device: str
    recipe: str
    format: str
    model: str
    variant: str
    verdict: str
    latency: str
    interval: str
    energy: str
    score: str
    size: str
    when: str


@record
class RunLine:
    """One run of the index; `report` is the path of its page from the lab's, empty if none was drawn."""

    folder: str
    created: str
    device: str
    recipe: str
    build: str
    state: str
    report: str


def write_lab(results: Path, engine: Engine, nights: Sequence[NightRecord], devices: Mapping[str, Device]) -> Path:
    """Write the page beside the runs; returns its path. `engine` is the refreshed index of these results."""
    path = results / LAB_PAGE
    write_atomic(path, render_lab(results, engine, nights, devices).encode())
    return path


def render_lab(results: Path, engine: Engine, nights: Sequence[NightRecord], devices: Mapping[str, Device]) -> str:
    """Fill the page's template; every text is escaped."""
    rows = _read_runs(engine)
    measured = dict.fromkeys(str(row["device"]) for row in rows if row["device"])
    names = [name for name in (*devices, *measured) if name in measured or devices[name].transport != "local"]
    lines = [_describe_device(name, devices.get(name), results, nights, rows) for name in dict.fromkeys(names)]
    columns, calendar = list_calendar(nights[-_NIGHTS:])
    histories = list_histories(engine, nights) if nights else {}
    return open_template("lab.html.j2").render(
        headline=_state_headline(lines, nights),
        devices=lines,
        cases=list(_list_cases(engine, rows, nights)),
        standing=list_standing(nights, histories) if nights else [],
        columns=columns,
        calendar=calendar,
        runs=[_describe_run(row, results) for row in rows[:_MOST_RUNS]],
        left=max(0, len(rows) - _MOST_RUNS),
        nightly=PAGE if (results / PAGE).exists() else "",
        signs=SIGNS,
        style=read_style(),
    )


def _state_headline(lines: Sequence[DeviceLine], nights: Sequence[NightRecord]) -> str:
    bad = [f"{one.name} {_STATES[one.state]}" for one in lines if one.state in {"failing", "quarantine"}]
    many = f"{len(lines)} device{'' if len(lines) == 1 else 's'}"
    text = f"{many}: {', '.join(bad)}" if bad else f"{many}, none in trouble"
    if not nights:
        return f"{text}; no night yet."
    last = nights[-1]
    told = last.failure or (state_headline(last) if last.finished_utc else "it is not over.")
    return f"{text}; night {last.number}: {told}"


_STATES = {"good": "works", "failing": "failed last time", "quarantine": "is in quarantine", "idle": "never measured"}


def _describe_device(
    name: str,
    device: Device | None,
    results: Path,
    nights: Sequence[NightRecord],
    rows: Sequence[Mapping[str, object]],
) -> DeviceLine:
    troubles = None if device is None else read_troubles(device)
    mine = [one for night in nights[-_NIGHTS:] for one in night.devices if name in {one.device, one.measured_on}]
    last = next((row for row in rows if row["device"] == name and row["damage"] is None), None)
    bundle = None if last is None else _open(results / str(last["folder"]))
    way = "not in the inventory" if device is None else device.transport if device.twin is None else "emulated"
    return DeviceLine(
        name=name,
        state=_judge_health(troubles, mine, measured=last is not None),
        way=way,
        health=tuple(_list_health(name, troubles, mine)),
        facts=() if bundle is None else tuple(_list_facts(bundle)),
    )


def _judge_health(troubles: Troubles | None, mine: Sequence[DeviceNight], *, measured: bool) -> str:
    if troubles is not None:
        return "quarantine" if len(troubles.failures) >= LIMIT else "failing"
    if mine and mine[-1].gap is not None:
        return "failing"
    return "good" if measured else "idle"


def _list_health(name: str, troubles: Troubles | None, mine: Sequence[DeviceNight]) -> Iterator[str]:
    if troubles is not None:
        yield describe(troubles)
    if mine:
        counted = sum(one.gap is None and one.measured_on == name for one in mine)
        yield f"{counted} of its last {len(mine)} nights count"
    gaps = [one.gap for one in mine if one.gap is not None]
    if gaps:
        yield f"last gap: {gaps[-1]}"
    losses = [loss for one in mine for loss in one.losses]
    if losses:
        yield f"lost in {len(losses)} tries; last: {': '.join(losses[-1].split(': ')[:2])}"  # whose message may be long


def _list_facts(bundle: Bundle) -> Iterator[str]:
    """Yield what the device's newest run says of it."""
    conditions, trials = bundle.header.conditions, bundle.trials
    for name in ("stand-in", "processor", "memory", "kernel"):
        if name in conditions:
            yield f"{name}: {conditions[name]}"
    yield from sorted({f"{one.runtime.name} {one.runtime.version}" for one in trials})
    yield from sorted({f"governor: {one.before.governor}" for one in trials if one.before.governor})
    heat = [one.after.temperature_mc for one in trials if one.after.temperature_mc is not None]
    if heat:
        yield f"after trials: {show_celsius(round(median(heat)))}, at most {show_celsius(max(heat))}"
    unmet = sorted({one for trial in trials for one in trial.conditions.unmet})
    yield from (f"could not be set: {one}" for one in unmet)


def _open(folder: Path) -> Bundle | None:
    try:
        return open_bundle(folder)
    except InputError:
        return None


def _read_runs(engine: Engine) -> list[Mapping[str, object]]:
    """Read every run of the index, the newest first."""
    with engine.connect() as connection:
        rows = [dict(row) for row in connection.execute(select(RUNS)).mappings()]
    return sorted(rows, key=lambda row: str(row["created_utc"] or ""), reverse=True)


def _list_cases(
    engine: Engine, rows: Sequence[Mapping[str, object]], nights: Sequence[NightRecord]
) -> Iterator[CaseLine]:
    """Yield the last figures of each case that was ever measured, by device, recipe and case."""
    runs = {row["id"]: row for row in rows}
    numbers = {one.run: night.number for night in nights for one in night.devices if one.run}
    verdicts = {(one.run, case.key): case.verdict for night in nights for one in night.devices for case in one.cases}
    newest: dict[tuple[str, str, ArtifactKey], tuple[str, CaseLine]] = {}
    with engine.connect() as connection:
        for row in connection.execute(select(CASES)).mappings():
            run, key = runs[row["run"]], ArtifactKey(**{name: row[name] for name in _KEY})
            created = str(run["created_utc"] or "")
            place = (str(run["device"]), str(run["recipe"]), key)
            if key.variant in VARIANTS and created >= newest.get(place, ("",))[0]:
                night = numbers.get(str(run["folder"]))
                when = f"night {night}" if night else created[:10]
                verdict = verdicts.get((str(run["folder"]), key), "")
                newest[place] = created, _describe_case(place, dict(row), verdict, when)
    for place in sorted(newest, key=lambda place: (place[0], place[1], place[2].order)):
        yield newest[place][1]


def _describe_case(place: tuple[str, str, ArtifactKey], row: Mapping[str, object], verdict: str, when: str) -> CaseLine:
    device, recipe, key = place
    time, low, high = (row[name] for name in ("latency_ns", "latency_low_ns", "latency_high_ns"))
    score, energy = row["score"], row["energy_nj"]
    measure = Measure(unit="%" if row["score_unit"] == "%" else "")
    return CaseLine(
        device=device,
        recipe=recipe,
        format=key.format,
        model=key.model,
        variant=key.variant,
        verdict=verdict,
        latency=show_ns(time) if isinstance(time, float) else UNKNOWN,
        interval=f"[{show_ns(low)}, {show_ns(high)}]" if isinstance(low, float) and isinstance(high, float) else "",
        energy=_show_energy(energy, row["provenance"]) if isinstance(energy, int) else UNKNOWN,
        score=f"{row['score_measure']} {measure.show(score)}" if isinstance(score, float) else UNKNOWN,
        size=show_bytes(int(str(row["size_bytes"]))),
        when=when,
    )


def _show_energy(value_nj: int, provenance: object) -> str:
    """Show an energy with where it comes from: "1.23 mJ, measured"."""
    scale, unit = energy_unit(value_nj)
    return f"{value_nj / scale:.3g} {unit}, {provenance}"


def _describe_run(row: Mapping[str, object], results: Path) -> RunLine:
    folder = str(row["folder"])
    report = f"{folder}/report.html"
    state = "finished" if row["finished"] else "unfinished"
    return RunLine(
        folder=folder,
        created=str(row["created_utc"] or "")[:16].replace("T", " "),
        device=str(row["device"] or ""),
        recipe=str(row["recipe"] or ""),
        build=str(row["build_sha256"] or "")[:12],
        state=state if row["damage"] is None else f"cannot be read: {row['damage']}",
        report=report if (results / report).exists() else "",
    )
