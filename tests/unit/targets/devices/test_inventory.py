"""The inventory as it is written: every table comes back, nothing of the user's is touched, doubtful things refused."""

import os
import stat
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankship_pipeline.foundation.errors import InputError
from rankship_targets.devices.device import load_inventory
from rankship_targets.devices.inventory import add_device, refuse_known, remove_device, set_value, write_table
from rankship_targets.devices.meter_choice import MeterChoice
from rankship_targets.verbs.devices import devices

BOARD = {"transport": "ssh", "host": "pi4.local", "user": "pi", "host_key": "ssh-ed25519 AAAA"}
WRITTEN = """# my boards

[pi4] # on the desk
transport = "ssh"
host = "pi4.local"
user = "pi"
host_key = "ssh-ed25519 AAAA"
label = '''
[pi5]
'''

# the one in the cellar
["pi 5"]
transport = "ssh"
host = "pi5.local"
user = "pi"
host_key = "ssh-ed25519 BBBB"
"""
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.dictionaries(st.from_regex(r"[A-Za-z0-9_-]{1,12}", fullmatch=True), TEXT | st.integers(0, 2**40)), TEXT)
def test_what_is_written_is_what_toml_reads(table: dict[str, str | int], name: str) -> None:
    assert tomllib.loads(write_table(name, table)) == {name: table}


@settings(max_examples=30)
@given(st.lists(st.from_regex(r"\w[\w .-]{0,20}\w", fullmatch=True), min_size=1, max_size=4, unique=True), st.data())
def test_adding_and_removing_leaves_the_file_as_it_was(names: list[str], data: st.DataObject) -> None:
    path = Path(os.environ["XDG_STATE_HOME"]) / "devices.toml"
    path.unlink(missing_ok=True)
    for name in names:
        add_device(path, name, {**BOARD, "label": data.draw(TEXT), "cpus": (0, 1)})
    before, gone = load_inventory(path), data.draw(st.sampled_from(names))
    remove_device(path, gone)
    assert load_inventory(path) == {name: device for name, device in before.items() if name != gone}


def test_a_new_inventory_is_its_owners_only_and_an_old_ones_rights_stay(tmp_path: Path) -> None:
    path = tmp_path / "config" / "devices.toml"
    add_device(path, "pi4", BOARD)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    add_device(path, "pi5", BOARD)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert {entry.name for entry in path.parent.iterdir()} == {"devices.toml", ".devices.toml.lock"}


def test_the_users_own_lines_stay_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(WRITTEN)
    add_device(path, "new", BOARD)
    assert path.read_text().startswith(WRITTEN)
    remove_device(path, "new")
    remove_device(path, "pi4")
    assert (
        path.read_text().rstrip()
        == WRITTEN.replace(WRITTEN[WRITTEN.index("[pi4]") : WRITTEN.index("\n# the")], "").rstrip()
    )


def test_a_devices_meter_goes_with_it_and_a_value_is_set_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    board, other = '[board]\ntransport = "local"\n', '[other]\ntransport = "local"\n'
    text = f'{board}\n[board.meter]\nname = "hwmon"  # on its supply\n\n{other}'
    path.write_text(text)
    set_value(path, "board", "python", "/kit/python")
    found = load_inventory(path)["board"]
    assert (found.python, found.meter) == ("/kit/python", MeterChoice(name="hwmon"))
    remove_device(path, "board")
    assert path.read_text().strip() == '[other]\ntransport = "local"'


def test_one_value_is_set_and_changed_in_its_own_table_alone(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(WRITTEN.rstrip("\n"))
    for python in ("/first/python", "/second/'py\\thon'"):
        set_value(path, "pi 5", "python", python)
        set_value(path, "pi4", "python", python)
        found = load_inventory(path)
        assert (found["pi4"].python, found["pi 5"].python) == (python, python)
    lines = path.read_text().splitlines()
    assert [line for line in lines if not line.startswith("python = ")] == WRITTEN.splitlines()
    assert len(lines) == len(WRITTEN.splitlines()) + 2


@pytest.mark.parametrize(
    ("name", "said"), [("absent", "unknown device"), ("this-machine", "is built in"), ("pi5", "nothing was changed")]
)
def test_a_value_that_cannot_be_set_by_rule_is_left_to_the_user(tmp_path: Path, name: str, said: str) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(WRITTEN if name != "pi5" else 'pi5 = {transport = "local"}\n')
    before = path.read_text()
    with pytest.raises(InputError, match=said):
        set_value(path, name, "python", "/kit/python")
    assert path.read_text() == before


def test_a_link_to_the_inventory_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "dotfiles").mkdir()
    (tmp_path / "devices.toml").symlink_to(tmp_path / "dotfiles" / "devices.toml")
    add_device(tmp_path / "devices.toml", "pi4", BOARD)
    assert (tmp_path / "devices.toml").is_symlink()
    assert "pi4" in load_inventory(tmp_path / "dotfiles" / "devices.toml")


@pytest.mark.parametrize(
    "name", ["", "a/b", "a,b", "-rf", ".hidden", "two\nlines", " blank", "x" * 65, "this-machine", "pi4"]
)
def test_names_that_cannot_serve_or_are_taken_are_refused(tmp_path: Path, name: str) -> None:
    add_device(tmp_path / "devices.toml", "pi4", BOARD)
    before = (tmp_path / "devices.toml").read_text()
    with pytest.raises(InputError):
        refuse_known(name, tmp_path / "devices.toml")
    with pytest.raises(InputError):
        add_device(tmp_path / "devices.toml", name, BOARD)
    assert (tmp_path / "devices.toml").read_text() == before


def test_a_folder_in_which_everyone_may_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "open" / "devices.toml"
    add_device(path, "pi4", BOARD)
    path.parent.chmod(0o777)
    with pytest.raises(InputError, match=r"folder .* is writable by everyone"):
        load_inventory(path)
    with pytest.raises(InputError, match=r"folder .* is writable by everyone"):
        add_device(path, "pi5", BOARD)
    path.parent.chmod(0o1777)  # as /tmp is: nobody can replace another's file there
    assert "pi4" in load_inventory(path)


def test_an_entry_written_in_an_unusual_way_is_left_to_the_user(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text('pi4 = {transport = "ssh", host = "h", user = "u", host_key = "a b"}\n')
    with pytest.raises(InputError, match="nothing was changed"):
        remove_device(path, "pi4")
    assert path.read_text().startswith("pi4 =")


def test_a_jump_host_is_looked_up_and_kept_while_it_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    add_device(path, "gate", BOARD)
    add_device(path, "pi4", {**BOARD, "jump": "gate"})
    found = load_inventory(path)
    assert found["pi4"].via == found["gate"]
    with pytest.raises(InputError, match="pi4 is reached through gate"):
        remove_device(path, "gate")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('jump = "absent"', "is not an ssh device"),
        ('jump = "pi4"', "leads back to itself"),
        ('jump = "this-machine"', "is not an ssh device"),
        ('via = "pi4"', "unknown key 'via'"),
    ],
)
def test_jumps_that_lead_nowhere_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(write_table("pi4", BOARD) + text)
    with pytest.raises(InputError, match=said):
        load_inventory(path)


def test_twins_need_no_address_but_the_right_transport(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "devices.toml"
    for name in ("pi4", "pixel6"):
        assert devices(["add", f"my {name}", "--twin", name, "--inventory", str(path)]) == 0
    found = load_inventory(path)
    assert {name: (one.transport, one.twin) for name, one in found.items() if one.twin} == {
        "my pi4": ("ssh", "pi4"),
        "my pixel6": ("adb", "pixel6"),
    }
    assert devices(["--inventory", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "twin of a pi4" in printed
    assert devices(["remove", "my pi4", "--inventory", str(path)]) == 0
    assert "my pi4" not in load_inventory(path)
    path.write_text('[a]\ntransport = "adb"\ntwin = "pi4"\n')
    with pytest.raises(InputError, match="not reached over adb"):
        load_inventory(path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["add", "x"],
        ["add", "x", "pi@host", "--twin", "pi4"],
        ["add", "x", "--twin", "pi4", "--jump", "gate"],
        ["add", "x", "host"],
        ["add", "x", "pi@host:0"],
        ["add", "x", "pi@host:99999"],
        ["add", "x", "pi@-oProxyCommand=x"],
        ["add", "x", "pi@a b"],
        ["add", "x", "pi@h", "--jump", "absent"],
        ["remove", "absent"],
        ["remove", "this-machine"],
    ],
)
def test_wrong_calls_write_nothing(tmp_path: Path, arguments: list[str]) -> None:
    path = tmp_path / "devices.toml"
    add_device(path, "pi4", BOARD)
    before = path.read_text()
    with pytest.raises(InputError):
        devices([*arguments, "--inventory", str(path)])
    assert path.read_text() == before


def test_an_inventory_saved_by_windows_is_read_and_keeps_its_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_bytes(b"\xef\xbb\xbf" + WRITTEN.replace("\n", "\r\n").encode())
    add_device(path, "new", BOARD)
    set_value(path, "pi4", "python", "/opt/python")
    remove_device(path, "pi 5")
    assert load_inventory(path)["pi4"].python == "/opt/python"
    assert list(load_inventory(path)) == ["this-machine", "pi4", "new"]
    data = path.read_bytes()
    assert data.count(b"\n") == data.count(b"\r\n")
