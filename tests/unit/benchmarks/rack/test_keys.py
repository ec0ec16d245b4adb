"""A rack's keys, and which addresses are taken with them and without."""

from pathlib import Path

import pytest

from rankship_benchmarks.rack.keys import CERTIFICATE, KEY, SIGNERS, find_way, make_keys
from rankship_pipeline.cli import main
from rankship_pipeline.foundation.errors import InputError
from rankship_targets.session.manifest import find_signer


@pytest.mark.parametrize("text", ["tcp://127.0.0.1:8786", "127.0.0.1", "localhost:8786", "tcp://[::1]:8786"])
def test_without_keys_this_machine_is_reached(text: str) -> None:
    way = find_way(text, None)
    assert (way.address.startswith("tcp://"), way.port, way.secure(), way.read_signers()) == (True, 8786, None, ())


@pytest.mark.parametrize("text", ["tcp://10.0.0.5:8786", "lab", "tls://127.0.0.1:8786", "tcp://0.0.0.0:8786"])
def test_without_keys_nothing_beyond_this_machine_is(text: str) -> None:
    with pytest.raises(InputError, match="beyond this machine, and there are no keys") as refused:
        find_way(text, None)
    assert "rankship worker --init FOLDER" in refused.value.hint


@pytest.mark.parametrize("text", ["http://lab:80", "tcp://", "tcp://lab:none"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--scheduler"):
        find_way(text, None)


def test_with_keys_every_address_is_reached_by_tls_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_keys(tmp_path / "keys")
    way = find_way("tcp://lab:99", tmp_path / "keys")
    assert (way.address, way.host, way.port) == ("tls://lab:99", "lab", 99)
    security = way.secure()
    assert security is not None
    assert security.require_encryption
    assert way.read_signers() == (find_signer(),)
    monkeypatch.setenv("RANKSHIP_RACK", str(tmp_path / "keys"))
    assert find_way("tcp://lab:99", None) == way


def test_keys_are_made_once_and_private_and_take_up_another_user(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    assert main(["worker", "--init", str(folder)]) == 0
    before = (folder / KEY).read_bytes()
    assert (folder / KEY).stat().st_mode & 0o777 == 0o600
    (folder / SIGNERS).write_text("ab" * 32 + "\n")
    assert not make_keys(folder)
    assert (folder / KEY).read_bytes() == before
    assert find_way("lab", folder).read_signers() == ("ab" * 32, find_signer())


def test_keys_that_others_can_read_or_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    make_keys(tmp_path)
    (tmp_path / KEY).chmod(0o640)
    with pytest.raises(InputError, match="can be read by others"):
        find_way("lab", tmp_path)
    (tmp_path / KEY).chmod(0o600)
    (tmp_path / CERTIFICATE).write_text("none")
    with pytest.raises(InputError, match="is no certificate"):
        find_way("lab", tmp_path)
    (tmp_path / CERTIFICATE).unlink()
    with pytest.raises(InputError, match=f"no {CERTIFICATE}"):
        find_way("lab", tmp_path)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--scheduler is missing"),
        (["--scheduler", "127.0.0.1"], "--devices is missing"),
        (["--scheduler", "lab", "--devices", "a"], "there are no keys"),
        (["--scheduler", "127.0.0.1", "--devices", "a"], "unknown device 'a'"),
        (["--scheduler", "127.0.0.1", "--devices", "this-machine"], "every host's name for itself"),
    ],
)
def test_a_worker_says_what_is_wrong_before_it_begins(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["worker", *flags]) == 2
    assert said in capsys.readouterr().err
