"""Nothing is collected in the body, and the collector is left as it was found."""

import gc
from collections.abc import Iterator

import pytest

from rankship_pipeline.export.collector import pause_collector


@pytest.fixture(params=[True, False])
def enabled(request: pytest.FixtureRequest) -> Iterator[bool]:
    if not request.param:
        gc.disable()
    yield request.param
    gc.enable()


def test_the_collector_rests_meanwhile_and_is_then_as_before(*, enabled: bool) -> None:
    with pause_collector():
        assert not gc.isenabled()
    assert gc.isenabled() is enabled


def test_the_collector_goes_on_after_a_failure() -> None:
    with pytest.raises(KeyError), pause_collector():
        raise KeyError
    assert gc.isenabled()
