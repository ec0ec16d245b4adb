import re

import pytest

from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.stream.progress import track_stages


def test_every_part_says_what_is_left_and_every_stage_ends(capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps()
    with track_stages(steps) as begin:
        for left in (3, 2, 1):
            begin("run blocks", f"block {3 - left}", left)
        begin("head", "norm", 1)
    said = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    shapes = [
        "· block 0; 3 left",
        r"· block 1; 2 left, about \S+ s",
        r"· block 2; 1 left, about \S+ s",
        r"✓ run blocks \S+ s",
        "· norm; 1 left",
        r"✓ head \S+ s",
    ]
    assert len(said) == len(shapes)
    assert all(re.fullmatch(shape, line) for shape, line in zip(shapes, said, strict=True))
    assert set(steps.seconds) == {"run blocks", "head"}
