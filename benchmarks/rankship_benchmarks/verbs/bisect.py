"""The verb `bisect`: finds the night between two in which a case became slower or faster."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.flags import parse, start_parser

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rankship_benchmarks.judge.changes import Explanation
    from rankship_benchmarks.nightly.bisect import Bisection
    from rankship_benchmarks.nightly.records import NightRecord
    from rankship_pipeline.foundation.artifact_key import ArtifactKey


def bisect(argv: list[str]) -> int:
    """`rankship bisect NIGHT_A NIGHT_B --case CASE`: measure stored files until a step lies between two nights."""
    parser = start_parser(
        "bisect",
        "Measure the stored files of the nights between two again, until a case's step lies between two of them."
        " An interrupted search resumes.",
        "--inventory",
        "--results",
        "--store",
        epilog="Exit status: 0 the question is answered, 5 a comparison could not be decided.",
    )
    parser.add_argument("early", type=int, metavar="NIGHT_A", help="the number of the night before the step")
    parser.add_argument("late", type=int, metavar="NIGHT_B", help="the number of the night after it")
    parser.add_argument("--case", required=True, help='as the night prints it, for example "onnx compressed"')
    parser.add_argument("--on", default=None, metavar="DEVICE", help="the device (default: the one that measured it)")
    git = "a folder of your repository, to name the commits between the two nights that are found"
    parser.add_argument("--git", type=Path, default=None, metavar="FOLDER", help=git)
    parser.set_defaults(results=Path("rankship-nightly"))
    arguments = parse(parser, argv)

    from rich.console import Console

    from rankship_benchmarks.bundle.suite import default_suite
    from rankship_benchmarks.nightly.bisect import Kept, Look, bisect_files, list_kept
    from rankship_benchmarks.nightly.explain import Evidence, explain_runs
    from rankship_benchmarks.nightly.pair import Bench, measure_pair
    from rankship_benchmarks.nightly.records import list_nights
    from rankship_pipeline.foundation.codec import encode
    from rankship_pipeline.foundation.console import Steps
    from rankship_pipeline.foundation.errors import MeasurementError
    from rankship_pipeline.foundation.files import ensure_writable, write_atomic
    from rankship_pipeline.foundation.store import Store
    from rankship_targets.devices.device import find_device
    from rankship_targets.devices.quarantine import watching
    from rankship_targets.session.session import open_session

    nights, span = list_nights(arguments.results), (arguments.early, arguments.late)
    name, key = _choose_case(nights, span, arguments.case, arguments.on)
    store, steps = Store(arguments.store), Steps()
    kept = list_kept(arguments.results, nights, span, name, key, store)
    device = find_device(name, arguments.inventory)
    ensure_writable(arguments.results, "--results")
    folder = arguments.results / "bisect" / f"{span[0]}-{span[1]}-{name}-{'-'.join(key.heading.split())}"

    def compare(first: Kept, other: Kept) -> Look:
        suite = replace(default_suite(first.header.recipe), threads=first.threads)
        with watching(device), open_session(device, on_news=steps.note) as session:
            bench = Bench(session=session, store=store, folder=folder, suite=suite, steps=steps)
            pair, names = (first.header, other.header), (str(first.night), str(other.night))
            verdict = measure_pair(bench, pair, names, key)
        steps.note(f"night {other.night} against night {first.night}: {verdict.verdict}, {verdict.reason}")
        return Look(night=other.night, verdict=verdict.verdict, reason=verdict.reason, ratio=verdict.ratio)

    found = bisect_files(kept, compare)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "bisection.json", encode(found).encode())
    runs = {one.night: one.run for one in kept}
    evidence = Evidence(arguments.results, nights, arguments.git)
    why = explain_runs(evidence, (runs[found.low], runs[found.high]), key)
    _print_answer(found, why, key)
    Console(highlight=False).print(f"every trial: {folder}", markup=False, soft_wrap=True)
    return MeasurementError.exit_code if found.end == "unsure" else 0


def _print_answer(found: "Bisection", why: "Explanation", key: "ArtifactKey") -> None:
    """Print the answer and what differs between its two nights: of the device alone where the step is not in files."""
    from rich.console import Console

    from rankship_benchmarks.judge.changes import list_words

    console = Console(highlight=False)
    console.print(_state(found, key), style="bold", markup=False, soft_wrap=True)
    conditions = [str(one) for one in why.changes if one.about == "device"]
    lines = conditions or ["no condition of the device on record differs"]
    for line in lines if found.end == "no step" else list_words(why):
        console.print(f"    {line}", markup=False, soft_wrap=True)


def _state(found: "Bisection", key: "ArtifactKey") -> str:
    """State the answer in one sentence."""
    from rankship_benchmarks.judge.summary import TIMES

    low, high = found.low, found.high
    if found.end == "same file":
        return f"{key.heading}: nights {low} and {high} have the same file, so there is nothing to search in"
    last = found.looks[-1]
    if found.end == "no step":
        told = "take the same time today, so the step is not in the files"
        return f"{key.heading}: the files of nights {low} and {high} {told}"
    if found.end == "unsure":
        told = f"night {last.night} could not be judged: {last.reason}"
        if len(found.looks) == 1:
            return f"{key.heading}: whether nights {low} and {high} differ could not be decided; {told}"
        return f"{key.heading}: the step lies after night {low}, at the latest in night {high}; {told}"
    step = next(one for one in reversed(found.looks) if one.night == high)
    gone = f" (the files of {', '.join(map(str, found.between))} between them are gone)" if found.between else ""
    size = f", {TIMES} {step.ratio.value:.3f}" if step.ratio else ""
    before = next((one.verdict for one in reversed(found.looks) if one.night == low), "same")
    until = "the same" if before == "same" else before
    return f"{key.heading}: {step.verdict} since night {high}, {until} until night {low}{gone}{size}"


def _choose_case(
    nights: "Sequence[NightRecord]", span: tuple[int, int], heading: str, on: str | None
) -> "tuple[str, ArtifactKey]":
    """Choose the device and the case from what the later night measured; InputError with the choices if unclear."""
    if span[0] >= span[1]:
        raise InputError(f"night {span[0]} is not before night {span[1]}", hint="give the earlier night first")
    late = next((night for night in nights if night.number == span[1]), None)
    if late is None:
        raise InputError(f"there is no night {span[1]}", hint="name the folder of the nights with --results")
    measured = [(one.measured_on, case.key) for one in late.devices if one.measured_on for case in one.cases]
    known = [(device, key) for device, key in measured if key.heading == heading and on in {None, device}]
    if len(known) != 1:
        choices = "; ".join(f"{device}: {key.heading}" for device, key in measured) or "nothing"
        message = f"night {span[1]} measured {len(known)} cases {heading!r}{f' on {on}' if on else ''}"
        raise InputError(message, hint=f"it measured {choices}; choose by --case and --on")
    if known[0][1].phase is not None:
        message = f"{heading} is a phase of a file that generates, which bisect does not measure"
        raise InputError(message, hint="measure the builds of two nights by `rankship run`, and compare the runs")
    return known[0]
