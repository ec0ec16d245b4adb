"""The everyday stand-in for a Raspberry Pi 4: the real transport to a real sshd, and aarch64 code behind it."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from make.artifacts import make_request
from make.waiting import wait_until
from rankship_pipeline.foundation.artifact_key import Variant
from rankship_pipeline.foundation.errors import ConnectionLost, InputError, TargetError, TargetTimeout
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.formats import Format
from rankship_targets.client.connect import open_transport
from rankship_targets.devices.device import Device
from rankship_targets.session.session import open_session
from rankship_targets.transport.copying import copy_verified
from rankship_targets.transport.protocol import Completed, Transport, run_checked
from rankship_targets.transport.ssh.connection import open_ssh
from rankship_targets.twin import binfmt, board
from rankship_targets.twin.debian_root import WHEELS, find_root
from rankship_targets.twin.pi import log_file, overlay_folder, start_pi, stop_pi

pytestmark = pytest.mark.twin

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
BACK_S, GONE_S = 180.0, 60.0
SOME_KEY = "ssh-ed25519 A"


def run(transport: Transport, script: str) -> Completed:
    return transport.run(["sh", "-c", script], timeout_s=60)


def await_boot(device: Device, before: str) -> str:
    """Wait until the board answers with another boot than `before`."""
    seen: list[str] = []

    def is_back() -> bool:
        with suppress(ConnectionLost, TargetTimeout), open_ssh(device) as transport:
            seen.append(run_checked(transport, ["cat", f"/{board.BOOT_ID}"]))
        return seen[-1:] not in ([], [before])

    wait_until(is_back, BACK_S)
    return seen[-1]


@pytest.fixture
def own_pi(able_pi: None, request: pytest.FixtureRequest) -> Iterator[Device]:  # noqa: ARG001 - it skips
    """Give a Pi that the test may break."""
    device = start_pi(Device(name=request.node.name[:40], transport="ssh"))
    yield device
    stop_pi(device)


def test_it_looks_like_a_raspberry_pi_with_four_cores(pi4: Device) -> None:
    with open_ssh(pi4) as transport:
        assert run(transport, "id -un; uname -mr; hostname").stdout.split() == [
            "pi",
            board.KERNEL,
            "aarch64",
            "raspberrypi",
        ]
        assert run(transport, "tr -d '\\0' < /proc/device-tree/model").stdout == board.MODEL
        assert run(transport, "grep -c 0xd08 /proc/cpuinfo").stdout == "4\n"
        assert run(transport, "vcgencmd get_throttled; vcgencmd measure_temp").stdout == "throttled=0x0\ntemp=48.2'C\n"
        assert run(transport, "sudo -n id -u").stdout == "0\n"


def test_its_processor_has_no_dot_product(pi4: Device) -> None:
    ask = "from numpy._core._multiarray_umath import __cpu_features__ as f; print(f['ASIMD'], f['ASIMDDP'])"
    with open_ssh(pi4) as transport:
        assert run_checked(transport, [pi4.python, "-c", ask]) == "True False\n"


def test_files_are_copied_verified_and_only_once(pi4: Device, tmp_path: Path) -> None:
    path = tmp_path / "größe 模型"
    path.write_bytes(np.random.default_rng(0).bytes(3_000_000))
    with open_ssh(pi4) as transport:
        assert copy_verified(transport, path, "copied/a b/-c", hash_file(path))
        assert not copy_verified(transport, path, "copied/a b/-c", hash_file(path))
        transport.fetch("copied/a b/-c", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == path.read_bytes()


def test_a_command_that_is_given_up_ends_on_the_board(pi4: Device) -> None:
    with open_ssh(pi4) as transport:
        with pytest.raises(TargetTimeout):
            transport.run(["sh", "-c", "sleep 4321 & sleep 4321"], timeout_s=8)
        end = time.monotonic() + GONE_S
        while run(transport, "pgrep -f '[s]leep 4321'").code == 0:
            assert time.monotonic() < end


@pytest.mark.parametrize(("kind", "variant"), [("onnx", "dense"), ("tflite", "compressed")])
def test_a_session_probes_infers_and_measures(
    kind: Format, variant: Variant, pi4: Device, models: dict[Any, Any], samples: Path, tmp_path: Path
) -> None:
    model = models[kind, variant]
    with open_session(pi4) as session:
        probe = session.probe()
        assert (probe.machine, probe.cpu_count, probe.cpu_model) == ("aarch64", 4, board.MODEL)
        assert probe.runtimes["onnx"] == ("onnxruntime", WHEELS["onnxruntime"])
        assert probe.runtimes["tflite"] == ("ai-edge-litert", WHEELS["ai-edge-litert"])
        artifact, remote = session.push(model.path, model.verified), session.push_file(samples)
        (output,), reading = session.infer(kind, artifact, [remote], tmp_path)
        np.testing.assert_allclose(np.load(output), model.compute(np.load(samples)), rtol=1e-4, atol=1e-5)
        proof = model.verified
        request = make_request(artifact, proof.artifact_sha256, [remote], proof.key, min_samples=5, max_warmup_ms=100)
        trial = session.measure(request)
    assert reading.machine == trial.runtime.machine == "aarch64"
    assert len(trial.samples_ns) >= 5
    assert (trial.before.temperature_mc, trial.before.frequency_khz) == (48_212, (1_500_000,) * 4)


def test_what_a_test_writes_into_the_boards_files_is_what_the_agent_sees(own_pi: Device) -> None:
    folder = overlay_folder(own_pi)
    with open_session(own_pi) as session:
        cool = session.probe().state
        (folder / board.TEMPERATURE).write_text("82500\n")
        for core in range(board.CORES):
            (folder / board.CPUFREQ.format(core=core) / "scaling_cur_freq").write_text("600000\n")
            (folder / board.CPUFREQ.format(core=core) / "scaling_governor").write_text("powersave\n")
        hot = session.probe().state
    assert (cool.temperature_mc, cool.governor, cool.frequency_khz) == (48_212, "ondemand", (1_500_000,) * 4)
    assert (hot.temperature_mc, hot.governor, hot.frequency_khz) == (82_500, "powersave", (600_000,) * 4)


def test_it_reboots_and_keeps_its_disk(own_pi: Device) -> None:
    with open_ssh(own_pi) as transport:
        before = run_checked(transport, ["cat", f"/{board.BOOT_ID}"])
        run(transport, "echo kept > kept; sudo -n sh -c 'echo root > /usr/bin/of-root'")
        with pytest.raises(TargetError):
            transport.run(["sudo", "-n", "reboot"], timeout_s=20)
    assert await_boot(own_pi, before) != before
    with open_ssh(own_pi) as transport:
        assert run_checked(transport, ["cat", "kept", "/usr/bin/of-root"]) == "kept\nroot\n"
    assert not (find_root() / "root/usr/bin/of-root").exists(), "the cache is never written to"


def test_two_of_them_have_disks_of_their_own(pi4: Device, own_pi: Device) -> None:
    with open_ssh(own_pi) as one, open_ssh(pi4) as other:
        run(one, "touch only-here")
        assert run(one, "ls only-here").code == 0
        assert run(other, "ls only-here").code != 0
    assert own_pi.port != pi4.port


def test_its_inventory_entry_starts_it_once(pi4: Device) -> None:
    entry = Device(name="pi4", transport="ssh", twin="pi4", workdir="a workdir")
    with open_transport(entry) as transport:
        assert run(transport, "hostname").stdout == "raspberrypi\n"
        assert (
            run_checked(transport, ["python3", "-c", "import onnxruntime, sys; print(sys.prefix)"]) == "/opt/rankship\n"
        )
    assert start_pi(entry).port == pi4.port


@pytest.mark.usefixtures("able_pi")
def test_it_outlives_the_thread_that_started_it() -> None:
    devices: list[Device] = []
    thread = threading.Thread(target=lambda: devices.append(start_pi(Device(name="threaded", transport="ssh"))))
    thread.start()
    thread.join()
    try:
        with open_ssh(devices[0]) as transport:
            assert run(transport, "true").code == 0
    finally:
        stop_pi(devices[0])


HOST = """
import json, sys, time
from rankship_targets.devices.device import Device
from rankship_targets.twin import pi
device = pi.start_pi(Device(name="brief", transport="ssh"))
print(json.dumps([device.port, str(pi.overlay_folder(device).parent)]), flush=True)
if sys.argv[1] == "wait":
    time.sleep(600)
"""


@pytest.mark.parametrize("end", ["exit", "kill -9", "kill -9 of its keeper"])
@pytest.mark.usefixtures("able_pi")
def test_nothing_is_left_behind(end: str, await_gone: Callable[[list[psutil.Process]], None]) -> None:
    argv = [sys.executable, "-c", HOST, "go" if end == "exit" else "wait"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        try:
            port, state = json.loads(host.stdout.readline())
            family = psutil.Process(host.pid).children(recursive=True)
            if end == "exit":
                host.wait(GONE_S)
            else:
                assert len(family) >= 3
                (host if end == "kill -9" else family[0]).kill()
            await_gone(family)
            device = Device(name="brief", transport="ssh", host="127.0.0.1", port=port, user="pi", host_key=SOME_KEY)
            with pytest.raises((ConnectionLost, InputError)):
                open_ssh(device)
        finally:
            host.kill()
    if end != "kill -9 of its keeper":  # who would clean up was ended; it left a few kilobytes
        assert not Path(state).exists()


def test_its_log_says_who_came(pi4: Device) -> None:
    with open_ssh(pi4) as transport:
        run(transport, "true")
    assert "Accepted publickey for pi" in log_file(pi4).read_text()


@pytest.mark.usefixtures("able_machine")
def test_a_machine_without_the_packages_is_told_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="the stand-in needs mmdebstrap and arch-test") as caught:
        binfmt.check_machine("the stand-in")
    assert caught.value.hint == "run `apt-get install qemu-user-static mmdebstrap arch-test`"


@pytest.mark.usefixtures("able_machine")
def test_a_machine_that_refuses_a_room_says_so_and_nothing_waits() -> None:
    enter = f"{sys.executable} -c 'from rankship_targets.twin.binfmt import enter_room; enter_room()'"
    refusing = f"echo 0 > /proc/sys/user/max_user_namespaces; {enter}"  # only for what is inside
    argv = ["unshare", "--user", "--map-root-user", "sh", "-c", refusing]
    tried = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert tried.returncode != 0
    assert "unshare" in tried.stderr.splitlines()[-1]


@pytest.mark.usefixtures("pi4")
def test_a_full_cache_needs_no_package_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert (find_root() / "root/usr/sbin/sshd").exists()


def test_the_runtimes_are_those_that_are_tested_together() -> None:
    pins = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if "==" in line)
    assert {name: pins[name] for name in WHEELS} == WHEELS


def test_who_was_never_started_is_named() -> None:
    with pytest.raises(InputError, match="'nobody'"):
        overlay_folder(Device(name="nobody", transport="ssh"))
