"""A night on real devices: this machine twice, and one that is away."""

from functools import partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from make.artifacts import describe_file, sign
from make.builds import make_build
from make.devices import make_local
from make.nights import do_night, plan_night
from make.onnx_files import save_product
from rankship_benchmarks.bundle.bundle import open_bundle
from rankship_benchmarks.bundle.suite import Suite
from rankship_benchmarks.fleet.measure import Here
from rankship_benchmarks.measure import cases
from rankship_benchmarks.measure import one_device as measuring
from rankship_benchmarks.measure.run_plan import RunPlan
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.export_choices import ParityChoice
from rankship_targets.devices.device import Device


@pytest.mark.slow
def test_real_devices_are_measured_at_once_and_one_that_is_away_is_a_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_product(tmp_path / "store/tiny.onnx")
    build, proof = make_build(describe_file(model)), sign(model)
    monkeypatch.setattr(cases, "find_inputs", lambda *_: [tmp_path / "store/x.npy"])
    monkeypatch.setattr(measuring, "verify_on_device", lambda *_: ())  # has tests of its own
    key = Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    away = Device(name="c", transport="ssh", host="127.0.0.1", port=1, user="nobody", host_key=key)
    devices = {name: make_local(tmp_path / f"at-{name}", name) for name in "ab"}
    lab, tonight = Here(devices | {"c": away}), plan_night(tmp_path / "results", "a,b,c")
    suite = Suite(recipe="r", rounds=2, min_samples=20, min_duration_ms=1, max_warmup_ms=50, canary=False)

    plan = RunPlan(build, [proof], Store(tmp_path / "store"), suite, tonight.results, ParityChoice())
    night = do_night(tonight, partial(lab.measure, plan), build=digest(build))
    for name, one in zip("ab", night.devices, strict=False):
        bundle = open_bundle(tonight.results / str(one.run))
        assert (bundle.header.device, bundle.finished, len(bundle.trials)) == (name, True, 2)
        assert not list((tmp_path / f"at-{name}").glob("lease*"))
    assert night.devices[2].error == "Unreachable"
    assert night.exit_code == 4
