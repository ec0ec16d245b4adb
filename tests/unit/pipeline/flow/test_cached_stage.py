"""A stage that is computed once, and what shows that it is not computed inside a folder that may be swept."""

from pathlib import Path

from rankship_pipeline.flow.cached_stage import as_record, cached_stage
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.store import Store

NUMBERS = as_record(dict[str, float], "numbers.json")


def test_a_stage_is_computed_once_and_read_ever_after(tmp_path: Path) -> None:
    store, steps, computed = Store(tmp_path), Steps(quiet=True), []

    def compute() -> dict[str, float]:
        computed.append(list(tmp_path.iterdir()))
        return {"one": 1.0}

    for _ in range(2):
        kept = cached_stage(store, "numbers", {"a": 1}, NUMBERS, compute, steps=steps, title="count")
        assert kept.value == {"one": 1.0}
    assert computed == [[]], "computed once, before anything that a sweep could delete lies in the store"
    assert list(steps.seconds) == ["count"]
    other = cached_stage(store, "numbers", {"a": 2}, NUMBERS, compute)
    assert other.content == kept.content, "the same result, whatever made it"
    assert other.entry.key != kept.entry.key
