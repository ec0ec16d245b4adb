"""Before anything is timed: what each case's delegate takes, as the device's runtime says, or the file."""

from collections.abc import Callable, Iterator, Sequence

from rankship_benchmarks.bundle.delegated import Delegated
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.delegates import DELEGATES, find_facts
from rankship_pipeline.foundation.errors import Lacks
from rankship_pipeline.foundation.formats import FACTS
from rankship_pipeline.foundation.records import Artifact
from rankship_pipeline.foundation.store import Store
from rankship_targets.session.session import Session
from rankship_targets.trials.request import MeasureRequest


def look_at_delegates(
    cases: Sequence[Artifact],
    make_request: Callable[[int, Artifact], MeasureRequest],
    store: Store,
    session: Session,
    steps: Steps,
) -> tuple[Delegated, ...]:
    """Ask for each case what its delegate takes, and say at once of which it takes nothing.

    Left out are cases without any delegate, the canary, files that generate, and runtimes that do not tell.
    """
    asked = [one for one in cases if _may_be_delegated(one)]
    if not asked:
        return ()
    with steps.step(f"see what delegates take on {session.device.name}"):
        found = tuple(_look(asked, make_request, store, session))
    for one in found:
        if one.took_nothing:
            steps.note(f"{find_facts(one.key).title} takes nothing of {one.key.title}: it runs on the processor alone")
    return found


def _may_be_delegated(case: Artifact) -> bool:
    facts = find_facts(case.key)
    own = not facts.takes and facts is DELEGATES[case.key.format][0]
    return not own and case.key.variant != "canary" and case.generation is None


def _look(
    cases: Sequence[Artifact],
    make_request: Callable[[int, Artifact], MeasureRequest],
    store: Store,
    session: Session,
) -> Iterator[Delegated]:
    for case in cases:
        if FACTS[case.key.format].holds_delegate:
            from rankship_pipeline.export.delegation import count_delegated  # now: this imports the exporter

            partitions, operators, left = count_delegated(store.root / case.file)
            source = "the file"
        else:
            try:
                taken = session.inspect(make_request(0, case))
            except Lacks:
                continue
            partitions, operators, left = taken.partitions, taken.operators, taken.left
            source = "the runtime"
        yield Delegated(key=case.key, partitions=partitions, operators=operators, left=left, source=source)
