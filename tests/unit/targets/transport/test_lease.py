"""The lease: one host at a time, and what becomes of owners that died or went silent."""

import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from make.devices import make_local
from rankship_pipeline.foundation.errors import CommandFailed, TargetBusy
from rankship_targets.client.connect import open_transport
from rankship_targets.devices.device import Device
from rankship_targets.session.session import open_session
from rankship_targets.transport.lease import Lease, Owner, describe_owner


@pytest.fixture
def local(tmp_path: Path) -> Device:
    return make_local(tmp_path / "a device")


def test_lease_of_a_killed_process_is_taken_over(local: Device) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    leave_lease(local, replace(describe_owner(), pid=child.pid))
    with open_session(local):
        (note,) = Path(local.workdir, "lease").iterdir()
        assert json.loads(note.read_text())["pid"] == os.getpid()


def test_stale_lease_of_another_host_is_taken_over_and_a_fresh_one_is_not(local: Device) -> None:
    leave_lease(local, replace(describe_owner(), host="elsewhere"))
    with pytest.raises(TargetBusy, match="elsewhere"), open_session(local):
        pass
    age_lease(local)
    with open_session(local):
        pass


def test_lease_without_a_name_is_respected_until_stale(local: Device) -> None:
    Path(local.workdir, "lease").mkdir(parents=True)
    with pytest.raises(TargetBusy, match="unknown owner"), open_session(local):
        pass
    age_lease(local)
    with open_session(local):
        pass


def test_only_one_of_two_takes_a_stale_lease(local: Device) -> None:
    stale = replace(describe_owner(), host="elsewhere")
    leave_lease(local, stale)
    age_lease(local)
    first, second = (make_lease(local) for _ in range(2))
    with open_transport(local) as transport:
        first.take(transport)
        with pytest.raises(TargetBusy):
            second.take(transport)
        second.release(transport)  # releases nothing: it holds nothing
        first.renew(transport)
        with pytest.raises(TargetBusy):
            second.renew(transport)
        first.release(transport)
    assert not Path(local.workdir, "lease").exists()


def test_lease_taken_before_the_link_broke_is_still_ours(local: Device) -> None:
    with open_transport(local) as transport:
        transport.run(["mkdir", "-p", "--", local.workdir], timeout_s=30)
        lease = make_lease(local)
        lease.take(transport)
        lease.take(transport)
        lease.release(transport)
    assert not Path(local.workdir, "lease").exists()


def test_a_lease_that_this_process_lost_the_way_to_is_taken_over(local: Device) -> None:
    with open_transport(local) as transport:
        transport.run(["mkdir", "-p", "--", local.workdir], timeout_s=30)
        lease = make_lease(local)
        lease.take(transport)
        with pytest.raises(TargetBusy), open_session(local):
            pass
        lease.give_up()
    with open_session(local):
        pass


def test_a_lease_that_cannot_be_made_says_why_and_is_nobodys(local: Device, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lease = replace(make_lease(local), folder=f"{tmp_path}/file/lease")
    with open_transport(local) as transport, pytest.raises(CommandFailed, match="Not a directory"):
        lease.take(transport)


def make_lease(device: Device) -> Lease:
    return Lease(device=device, folder=f"{device.workdir}/lease", owner=describe_owner())


def age_lease(device: Device) -> None:
    long_ago = time.time() - 86_400
    os.utime(Path(device.workdir, "lease"), (long_ago, long_ago))


def leave_lease(device: Device, owner: Owner) -> None:
    Path(device.workdir, "lease").mkdir(parents=True, exist_ok=True)
    note = {name: getattr(owner, name) for name in ("token", "host", "namespace", "pid", "since_utc")}
    Path(device.workdir, "lease", f"{owner.token}.json").write_text(json.dumps(note))
