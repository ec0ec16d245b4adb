"""What is shown for installing: names with blanks stay one word, and a locked pip gets a virtual environment."""

from rankship_targets.devices.device import Device
from rankship_targets.devices.installing import show_kit, show_pip_install

BOARD = Device(name="my pi", transport="ssh", python="/opt/my python/bin/python3")


def test_names_with_blanks_stay_one_word() -> None:
    assert show_kit("my pi") == "`rankship kit build 'my pi' && rankship kit install 'my pi'`"
    assert show_pip_install(BOARD, "numpy", managed=False) == "`'/opt/my python/bin/python3' -m pip install numpy`"


def test_a_locked_pip_gets_an_environment_of_its_own() -> None:
    shown = show_pip_install(BOARD, "onnxruntime numpy (its note)", managed=True)
    assert "-m venv ~/rankship-env && ~/rankship-env/bin/python -m pip install onnxruntime numpy` (its note)" in shown
    assert "as python in the inventory's [my pi]" in shown
    assert "python3' -m pip" not in shown


def test_where_it_is_not_known_both_are_shown() -> None:
    shown = show_pip_install(BOARD, "numpy")
    assert "' -m pip install numpy`; where pip calls the environment externally managed: `" in shown
    assert "venv" in shown
