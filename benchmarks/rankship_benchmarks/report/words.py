"""A summary as text and tables for a terminal or a pipe; the page uses the same text."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rankship_benchmarks.bundle.bundle import Header
from rankship_benchmarks.judge.cautions import CautionGroup
from rankship_benchmarks.judge.summary import TIMES, Result, Summary, find_accuracy
from rankship_benchmarks.stats.estimates import Estimate
from rankship_pipeline.flow.show import state_landing
from rankship_pipeline.foundation.console import start_table
from rankship_pipeline.foundation.quality import Measure, Score
from rankship_pipeline.foundation.records import Build, Verified
from rankship_pipeline.foundation.units import show_bytes, show_count, show_percent
from rankship_targets.devices.device import THIS_MACHINE

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

UNKNOWN = "\u2013"  # a dash where nothing was measured
_MS_FROM_NS = 1e7
_WHOLE_FROM = 100  # tokens in a second, shown without a decimal
NO_LABELS = "The data have no labels: accuracy here means agreement with the dense model's own answers."


def state_headline(summary: Summary) -> str:
    """Return the run in one sentence: parameters saved, the score before and after, latency ratios."""
    build = summary.header.build
    kept = build.plan.total_parameters
    parts = [f"{build.dense_parameters / kept:.1f}{TIMES} fewer parameters"]
    before, after = find_accuracy(build, "dense"), find_accuracy(build, "compressed")
    if before and after:
        parts.append(f"{build.measure.name} {before.show()} → {after.show()}")
    ratios = ", ".join(state_latency(one) for one in list_headlined(summary.results))
    parts += [f"latency {ratios}"] if ratios else []
    return f"{parts[0]}: {', '.join(parts[1:])}." if parts[1:] else f"{parts[0]}."


def list_headlined(results: Iterable[Result]) -> list[Result]:
    """Keep the results whose ratio stands for their artifact's: of one that generates, that of a token."""
    return [one for one in results if one.ratio is not None and one.key.phase != "prefill"]


def state_latency(result: Result) -> str:
    """Return one format's latency ratio, with a remark if it is not a proven gain."""
    ratio = result.ratio
    if ratio is None:
        return ""
    verdict = state_verdict(ratio)
    return f"{show_ratio(ratio)} ({result.key.way}{': ' if verdict else ''}{verdict})"


def state_verdict(ratio: Estimate) -> str:
    """Return why a ratio is not a proven gain; empty if its interval lies below 1."""
    if ratio.low is None or ratio.high is None:
        return "too few rounds to tell"
    if ratio.low > 1:
        return "slower"
    return "" if ratio.high < 1 else "not faster"


def show_ratio(ratio: Estimate) -> str:
    """Show a ratio and its interval: `0.46 [0.44, 0.48]` after a multiplication sign."""
    return " ".join(filter(None, (f"{TIMES} {ratio.value:.2f}", show_ratio_interval(ratio))))


def show_ratio_interval(ratio: Estimate) -> str:
    """Show a ratio's interval as `[0.44, 0.48]`; empty if there is none."""
    return "" if ratio.low is None or ratio.high is None else f"[{ratio.low:.2f}, {ratio.high:.2f}]"


def show_time(time: Estimate | None) -> str:
    """Show a time in µs below 10 ms, else in ms."""
    return UNKNOWN if time is None else f"{_scale(time, time.value)} {_unit(time)}"


def show_time_interval(time: Estimate) -> str:
    """Show a time's interval in the unit of its value; empty if there is none."""
    if time.low is None or time.high is None:
        return ""
    return f"[{_scale(time, time.low)}, {_scale(time, time.high)}]"


def show_rate(rate: Estimate | None) -> str:
    """Show tokens in a second; a dash if there are none."""
    return UNKNOWN if rate is None else f"{rate.value:,.{_choose_places(rate)}f}"


def show_rate_interval(rate: Estimate | None) -> str:
    """Show the interval of tokens in a second; empty if there is none."""
    if rate is None or rate.low is None or rate.high is None:
        return ""
    return f"[{rate.low:,.{_choose_places(rate)}f}, {rate.high:,.{_choose_places(rate)}f}]"


def state_tokens(results: Iterable[Result]) -> Iterator[str]:
    """Yield what the times of files that generate mean, and how they changed within trials; nothing without any."""
    timed = [one for one in results if one.key.phase is not None]
    if timed:
        yield (
            "prefill N: from an empty cache and a prompt of N tokens to the first token after it; "
            "decode: one token after the shortest prompt."
        )
    drifts = [f"{one.key.exported.heading} {show_drift(one.drift)}" for one in timed if one.drift is not None]
    if drifts:
        meaning = "the cache grows meanwhile, and a device that gets warm slows down"
        yield f"A token in the last tenth of a trial, over one in the first ({meaning}): {', '.join(drifts)}."


def show_drift(drift: Estimate) -> str:
    """Show how much longer the last tenth took than the first: `+1.2 % [0.4, 2.0]`."""
    ends = "" if drift.low is None or drift.high is None else f" [{100 * drift.low:+.1f}, {100 * drift.high:+.1f}]"
    return f"{100 * drift.value:+.1f} %{ends}".replace("-", "\u2212")


def show_score_interval(score: Score) -> str:
    """Show a score's interval without its unit, shares in per cent: `[95.2, 96.5]`; empty where there is none."""
    if score.low is None or score.high is None:
        return ""
    digits = ".1f" if score.measure.unit else ".4g"
    return f"[{score.measure.scale(score.low):{digits}}, {score.measure.scale(score.high):{digits}}]"


def show_size(value: int | None) -> str:
    """Show a size in a readable unit; a dash if not measured."""
    return UNKNOWN if value is None else show_bytes(value)


def print_summary(summary: Summary, console: "Console", *, verbose: bool = False) -> None:
    """Print headline, results, scores, alternatives and cautions: one line per group, or each if `verbose`."""
    header = summary.header
    console.print(state_headline(summary), style="bold", markup=False, highlight=False)
    threads = "1 thread" if summary.threads == 1 else f"{summary.threads} threads"
    details = f"recipe {header.recipe} · device {header.device} · {threads} · {header.rounds} rounds"
    console.print(details, markup=False, highlight=False)
    if header.build.answers != "labels":
        console.print(NO_LABELS, markup=False, highlight=False)
    if header.build.landing is not None:
        console.print(state_landing(header.build.landing), markup=False, highlight=False)
    console.print(_tabulate_results(summary.results, header.build.measure))
    for line in state_tokens(summary.results):
        console.print(line, markup=False, highlight=False)
    console.print(_tabulate_scores(header.build))
    if header.build.alternatives:
        console.print(_tabulate_alternatives(summary))
    for line in state_parity(header):
        console.print(line, markup=False, highlight=False)
    for note in summary.slower_notes:
        console.print(f"✗ {note}", style="red", markup=False, highlight=False)
    for line in state_cautions(summary.caution_groups, verbose=verbose):
        console.print(line, style="yellow", markup=False, highlight=False)


def state_cautions(groups: Iterable[CautionGroup], *, verbose: bool) -> Iterator[str]:
    """Yield a line per group, with what to do; then each of its cautions if `verbose`, else how many there are."""
    folded = 0
    for one in groups:
        yield " ".join(filter(None, (f"! {one.heading}", one.advice)))
        if verbose:
            yield from (f"  - {detail}" for detail in one.details)
        else:
            folded += len(one.details)
    if folded:
        yield f"! {folded} cautions in all: read them on the page, or with `rankship report RUN --verbose`."


def list_places(header: Header) -> list[str]:
    """List where parity is proven: this host, and the device if it is another machine."""
    return ["this host"] if header.device == THIS_MACHINE else ["this host", header.device]


def list_proven(results: Iterable[Result]) -> list[Result]:
    """Keep one result for each file and each delegate that computes it: phases of generating share a proof."""
    return list({(one.key.exported, one.key.delegate): one for one in reversed(list(results))}.values())[::-1]


def state_parity(header: Header) -> Iterator[str]:
    """Yield a line per place: how well the artifacts agree with torch there."""
    for place, proofs in zip(list_places(header), header.list_proofs(), strict=True):
        if not proofs:
            yield f"Parity on {place}: not proven."
            continue
        error = max(one.max_relative_error for one in proofs)
        cosine = min(one.min_cosine for one in proofs)
        agreements = [one.top1_agreement for one in proofs if one.top1_agreement is not None]
        choices = f", top-1 agreement {show_percent(min(agreements))}" if agreements else ""
        numbers = f"relative max error {error:.1e}, cosine {cosine:.7f}{choices}"
        yield f"Parity on {place}, worst of {len(proofs)} artifacts: {numbers}."


def show_agreement(proof: Verified) -> str:
    """Show the share of samples with the same class; a dash where no output holds classes' scores."""
    return UNKNOWN if proof.top1_agreement is None else show_percent(proof.top1_agreement)


def print_parity(proofs: Iterable[Verified], console: "Console") -> None:
    """Print every artifact's agreement with torch."""
    table = start_table("artifact", "runtime", "samples", "relative max error", "cosine", "top-1 agreement")
    for one in proofs:
        runtime = f"{one.runtime} {one.runtime_version}"
        numbers = f"{one.max_relative_error:.1e}", f"{one.min_cosine:.7f}", show_agreement(one)
        table.add_row(one.key.title, runtime, str(one.samples), *numbers)
    console.print(table)


def _tabulate_results(results: Sequence[Result], measure: Measure) -> "Table":
    generates = any(one.key.phase for one in results)
    headings = (
        "size\nparameters",
        f"{measure.heading}\n[95 %]",
        "latency\n[95 %]",
        *(["tokens/s\n[95 %]"] if generates else []),
        "vs dense\n[95 %]",
        "peak RSS\n(its own)",
    )
    table = start_table("format\nmodel", *headings)
    for one in results:
        accuracy, ratio, rate = one.accuracy, one.ratio, one.tokens_per_second
        table.add_row(
            f"{one.key.format}\n{one.key.model}",
            f"{show_size(one.size_bytes)}\n{show_count(one.parameters)}",
            f"{accuracy.show()}\n{show_score_interval(accuracy)}" if accuracy else UNKNOWN,
            f"{show_time(one.latency_ns)}\n{show_time_interval(one.latency_ns)}",
            *([f"{show_rate(rate)}\n{show_rate_interval(rate)}"] if generates else []),
            f"{TIMES} {ratio.value:.2f}\n{show_ratio_interval(ratio)}" if ratio else UNKNOWN,
            f"{show_size(one.peak_rss_bytes)}\n({show_size(one.model_rss_bytes)})",
            end_section=one.key.variant == "compressed",
        )
    return table


def _tabulate_scores(build: Build) -> "Table":
    measure = build.measure
    table = start_table(f"{measure.name} after", measure.heading, "95 % interval", "answers")
    for one in build.accuracies:
        count = show_count(one.samples)
        share = count if one.correct is None else f"{show_count(one.correct)} of {count} correct"
        table.add_row(_plain(one.stage), one.show(), show_score_interval(one) or UNKNOWN, share)
    return table


def _tabulate_alternatives(summary: Summary) -> "Table":
    build = summary.header.build
    table = start_table("ranks chosen by", "parameters", build.measure.heading, "95 % interval")
    chosen = find_accuracy(build, "compressed")
    rows = [(f"{build.plan.method} (this build)", build.plan.total_parameters, chosen)]
    rows += [(one.method, one.plan.total_parameters, one.accuracy) for one in build.alternatives]
    for method, parameters, accuracy in rows:
        value = accuracy.show() if accuracy else UNKNOWN
        table.add_row(
            _plain(method), show_count(parameters), value, show_score_interval(accuracy) if accuracy else UNKNOWN
        )
    return table


def _plain(text: str) -> str:
    """Escape text so that rich shows brackets as they are."""
    from rich.markup import escape

    return escape(text)


def _scale(time: Estimate, value: float) -> str:
    return f"{value / 1e3:,.1f}" if time.value < _MS_FROM_NS else f"{value / 1e6:,.2f}"


def _choose_places(rate: Estimate) -> int:
    return 0 if rate.value >= _WHOLE_FROM else 1


def _unit(time: Estimate) -> str:
    return "µs" if time.value < _MS_FROM_NS else "ms"
