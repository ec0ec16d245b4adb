# ruff: noqa: INP001 - a script, no package
"""Time and memory of streaming compression on blocks of LLaMA-2-7B's shape, compared with this machine's LAPACK.

    nice -n 10 python benchmarks/baselines/stream_7b.py --out stream_7b.json

Weights and tokens are random (spectra are flatter than a trained model's; time and memory do not depend on that in
float64). Every torch worker and LAPACK run on one thread each, so that CPU seconds can be compared on a busy machine.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy is imported

import numpy as np
import scipy.linalg
import torch
import transformers
from safetensors.torch import save_file

from rankship_pipeline.models.decoder import make_empty
from rankship_pipeline.models.sharded import INDEX
from rankship_pipeline.ranks.losses import list_doubts
from rankship_pipeline.recipe.choices import RankChoice
from rankship_pipeline.stream import backwards, forwards
from rankship_pipeline.stream import compress as stream
from rankship_pipeline.stream.choice import BlockTimes, StreamChoice
from rankship_pipeline.stream.workers import take_apart, take_apart_curved
from rankship_pipeline.stream.write import write_stream

REAL_BLOCKS = 32
KEPT = 0.8
SHAPE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def make_checkpoint(folder: Path, blocks: int) -> Path:
    """Write random bfloat16 weights, one file per block and one for the rest, with one file in memory at a time."""
    transformers.LlamaConfig(**SHAPE, num_hidden_layers=blocks, dtype="bfloat16").save_pretrained(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in make_empty(folder).state_dict().items()}
    places = {
        name: f"{'-'.join(name.split('.')[1:3]) if '.layers.' in name else 'rest'}.safetensors" for name in shapes
    }
    generator = torch.Generator().manual_seed(0)
    for file in sorted(set(places.values())):
        tensors = {}
        for name in (one for one, place in places.items() if place == file):
            random = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            tensors[name] = random if random.ndim > 1 else torch.ones_like(random)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


class Peak:
    """The process's peak of resident memory (VmHWM), which can be reset."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Reset the peak to what is resident now."""
        Path("/proc/self/clear_refs").write_text("5")

    def read_bytes(self) -> int:
        """Return the peak since the reset in bytes, mapped files included."""
        (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM")]
        return int(line.split()[1]) * 1024


class Stopwatch:
    """Wraps a function and sums wall and CPU seconds of the calling thread, by the shape of the first argument."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls: dict[str, list[tuple[float, float]]] = {}
        self.lock = threading.Lock()

    def __call__(self, matrix: Any, *rest: Any, **named: Any) -> Any:  # noqa: ANN401, D102 - whatever it wraps
        wall, cpu = time.monotonic(), time.thread_time()
        result = self.function(matrix, *rest, **named)
        with self.lock:
            shape = "×".join(map(str, matrix.shape))
            self.calls.setdefault(shape, []).append((time.monotonic() - wall, time.thread_time() - cpu))
        return result

    def describe(self) -> dict[str, dict[str, float]]:
        """Return the means by shape."""
        return {
            shape: {
                "calls": len(times),
                "mean_wall_seconds": sum(wall for wall, _ in times) / len(times),
                "mean_cpu_seconds": sum(cpu for _, cpu in times) / len(times),
            }
            for shape, times in self.calls.items()
        }


def measure_lapack() -> dict[str, dict[str, float]]:
    """Measure wall and CPU seconds of numpy's and scipy's syevd and gesdd, on one thread each."""
    syevd, gesdd = Stopwatch(np.linalg.eigh), Stopwatch(scipy.linalg.svd)
    random = np.random.default_rng(0)
    square = random.standard_normal((4096, 4096))
    syevd(square @ square.T)
    for rows in (4096, 11008):
        gesdd(random.standard_normal((rows, 4096)), full_matrices=False, overwrite_a=True, check_finite=False)
    return {f"syevd {name}": row for name, row in syevd.describe().items()} | {
        f"gesdd {name}": row for name, row in gesdd.describe().items()
    }


def compare(apart: dict[str, dict[str, float]], eigh: dict[str, dict[str, float]], lapack: dict[str, Any]) -> Any:  # noqa: ANN401
    """Compare our speed with LAPACK's on the same problem, in CPU seconds.

    GFLOP/s are nominal: the operations of the textbook algorithm (Golub and Van Loan: 9n³ for the eigenvectors that
    whiten, 6mn² + 20n³ for a thin SVD) over the seconds of either method.
    """

    def rate(operations: float, seconds: float) -> float:
        return operations / seconds / 1e9

    rows: dict[str, Any] = {}
    n = 4096
    syevd = lapack[f"syevd {n}×{n}"]["mean_cpu_seconds"]
    if f"{n}×{n}" in eigh:
        ours = eigh[f"{n}×{n}"]["mean_cpu_seconds"]
        rows["eigh 4096"] = {"ours": rate(9 * n**3, ours), "lapack": rate(9 * n**3, syevd), "ratio": syevd / ours}
    for shape, measured in apart.items():
        m = max(map(int, shape.split("×")))
        gesdd = lapack[f"gesdd {m}×{n}"]["mean_cpu_seconds"]
        is_wide = shape.startswith(f"{n}×") and m > n  # its syevd would be of 11008: left out, in LAPACK's favour
        operations = 6 * m * n**2 + 20 * n**3 + (0 if is_wide else 9 * n**3 + 2 * m * n**2)
        theirs, ours = gesdd + (0 if is_wide else syevd), measured["mean_cpu_seconds"]
        rows[f"whitening and SVD {shape}"] = {
            "ours": rate(operations, ours),
            "lapack": rate(operations, theirs),
            "ratio": theirs / ours,
            "unit": "nominal GFLOP/s per core",
        }
    return rows


def watch_apart(*, curvature: bool) -> Stopwatch:
    """Time every layer's decomposition."""
    watched = Stopwatch(take_apart_curved if curvature else take_apart)
    if curvature:
        vars(backwards)["take_apart_curved"] = watched
    else:
        vars(forwards)["take_apart"] = watched
    return watched


def main() -> None:
    """Make the checkpoint, stream it, run LAPACK, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--precision", choices=("float64", "float32"), default="float64")
    parser.add_argument("--curvature", action="store_true", help="with a backward pass, and its times in each block's")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where about 3 GB may lie for a while; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=Path("stream_7b.json"))
    given = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    peak, blocks = Peak(), list[dict[str, Any]]()
    watched = watch_apart(curvature=given.curvature)
    torch.linalg.eigh = Stopwatch(torch.linalg.eigh)
    begun_cpu = [time.process_time()]

    def tick(times: BlockTimes) -> None:
        row = asdict(times) | {"peak_bytes": peak.read_bytes(), "cpu_seconds": time.process_time() - begun_cpu[-1]}
        begun_cpu.append(time.process_time())
        blocks.append(row)
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
        peak.reset()

    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        checkpoint = make_checkpoint(Path(name) / "checkpoint", given.blocks)
        shape = (given.samples, given.positions)
        tokens = torch.randint(0, SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(1))
        peak.reset()
        idle_bytes, wall, begun_cpu[:] = peak.read_bytes(), time.monotonic(), [time.process_time()]
        choice = StreamChoice(precision=given.precision, workers=given.workers, curvature=given.curvature)
        analysis = stream.analyse_stream(checkpoint, tokens, Path(name) / "work", choice, tick)
        analysed = time.monotonic()
        dense = sum(parameter.numel() for parameter in analysis.decoder.model.parameters())
        plan = stream.allocate_stream(analysis, int(KEPT * dense), RankChoice(step=32))
        allocated = time.monotonic()
        peak.reset()
        write_stream(analysis, plan, Path(name) / "out")
        written = time.monotonic()
        write_peak = peak.read_bytes()
    apart, eigh = watched.describe(), torch.linalg.eigh.describe()
    lapack = measure_lapack()
    stages = [key for key in blocks[0] if key.endswith("_seconds")]
    mean = {key: sum(block[key] for block in blocks) / len(blocks) for key in stages}
    of_block = sum(mean[key] for key in stages if key != "cpu_seconds")
    around = analysed - wall - sum(block[key] for block in blocks for key in stages if key != "cpu_seconds")
    report = {
        "given": {key: str(value) for key, value in vars(given).items()},
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "idle_bytes": idle_bytes,
        "blocks": blocks,
        "write": {"wall_seconds": written - allocated, "peak_bytes": write_peak},
        "allocate_seconds": allocated - analysed,
        "plan": {"budget": plan.budget_cost, "total": plan.total_parameters, "factored": len(plan.factors)},
        "doubts": list(list_doubts(plan)),
        "take_apart": apart,
        "eigh": eigh,
        "lapack": lapack,
        "against_lapack": compare(apart, eigh, lapack),
        "all_32_blocks": {
            "wall_hours_as_measured": (REAL_BLOCKS * (of_block + (written - allocated) / len(blocks)) + around) / 3600,
            "cpu_hours": REAL_BLOCKS * mean["cpu_seconds"] / 3600,
        },
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    given.out.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
