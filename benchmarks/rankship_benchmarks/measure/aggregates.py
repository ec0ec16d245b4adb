"""Delegates that only LiteRT's `benchmark_model` reaches: its figures are kept, and no verdict is made of them.

They follow the timed rounds: the program prints no samples, chooses its own warm-up, and does not give the outputs, so
that nothing can be interleaved, compared, or proven.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rankship_benchmarks.bundle.bundle import append_aggregate, open_bundle
from rankship_benchmarks.bundle.suite import Suite
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.delegates import find_facts
from rankship_pipeline.foundation.records import Artifact
from rankship_targets.session.session import Session
from rankship_targets.trials.request import MeasureRequest


def take_aggregates(
    folder: Path,
    artifacts: Sequence[Artifact],
    make_request: Callable[[int, Artifact], MeasureRequest],
    suite: Suite,
    session: Session,
    steps: Steps,
) -> None:
    """Run the program once a round on each file, as far as the bundle lacks it; call it inside `writing(folder)`."""
    cases = list(list_aggregated(artifacts, suite))
    done = {(one.round, one.key) for one in open_bundle(folder).aggregates}
    wanted = [(number, case, key) for number in range(suite.rounds) for case, key in cases if (number, key) not in done]
    if not wanted:
        return
    with steps.track(f"benchmark_model on {session.device.name}", len(wanted)) as advance:
        for number, case, key in wanted:
            advance(f"round {number + 1}/{suite.rounds}: {key.title}")
            found = session.benchmark(replace(make_request(number, case), key=key))
            append_aggregate(folder, found)
            if found.share == "not" and number == 0:
                steps.note(f"nothing shows that the {find_facts(key).title} ran any part of {key.title}")


def list_aggregated(artifacts: Sequence[Artifact], suite: Suite) -> Iterator[tuple[Artifact, ArtifactKey]]:
    """Yield the files that the program is asked to run, and each one's key with its delegate; none that generates."""
    for artifact in artifacts:
        if artifact.generation is None and artifact.key.variant != "canary":
            for one in suite.delegates.list_chosen(artifact.key.format) or ():
                if one.asked == "benchmark_model":
                    yield artifact, replace(artifact.key, delegate=one.delegate)
