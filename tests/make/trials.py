"""Trials, and the states of the devices that they are taken on."""

from dataclasses import replace
from typing import Any

from make.artifacts import DENSE, RUNTIMES
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_targets.trials.trial import DeviceState, RuntimeReading, Trial

CALM = DeviceState(
    governor="performance",
    frequency_khz=(1_500_000,),
    temperature_mc=50_000,
    load_1m_milli=100,
    available_memory_bytes=10**9,
    clock_offset_ns=10**18,
    throttled_bits=0,
    throttle_count=3,
    cooling_steps=0,
)
HOT = replace(CALM, throttled_bits=0x80008)
UNTOLD = DeviceState(
    governor=None, frequency_khz=None, temperature_mc=None, load_1m_milli=None, available_memory_bytes=None
)


def make_reading(name: str = "onnxruntime", version: str = "1") -> RuntimeReading:
    """A runtime on a device without a name."""
    return RuntimeReading(name=name, version=version, python="3", machine="m", kernel="k")


def make_trial(key: ArtifactKey = DENSE, **changes: Any) -> Trial:  # noqa: ANN401 - any field
    """A trial of three like samples that nothing disturbed."""
    trial = Trial(
        round=0,
        key=key,
        artifact_sha256=key.title,
        device="pi4",
        started_utc="2025-01-01T00:00:00+00:00",
        threads=1,
        load_ns=10,
        warmup_ns=(9, 8),
        warmed_up=True,
        samples_ns=(100, 100, 100),
        peak_rss_bytes=None,
        runtime_rss_bytes=None,
        runtime=make_reading(RUNTIMES[key.format][0]),
        before=CALM,
        after=CALM,
        agent_sha256="g",
        retries=0,
    )
    return replace(trial, **changes)
