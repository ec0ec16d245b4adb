"""The report of a run: one self-contained HTML page, headline first, that opens offline and prints well."""

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from rankship_benchmarks.bundle.bundle import Bundle, open_bundle
from rankship_benchmarks.judge.summary import TIMES, Summary, find_accuracy, summarise
from rankship_benchmarks.judge.validity import keep_valid
from rankship_benchmarks.measure.device_accuracy import DeviceScore, read_device_scores
from rankship_benchmarks.measure.profiles import Profiles, read_profiles
from rankship_benchmarks.report import accuracy_words as accuracy_table
from rankship_benchmarks.report import charts
from rankship_benchmarks.report import delegate_words as delegate_table
from rankship_benchmarks.report import energy_words as energy_table
from rankship_benchmarks.report import words as table
from rankship_benchmarks.report.earlier_runs import list_histories
from rankship_benchmarks.report.history_charts import draw_history
from rankship_benchmarks.report.profile_charts import draw_profile
from rankship_benchmarks.stats.steps import Night
from rankship_pipeline.flow.show import describe_lengths, describe_likeness, describe_refinement
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.records import Artifact
from rankship_pipeline.foundation.units import show_count, show_ns, show_percent

if TYPE_CHECKING:
    from markupsafe import Markup

_TEMPLATE = "page.html.j2"
_FRONT = "Dashed: the front, the best accuracy at or below each cost."
_SHAPES = "A marker's shape is the type of the weights, its fill the format."


@record
class Chart:
    """One chart with its heading and a sentence on how to read it."""

    heading: str
    reading: str
    svg: str


@record
class Fact:
    """One line of the page's conditions or provenance; `code` sets the value in a monospace font."""

    name: str
    value: str
    code: bool = False


@record
class Figure:
    """One headline number: its name, its value, and a detail in small print."""

    name: str
    value: str
    detail: str


def write_report(bundle_folder: Path, path: Path | None = None) -> Path:
    """Write a run's page, by default `report.html` beside its trials; returns its path."""
    bundle = open_bundle(bundle_folder)
    target = path or bundle_folder / "report.html"
    histories = list_histories(bundle_folder, bundle)
    scores = read_device_scores(bundle_folder)
    write_atomic(target, render_report(bundle, read_profiles(bundle_folder), histories, scores).encode())
    return target


def render_report(
    bundle: Bundle,
    profiles: Profiles | None = None,
    histories: Mapping[ArtifactKey, Sequence[Night]] = MappingProxyType({}),
    device_scores: Sequence[DeviceScore] = (),
) -> str:
    """Fill the page's template; every text is escaped, only the charts are markup."""
    from jinja2 import Environment, StrictUndefined

    summary = summarise(bundle)
    build = summary.header.build
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_read_template())
    return template.render(
        summary=summary,
        header=summary.header,
        build=build,
        plan=build.plan,
        chosen=find_accuracy(build, "compressed"),
        tokens=list(table.state_tokens(summary.results)),
        headline=_keep_together(table.state_headline(summary)),
        figures=_pick_figures(summary),
        charts=_draw_charts(summary),
        spreads=_draw_latencies(bundle, summary),
        energies=energy_table.list_energies(summary.results),
        delegated=delegate_table.list_delegated(summary.results),
        aggregates=delegate_table.list_aggregates(summary),
        delegate_words=delegate_table,
        device_scores=device_scores,
        accuracy_words=accuracy_table,
        energy_refusals=list(energy_table.state_refusals(summary)),
        energy_words=energy_table,
        earlier=_draw_histories(histories),
        profiles=profiles,
        profile_charts=_draw_profiles(profiles),
        conditions=_list_conditions(summary),
        provenance=_list_provenance(summary),
        describe_refinement=describe_refinement,
        mark_code=_mark_code,
        words=table,
        show_count=show_count,
        show_ns=show_ns,
        show_percent=show_percent,
        describe_likeness=describe_likeness,
    )


def read_style() -> str:
    """Read the page's style sheet, which other pages use too."""
    return _read_template().partition("<style>")[2].partition("</style>")[0]


def _read_template() -> str:
    return resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")


def _pick_figures(summary: Summary) -> list[Figure]:
    """Pick the headline numbers."""
    build = summary.header.build
    kept = build.plan.total_parameters
    sizes = f"{show_count(build.dense_parameters)} → {show_count(kept)}"
    figures = [Figure(name="fewer parameters", value=f"{build.dense_parameters / kept:.1f}{TIMES}", detail=sizes)]
    before, after = find_accuracy(build, "dense"), find_accuracy(build, "compressed")
    if before and after:
        measure = build.measure
        change = measure.scale(after.value) - measure.scale(before.value)
        name, value = (
            (f"{measure.name}, points", f"{change:+.1f}") if measure.unit else (measure.heading, f"{change:+.3g}")
        )
        detail = f"{before.show()} → {after.show()}"
        figures.append(Figure(name=name, value=value.replace("-", "\u2212"), detail=detail))
    for one in table.list_headlined(summary.results):
        if one.ratio:
            detail = table.show_ratio_interval(one.ratio) or "too few rounds for an interval"
            verdict = table.state_verdict(one.ratio)
            name = f"latency, {one.key.way}" + (f": {verdict}" if verdict else "")
            figures.append(Figure(name=name, value=f"{TIMES} {one.ratio.value:.2f}", detail=detail))
    return figures


def _draw_charts(summary: Summary) -> list[Chart]:
    """Draw the charts of scores and ranks that the run has data for."""
    plan, measure = summary.header.build.plan, summary.header.build.measure
    title = measure.name[0].upper() + measure.name[1:]
    up = "Up is better" if measure.higher_is_better else "Down is better"
    bars = "" if not measure.unit else " The bars are 95 % intervals over test inputs."
    drawn = [
        Chart(
            heading=f"{title} and size",
            reading=f"{_FRONT} Hollow: other ways to choose the ranks, evaluated on the host, not exported, not timed."
            if summary.header.build.alternatives
            else f"{up}, left is smaller. {_FRONT}{bars}",
            svg=charts.draw_accuracy_against_size(summary),
        ),
        Chart(
            heading=f"{title} and bytes",
            reading=f"Left is smaller, {up.lower()}. {_SHAPES} {_FRONT}{bars}",
            svg=charts.draw_accuracy_against_bytes(summary),
        ),
        Chart(
            heading=f"{title} and latency",
            reading=f"Left is faster, {up.lower()}. {_SHAPES} {_FRONT} The bars are 95 % intervals, over rounds and "
            "over test inputs.",
            svg=charts.draw_accuracy_against_latency(summary),
        ),
        Chart(
            heading=f"{title} and energy",
            reading=f"Left uses less, {up.lower()}. {_SHAPES} {_FRONT} The meter is named with the energy table.",
            svg=charts.draw_accuracy_against_energy(summary),
        ),
        Chart(
            heading="Rank kept in each layer",
            reading="A factored layer runs as two or three smaller operators; the number is the width between them. "
            "A type of weights is named where it is not float32.",
            svg=charts.draw_ranks(plan),
        ),
        Chart(
            heading="What ranks and bits cost",
            reading="Each layer's output energy that its ranks and bits lose, predicted on calibration data.",
            svg=charts.draw_errors(plan),
        ),
    ]
    return [chart for chart in drawn if chart.svg]


def _draw_latencies(bundle: Bundle, summary: Summary) -> list[Chart]:
    """Draw each format's distribution of latencies."""
    return [
        Chart(
            heading=f"Every inference, {format_}",
            reading="One thin curve for each round, all samples; the ticks at 50 % are the rounds' medians.",
            svg=charts.draw_latencies(keep_valid(bundle.trials), format_),
        )
        for format_ in summary.runtimes
    ]


def _draw_histories(histories: Mapping[ArtifactKey, Sequence[Night]]) -> list[Chart]:
    """Draw each case's latency through the runs before this one."""
    drawn = [
        Chart(
            heading=f"{key.format}, {key.model}",
            reading=f"{len(nights)} runs, this one last.",
            svg=draw_history(f"earlier-{place}", key.variant, nights, (), noun="run"),
        )
        for place, (key, nights) in enumerate(sorted(histories.items(), key=lambda pair: pair[0].order))
    ]
    return [chart for chart in drawn if chart.svg]


def _draw_profiles(profiles: Profiles | None) -> list[Chart]:
    """Draw where each format's time goes."""
    formats = dict.fromkeys(one.key.format for one in profiles.profiles) if profiles else {}
    drawn = [
        Chart(
            heading=f"Every operator, {format_}",
            reading="Profiled, in whole microseconds, with the runtime's names; top to bottom in running order.",
            svg=draw_profile(profiles.profiles if profiles else (), format_),
        )
        for format_ in formats
    ]
    return [chart for chart in drawn if chart.svg]


def _list_conditions(summary: Summary) -> list[Fact]:
    """List the conditions of the measurement."""
    header = summary.header
    fewest = min(one.fewest_samples for one in summary.results)
    most = max(one.most_samples for one in summary.results)
    samples = show_count(fewest) if fewest == most else f"{show_count(fewest)} to {show_count(most)}"
    facts = [
        Fact(name="device", value=header.device),
        Fact(name="rounds", value=str(header.rounds)),
        Fact(name="samples per round", value=samples),
        Fact(name="threads", value=str(summary.threads)),
    ]
    for format_, runtime in summary.runtimes.items():
        place = f"Python {runtime.python}, {runtime.machine}, kernel {runtime.kernel}"
        facts.append(Fact(name=f"{format_} runtime", value=f"{runtime.name} {runtime.version}; {place}"))
    facts += [Fact(name=name, value=_shorten(value)) for name, value in sorted(header.conditions.items())]
    return [*facts, Fact(name="retries", value=str(sum(one.retries for one in summary.results)))]


def _list_provenance(summary: Summary) -> list[Fact]:
    """List what produced the artifacts and the numbers, by hash and version."""
    header = summary.header
    facts = [
        Fact(name="run", value=header.run_id, code=True),
        Fact(name="started", value=header.created_utc),
        Fact(name="rankship", value=header.rankship_version),
        Fact(name="recipe", value=f"{header.recipe} {header.recipe_sha256}", code=True),
        Fact(name="suite", value=header.suite_sha256, code=True),
        Fact(name="build record", value=header.build_sha256, code=True),
        Fact(name="agent", value=summary.agent_sha256, code=True),
    ]
    sources = _merge(one.source_sha256 for one in header.build.artifacts)
    facts += [Fact(name=f"source {_shorten(name)}", value=sha256, code=True) for name, sha256 in sources.items()]
    toolchain = _merge(one.toolchain for one in header.build.artifacts)
    facts.append(Fact(name="toolchain", value=", ".join(f"{name} {version}" for name, version in toolchain.items())))
    facts += [Fact(name="shapes", value=line) for line in describe_lengths(header.build)]
    return [*facts, *(_name_artifact(one) for one in header.build.files)]


def _name_artifact(artifact: Artifact) -> Fact:
    return Fact(name=artifact.key.title, value=artifact.sha256, code=True)


def _merge(tables: Iterable[dict[str, str]]) -> dict[str, str]:
    return dict(sorted({name: value for entries in tables for name, value in entries.items()}.items()))


def _keep_together(text: str) -> str:
    """Forbid line breaks inside intervals, before a per cent sign and after a multiplication sign."""
    return re.sub(rf"(?<=\d) (?=%)|(?<={TIMES}) (?=\d)|(?<=\d,) (?=[\d.]+\])", "\u00a0", text)


def _mark_code(text: str) -> "Markup":
    """Escape a text and mark what is between backticks as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r'<span class="code">\1</span>', str(escape(text))))  # noqa: S704 - escaped


def _shorten(text: str) -> str:
    """Drop the folders of an absolute path: a report does not show the host's folders."""
    return Path(text).name if Path(text).is_absolute() else text
