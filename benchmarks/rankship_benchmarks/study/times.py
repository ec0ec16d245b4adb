"""Times a study's files on this machine, in interleaved rounds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from rankship_benchmarks.stats.estimates import Estimate, estimate_median
from rankship_benchmarks.study.files import FileCell, find_file, find_samples
from rankship_pipeline.foundation.artifact_key import ArtifactKey, Variant
from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.frozen import record
from rankship_targets.session.runner import HostRunner
from rankship_targets.trials.request import MeasureRequest

TIMES = "times.json"
_SAMPLES, _LASTING_MS, _WARMUP_MS = 50, 100, 200  # of a trial: the fewest, the least, the most


@record
class Times:
    """The median latency of an inference of each file over `rounds`, in ns, by the file's SHA-256."""

    rounds: int
    threads: int
    latency_ns: dict[str, Estimate]


def time_files(
    cells: Sequence[FileCell], results: Path, steps: Steps, *, rounds: int, threads: int
) -> Mapping[str, Estimate]:
    """Time all files, unless they were timed as often; nothing for 0 rounds."""
    path, unlike = results / TIMES, {cell.sha256: cell for cell in cells}
    if rounds == 0 or not cells:
        return {}
    if path.is_file():
        known = decode(Times, path.read_bytes(), where=str(path))
        if (known.rounds, known.threads) == (rounds, threads) and set(unlike) <= set(known.latency_ns):
            return known.latency_ns
    runner = HostRunner(threads)
    medians: dict[str, list[float]] = {sha256: [] for sha256 in unlike}
    with steps.step(f"time {len(unlike)} files in {rounds} rounds"):
        for number in range(rounds):
            for sha256, cell in unlike.items():
                medians[sha256].append(median(runner.time(_make_request(cell, results, number, threads))))
    found = {sha256: estimate_median(values) for sha256, values in medians.items()}
    write_atomic(path, encode(Times(rounds=rounds, threads=threads, latency_ns=found)).encode())
    return found


def _make_request(cell: FileCell, results: Path, number: int, threads: int) -> MeasureRequest:
    variant: Variant = "compressed" if cell.plan else "dense"
    return MeasureRequest(
        round=number,
        key=ArtifactKey(variant=variant, format=cell.format, precision=cell.precision),
        artifact=str(find_file(cell, results).resolve()),
        artifact_sha256=cell.sha256,
        inputs=tuple(str(one.resolve()) for one in find_samples(cell, results)),
        threads=threads,
        min_samples=_SAMPLES,
        min_duration_ms=_LASTING_MS,
        max_warmup_ms=_WARMUP_MS,
    )
