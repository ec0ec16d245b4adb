"""A run as a good device leaves it: digits in three formats, with jitter and a slow tail around known ratios."""

import numpy as np

from make.artifacts import RUNTIMES, make_artifact, make_proof
from make.builds import make_plan
from make.bundles import make_header
from make.trials import make_trial
from rankship_benchmarks.bundle.bundle import Bundle
from rankship_pipeline.foundation.artifact_key import VARIANTS, ArtifactKey, Variant
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.formats import FORMATS, Format
from rankship_pipeline.foundation.quality import Score
from rankship_pipeline.foundation.records import Alternative, Build, Factors, LayerRank, RankPlan, TensorSpec
from rankship_targets.trials.trial import DeviceState, RuntimeReading, Trial

# Median latency of the dense model in ns, and the true ratio of the compressed one.
SPEEDS: dict[Format, tuple[float, float]] = {
    "onnx": (412_000, 0.46),
    "tflite": (655_000, 0.71),
    "executorch": (520_000, 1.08),
}
QUIET = DeviceState(
    governor="performance",
    frequency_khz=(1_800_000,) * 4,
    temperature_mc=48_300,
    load_1m_milli=700,
    available_memory_bytes=3_100_000_000,
)


def make_accuracy(stage: str, correct: int, samples: int = 2000) -> Score:
    share, margin = correct / samples, 0.008
    return Score(
        stage=stage, samples=samples, value=share, correct=correct, low=share - margin, high=min(1.0, share + margin)
    )


def make_deep_plan(method: str, layers: int = 12, kept: float = 0.3) -> RankPlan:
    """Residual stages that widen, then a narrow head; the stem and one early layer stay dense."""
    chosen = []
    for place in range(layers):
        last = place == layers - 1
        rows = 10 if last else 32 * 2 ** (3 * place // layers)
        columns = 256 if last else rows * 9
        full = min(rows, columns)
        rank = None if place in {0, 3} else max(2, int(full * kept * (1 + 0.5 * (-1) ** place)))
        dense = rows * columns
        chosen.append(
            LayerRank(
                name="classifier" if last else f"stage{1 + 3 * place // layers}.block{place % 4}.conv{1 + place % 2}",
                rows=rows,
                columns=columns,
                factors=None if rank is None else Factors(rank=rank),
                operators=((rows, columns),) if rank is None else ((rank, columns), (rows, rank)),
                dense_parameters=dense,
                chosen_parameters=dense if rank is None else rank * (rows + columns),
                relative_error=0.0 if rank is None else 0.06 / (1 + place) + 0.004 * (place % 3),
                interference=0.02 + 0.001 * place,
            )
        )
    total = 9_800 + sum(layer.chosen_parameters for layer in chosen)
    totals = {"fixed_parameters": 9_800, "budget_cost": total + 37}
    return make_plan(*chosen, parameters=total, method=method, predicted_error=0.031, **totals)


def make_digits_build(recipe: str = "digits-merge", layers: int = 12) -> Build:
    plan = make_deep_plan("calibrated", layers)
    dense = 9_800 + sum(layer.dense_parameters for layer in plan.layers)
    counts: dict[Variant, int] = {"dense": dense, "compressed": plan.total_parameters}
    artifacts = [
        make_artifact(
            ArtifactKey(variant=variant, format=format_),
            file=f"{variant}.{format_}",
            size_bytes=4 * parameters + 18_000,
            sha256=digest([variant, format_]),
            inputs=(TensorSpec(name="image", shape=(1, 1, 28, 28), dtype="float32"),),
            outputs=(TensorSpec(name="logits", shape=(1, 10), dtype="float32"),),
            parameters=parameters,
            factored_layers=tuple(plan.factors) if variant == "compressed" else (),
            recipe_sha256=digest(recipe),
            source_sha256={"digits_even": digest("even"), "digits_odd": digest("odd")},
            toolchain={"torch": "2.13.0", "onnx": "1.23.2"},
        )
        for format_ in FORMATS
        for variant, parameters in counts.items()
    ]
    return Build(
        recipe=recipe,
        recipe_sha256=digest(recipe),
        artifacts=tuple(artifacts),
        plan=plan,
        accuracies=(
            make_accuracy("source:digits_even", 1958),
            make_accuracy("source:digits_odd", 1949),
            make_accuracy("merged", 1946),
            make_accuracy("compressed", 1918),
        ),
        alternatives=tuple(
            Alternative(
                method=method, plan=make_deep_plan(method, layers, kept), accuracy=make_accuracy(method, correct)
            )
            for method, kept, correct in (("energy", 0.3, 1897), ("uniform", 0.295, 1874), ("greedy", 0.3, 1895))
        ),
        dense_parameters=dense,
    )


def make_jittered_trial(
    build: Build, number: int, key: ArtifactKey, random: np.random.Generator, samples: int = 200
) -> Trial:
    """Lognormal jitter within a round, a smaller one between rounds, and a rare slow tail."""
    median, ratio = SPEEDS[key.format]
    centre = median * (ratio if key.variant == "compressed" else 1) * random.lognormal(0, 0.008)
    times = centre * random.lognormal(0, 0.03, samples) * (1 + 0.4 * (random.random(samples) < 0.01))
    name, version = RUNTIMES[key.format]
    return make_trial(
        key,
        round=number,
        artifact_sha256=next(o.sha256 for o in build.artifacts if o.key == key),
        device="pi4-bench",
        started_utc=f"2025-01-01T10:{number:02}:00+00:00",
        load_ns=int(9e6 * random.lognormal(0, 0.05)),
        warmup_ns=(int(4 * centre), int(1.2 * centre), *[int(centre)] * 20),
        samples_ns=tuple(int(time) for time in times),
        peak_rss_bytes=61_000_000 + int(4e6 * random.random()),
        runtime_rss_bytes=52_000_000,
        runtime=RuntimeReading(
            name=name, version=version, python="3.11.2", machine="aarch64", kernel="6.1.0-rpi7-rpi-v8"
        ),
        before=QUIET,
        after=QUIET,
        agent_sha256=digest("agent"),
    )


def make_run(rounds: int = 8, layers: int = 12, recipe: str = "digits-merge", samples: int = 200) -> Bundle:
    """Two variants in three formats on one device, proven and finished."""
    build, random = make_digits_build(recipe, layers), np.random.default_rng(7)
    figures = {"samples": 256, "max_relative_error": 3.1e-7, "min_cosine": 0.99999994}
    header = make_header(
        build,
        run_id="20250101-100000-digits",
        created_utc="2025-01-01T10:00:00+00:00",
        suite_sha256=digest("suite"),
        recipe_sha256=build.recipe_sha256,
        build_sha256=digest(build),
        device="pi4-bench",
        verified=tuple(make_proof(one.sha256, one.key, **figures) for one in build.artifacts),
        rounds=rounds,
        conditions={"host kernel": "Linux 6.8", "host CPU": "AMD EPYC"},
        rankship_version="0.1.0",
    )
    keys = [ArtifactKey(variant=variant, format=format_) for format_ in FORMATS for variant in VARIANTS]
    trials = [make_jittered_trial(build, n, key, random, samples) for n in range(rounds) for key in keys]
    return Bundle(header=header, trials=tuple(trials), finished=True)
