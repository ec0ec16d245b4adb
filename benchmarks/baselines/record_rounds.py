# ruff: noqa: INP001 - a script is no package
"""Records real rounds on this machine for simulate_verdicts.py: `python benchmarks/baselines/record_rounds.py`.

The canary in ONNX and TFLite, timed round by round in fresh processes as `rankship bench` does; nothing changes between
rounds, so all differences are noise. Each round's median and the load before it are written to
recorded_rounds.json beside this file.
"""

import json
import os
import platform
from pathlib import Path
from statistics import median

from rankship_benchmarks.measure.host_gate import find_inputs, verify_on_host
from rankship_pipeline.export.canary import make_canary
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.records import Build, RankPlan
from rankship_pipeline.foundation.store import Store, default_root
from rankship_pipeline.recipe.export_choices import ParityChoice
from rankship_targets.devices.device import THIS_MACHINE, find_device
from rankship_targets.session.session import open_session
from rankship_targets.trials.request import MeasureRequest

ROUNDS = int(os.environ.get("ROUNDS", "40"))
NO_PLAN = RankPlan(
    method="none",
    layers=(),
    fixed_parameters=0,
    total_parameters=0,
    unit="parameters",
    total_cost=0,
    budget_cost=0,
    predicted_error=0.0,
)


def main() -> None:
    """Verify the canaries, time them round by round and write the medians."""
    steps, store = Steps(), Store(default_root())
    artifacts = tuple(make_canary(name, store, steps) for name in ("onnx", "tflite"))
    build = Build(
        recipe="canary",
        recipe_sha256="canary",
        artifacts=artifacts,
        plan=NO_PLAN,
        accuracies=(),
        alternatives=(),
        dense_parameters=0,
    )
    verified = verify_on_host(build, store, ParityChoice(), steps)
    rounds: dict[str, list[float]] = {one.key.format: [] for one in artifacts}
    loads: list[float] = []
    with open_session(find_device(THIS_MACHINE)) as session, steps.track("record", ROUNDS) as advance:
        pushed = [
            (session.push(store.root / one.file, proof), tuple(map(session.push_file, find_inputs((one,), store))))
            for one, proof in zip(artifacts, verified, strict=True)
        ]
        for number in range(ROUNDS):
            advance(f"round {number + 1}")
            for one, (remote, inputs) in zip(artifacts, pushed, strict=True):
                request = MeasureRequest(
                    round=number,
                    key=one.key,
                    artifact=remote,
                    artifact_sha256=one.sha256,
                    inputs=inputs,
                    threads=1,
                    min_samples=200,
                    min_duration_ms=100,
                    max_warmup_ms=1000,
                )
                trial = session.measure(request)
                rounds[one.key.format].append(median(trial.samples_ns))
                loads.append((trial.before.load_1m_milli or 0) / 1000)
    kept = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores shared with other work",
        "load before trials": {"lowest": min(loads), "median": median(loads), "highest": max(loads)},
        "rounds_ns": rounds,
    }
    write_atomic(Path(__file__).with_name("recorded_rounds.json"), (json.dumps(kept, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
