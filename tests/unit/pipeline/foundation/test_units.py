import pytest

from rankship_pipeline.foundation.units import show_seconds


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min"), (150, "2 min"), (3600, "1 h 0 min")],
)
def test_seconds_have_no_more_digits_than_anyone_reads(seconds: float, shown: str) -> None:
    assert show_seconds(seconds) == shown
