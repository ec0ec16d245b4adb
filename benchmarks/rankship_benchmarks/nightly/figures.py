"""Each case's energy and accuracy over the nights, for charts: read from the index; a night without one is a gap."""

from collections.abc import Mapping, Sequence
from dataclasses import fields

from sqlalchemy import Engine, select

from rankship_benchmarks.index.tables import CASES, RUNS
from rankship_benchmarks.nightly.histories import Case
from rankship_benchmarks.nightly.records import NightRecord
from rankship_benchmarks.report.energy_words import energy_unit
from rankship_benchmarks.report.history_charts import Point
from rankship_benchmarks.stats.estimates import CONFIDENCE, Estimate, estimate_median
from rankship_benchmarks.stats.steps import Night
from rankship_pipeline.foundation.artifact_key import VARIANTS, ArtifactKey
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.quality import Measure

_KEY = tuple(one.name for one in fields(ArtifactKey))


@record
class Figure:
    """One figure of one case, night after night, in the axis's unit; `drawn` says what a point and its bar are.

    `most` is the largest value that it can have, None where there is none.
    """

    name: str
    axis: str
    drawn: str
    points: tuple[Point, ...]
    most: float | None = None


@record
class _Row:
    """One case of one run, as the index has it; None where it was not measured."""

    energy_nj: int | None
    energy_uncertainty_nj: int | None
    score: float | None
    score_low: float | None
    score_high: float | None
    score_measure: str | None
    score_unit: str | None


_COLUMNS = tuple(one.name for one in fields(_Row))


@record
class Figures:
    """Every figure that has a number: energies by case, scores by the model's name ("dense", "compressed, int8")."""

    energies: dict[Case, Figure]
    scores: dict[str, Figure]


NO_FIGURES = Figures(energies={}, scores={})


def read_figures(engine: Engine, nights: Sequence[NightRecord]) -> Figures:
    """Read the energies of all nights, and the scores of the last night's recipe.

    A score is that of the torch model behind the files: one for all formats and devices, and it changes with the build.
    """
    rows = _read_rows(engine, {one.run for night in nights for one in night.devices if one.run})
    energies: dict[Case, Figure] = {}
    models: dict[str, ArtifactKey] = {}
    for night in nights:
        for one in night.devices:
            for key in rows.get(one.run or "", {}):
                case = Case(device=str(one.measured_on), recipe=night.recipe, key=key)
                figure = None if case in energies else _draw_energy(_follow(case, nights, rows))
                energies |= {case: figure} if figure else {}
                models |= {_name_model(key): key} if night.recipe == nights[-1].recipe else {}
    scores = {name: _draw_score(_follow_model(key, nights, rows)) for name, key in models.items()}
    return Figures(energies=energies, scores={name: one for name, one in scores.items() if one is not None})


def draw_rate(nights: Sequence[Night]) -> Figure:
    """Return a case's tokens a second, where one sample is one token: the inverse of its latencies."""
    levels = [estimate_median(night.rounds_ns) if night.rounds_ns else None for night in nights]
    points = [
        Point(
            run_id=night.run_id,
            started_utc=night.started_utc,
            level=None if level is None else _make_level(1e9 / level.value, _invert(level.high), _invert(level.low)),
        )
        for night, level in zip(nights, levels, strict=True)
    ]
    return Figure(name="tokens/s", axis="tokens a second", drawn="median, 95 % interval", points=tuple(points))


def _invert(time_ns: float | None) -> float | None:
    return None if time_ns is None else 1e9 / time_ns


_Followed = list[tuple[str, str, _Row | None]]  # each night's run, when the night began, its row; None for a gap


def _follow(case: Case, nights: Sequence[NightRecord], rows: Mapping[str, Mapping[ArtifactKey, _Row]]) -> _Followed:
    return [
        (one.run or "", night.started_utc, None if one.gap else rows.get(one.run or "", {}).get(case.key))
        for night in nights
        for one in night.devices
        if night.recipe == case.recipe and one.measured_on == case.device
    ]


def _name_model(key: ArtifactKey) -> str:
    """Name the torch model behind a file: its variant, and its precision unless that is float32."""
    return key.variant if key.precision == "float32" else f"{key.variant}, {key.precision}"


def _follow_model(
    key: ArtifactKey, nights: Sequence[NightRecord], rows: Mapping[str, Mapping[ArtifactKey, _Row]]
) -> _Followed:
    """Follow a model over the nights of the last one's recipe, whatever format or device it was measured in."""
    followed: _Followed = []
    for night in nights:
        runs = [one.run for one in night.devices if one.run] if night.recipe == nights[-1].recipe else []
        found = [
            row for run in runs for other, row in rows.get(run, {}).items() if _name_model(other) == _name_model(key)
        ]
        if runs:
            followed.append((runs[0], night.started_utc, found[0] if found else None))
    return followed


def _draw_energy(followed: _Followed) -> Figure | None:
    divisor, unit = energy_unit(max((row.energy_nj or 0 for _, _, row in followed if row), default=0))
    points = []
    for run, started, row in followed:
        level = None
        if row is not None and row.energy_nj is not None:
            margin = row.energy_uncertainty_nj
            low, high = (None, None) if margin is None else (row.energy_nj - margin, row.energy_nj + margin)
            level = _make_level(row.energy_nj, low, high, divisor)
        points.append(Point(run_id=run, started_utc=started, level=level))
    if not any(one.level for one in points):
        return None
    drawn = "total, meter's ± and 95 %"
    return Figure(name="energy", axis=f"energy of an inference ({unit})", drawn=drawn, points=tuple(points))


def _draw_score(followed: _Followed) -> Figure | None:
    known = [row for _, _, row in followed if row is not None and row.score is not None]
    if not known:
        return None
    name = known[-1].score_measure or "accuracy"
    measure = Measure(name=name, unit="%" if known[-1].score_unit == "%" else "")
    points = []
    for run, started, row in followed:
        level = None
        if row is not None and row.score is not None and row.score_measure == name:
            low, high = (None if one is None else measure.scale(one) for one in (row.score_low, row.score_high))
            level = _make_level(measure.scale(row.score), low, high)
        points.append(Point(run_id=run, started_utc=started, level=level))
    axis = f"{name} ({measure.unit})" if measure.unit else name
    drawn = "score, 95 % interval" if known[-1].score_low is not None else "score"
    most = 100.0 if measure.unit else None
    return Figure(name=name, axis=axis, drawn=drawn, points=tuple(points), most=most)


def _make_level(value: float, low: float | None, high: float | None, divisor: float = 1) -> Estimate:
    early, late = (None if one is None else one / divisor for one in (low, high))
    return Estimate(value=value / divisor, low=early, high=late, confidence=CONFIDENCE, rounds=1)


def _read_rows(engine: Engine, folders: set[str]) -> dict[str, dict[ArtifactKey, _Row]]:
    chosen = select(RUNS.c.folder, *(CASES.c[name] for name in _COLUMNS), *(CASES.c[name] for name in _KEY)).join(
        CASES, CASES.c.run == RUNS.c.id
    )
    found: dict[str, dict[ArtifactKey, _Row]] = {}
    with engine.connect() as connection:
        for folder, *values in connection.execute(chosen):
            key = ArtifactKey(**dict(zip(_KEY, values[len(_COLUMNS) :], strict=True)))
            if folder in folders and key.variant in VARIANTS:
                row = _Row(**dict(zip(_COLUMNS, values[: len(_COLUMNS)], strict=True)))
                found.setdefault(folder, {})[key] = row
    return found
