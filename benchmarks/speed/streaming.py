"""Streaming of blocks of LLaMA-2-7B's shape, by benchmarks/baselines/stream_7b.py in a process of its own."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from speed.records import ROOT, Measured, make_figure
from speed.timing import CPU_EFFECT, MEMORY_EFFECT

SCRIPT = ROOT / "benchmarks/baselines/stream_7b.py"


def measure_streaming(_rounds: int, *, blocks: int, samples: int, positions: int) -> Measured:
    """Stream so many blocks and return the seconds of each, the highest memory, and the hours of all 32."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        options = {"blocks": blocks, "samples": samples, "positions": positions, "out": out}
        flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        subprocess.run([sys.executable, SCRIPT, *flags, "--folder", folder], check=True, stdout=subprocess.DEVNULL)
        report = json.loads(out.read_text(encoding="utf-8"))
    rows, whole = report["blocks"], report["all_32_blocks"]
    stages = [name for name in rows[0] if name.endswith("_seconds") and name != "cpu_seconds"]
    peaks = [*(row["peak_bytes"] for row in rows), report["write"]["peak_bytes"]]
    return Measured(
        figures=(
            make_figure("ours_cpu_s", "s a block", [row["cpu_seconds"] for row in rows], CPU_EFFECT),
            make_figure("ours_wall_s", "s a block", [sum(row[name] for name in stages) for row in rows]),
            make_figure("peak_bytes", "bytes", [max(peaks)], MEMORY_EFFECT),
            make_figure("whole_wall_s", "s, 32 blocks", [3600 * whole["wall_hours_as_measured"]]),
        ),
        parameters={"blocks": str(blocks), "tokens": str(samples * positions)},
    )
