"""The canary: the same network everywhere, proven like any artifact and timed in every round beside the build."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from make.builds import make_build
from rankship_benchmarks.bundle.bundle import open_bundle
from rankship_benchmarks.bundle.suite import Suite
from rankship_benchmarks.judge.summary import refuse_unlike
from rankship_benchmarks.measure.host_gate import verify_on_host
from rankship_benchmarks.measure.one_device import measure_build
from rankship_benchmarks.measure.run_plan import RunPlan
from rankship_pipeline.export.canary import make_canary, make_network, make_samples
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import UnlikeConditions
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.export_choices import ParityChoice
from rankship_targets.devices.device import describe_this_machine

QUIET = Steps(quiet=True)
FROZEN = "ee9b12058f16dd4aa1476ecbcdd7297e8d5447611a0d694ca0d8bf0063fd033f"


def test_the_network_and_its_inputs_are_frozen() -> None:
    state = hashlib.sha256()
    for tensor in (*make_network().state_dict().values(), make_samples()):
        state.update(tensor.numpy().tobytes())
    assert state.hexdigest() == FROZEN
    outputs = make_network()(make_samples())
    assert outputs.shape == (8, 10)
    assert torch.isfinite(outputs).all()
    assert outputs.std(dim=0).min() > 1e-3  # it computes something of its inputs


@pytest.mark.slow
def test_a_canary_is_proven_and_timed_in_every_round(tmp_path: Path) -> None:
    store, limits = Store(tmp_path / "store"), ParityChoice()
    canary = make_canary("onnx", store, QUIET)
    assert make_canary("onnx", store, QUIET) == canary
    build, timed = make_build(parameters=0), make_build(canary, parameters=0)
    verified = verify_on_host(timed, store, limits, QUIET)
    suite = Suite(recipe="r", rounds=2, min_samples=3, min_duration_ms=1, max_warmup_ms=50)
    device = replace(describe_this_machine(), workdir=str(tmp_path / "work"))
    plan = RunPlan(build, verified, store, suite, tmp_path / "to", limits, canary=canary)
    folder = measure_build(plan, device, QUIET)
    bundle = open_bundle(folder)
    assert [(one.round, one.key) for one in bundle.trials] == [(number, canary.key) for number in (0, 1)]
    assert bundle.header.canary == canary
    refuse_unlike(bundle)
    with pytest.raises(UnlikeConditions, match="which this build did not make"):
        refuse_unlike(replace(bundle, header=replace(bundle.header, canary=None)))
